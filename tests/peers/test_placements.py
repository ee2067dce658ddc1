"""Ranks that come back on other nodes: their shards are found wherever they lie, and protected where they are now."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from fleet import MakeFleet, flip_image_block
from harness import DaemonProcess, wait_until
from shard_ranks import ShardJob

from ckptd.model import SnapshotId


def protected_job(placement: Sequence[DaemonProcess], protect: str = "4+2", steps: Sequence[int] = (1, 2)) -> ShardJob:
    job = ShardJob(placement, protect=protect, size_of=lambda rank, step: 50_000 + 40_000 * rank + 7 * step)
    for step in steps:
        job.save(step)
        job.wait_protected(step)
    return job


def restored_job(
    placement: Sequence[DaemonProcess], losses: int, protect: str = "4+2"
) -> tuple[ShardJob, SnapshotId, dict[int, str]]:
    """A new start on ``placement``: restored, and protected again so that ``losses`` nodes may go."""
    job = protected_job(placement, protect, steps=())
    restored, sources = job.restore()
    job.wait_whole(restored, losses)
    return job, restored, sources


def test_ranks_that_change_places_fetch_from_peers_and_are_protected_where_they_are(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(6)
    nodes = fleet.daemons
    protected_job(nodes)
    turned = [*nodes[1:4], nodes[5], nodes[4], nodes[0]]  # rank 4 stays where it was
    job, restored, sources = restored_job(turned, losses=2)
    assert restored.step == 2
    assert sources == dict.fromkeys(range(6), "peer") | {4: "memory"}
    job.save(3)
    job.wait_protected(3)
    fleet.lose(0, 3)  # of ranks 5 and 2 now
    fleet.replace(0, 3)
    nodes = fleet.daemons
    turned = [*nodes[1:4], nodes[5], nodes[4], nodes[0]]
    _, restored, sources = restored_job(turned, losses=2)
    assert restored.step == 3
    assert sources == dict.fromkeys(range(6), "memory") | dict.fromkeys((2, 5), "reconstruction")


def test_fewer_nodes_take_all_ranks_and_a_spare_one_that_has_none_still_gives_what_it_holds(
    make_fleet: MakeFleet,
) -> None:
    fleet = make_fleet(6)
    protected_job(fleet.daemons)
    fleet.lose(1, 2)
    first, _, _, fourth, fifth, spare = fleet.daemons
    placement = [first, first, fourth, fourth, fifth, fifth]
    job, restored, sources = restored_job(placement, losses=1, protect="auto")
    assert restored.step == 2
    # Without the spare one there would be three fragments of four: both lost shards need it.
    assert sources == {0: "memory", 1: "reconstruction", 2: "reconstruction", 3: "memory", 4: "memory", 5: "peer"}
    assert job.marks_at(spare) == {}
    job.save(3)
    job.wait_protected(3)
    fleet.lose(4)  # with two ranks
    fleet.replace(4)
    placement = [first, first, fourth, fourth, fleet.daemons[4], fleet.daemons[4]]
    _, restored, sources = restored_job(placement, losses=1, protect="auto")
    assert restored.step == 3
    assert sources == dict.fromkeys(range(4), "memory") | dict.fromkeys((4, 5), "reconstruction")


def test_two_ranks_of_a_lost_node_are_reconstructed_on_nodes_of_their_own(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(4)
    a, b, c, spare = fleet.daemons
    protected_job([a, a, b, b, c, c], protect="2+1")
    fleet.lose(1)
    fleet.replace(1)
    _, restored, sources = restored_job([a, c, fleet.daemons[1], spare, c, c], losses=2, protect="auto")
    assert restored.step == 2
    apart = {1: "peer", 2: "reconstruction", 3: "reconstruction"}
    assert sources == dict.fromkeys(range(6), "memory") | apart


def test_a_spare_node_that_dies_while_its_shard_is_copied_is_made_up_for_by_parity(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(6)
    job = ShardJob(fleet.daemons, size_bytes=5_000_000)
    job.save(1)
    job.wait_protected(1)
    spare = fleet.daemons[5]
    spare.restart(failpoints="pull.batch=kill@3")
    fleet.lose(1)
    fleet.replace(1, 5)
    job = ShardJob(fleet.daemons, size_bytes=5_000_000)
    restored, sources = job.restore()
    assert spare.wait_exit() == -9
    assert restored.step == 1
    assert sources == dict.fromkeys(range(6), "memory") | dict.fromkeys((1, 5), "reconstruction")
    job.wait_whole(restored, losses=2)


@pytest.mark.slow
def test_a_daemon_that_a_new_start_leaves_out_says_nothing_of_the_run_any_more(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(3, http=True)
    left_out, second, third = fleet.daemons
    job = protected_job(fleet.daemons, protect="2+1")
    for rank in job.ranks:
        rank.die(job)
    job.close()
    assert 'run="shards"' in left_out.get("/metrics")[1]
    _, restored, sources = restored_job([second, second, third], losses=1, protect="auto")
    assert (restored.step, sources) == (2, {0: "peer", 1: "memory", 2: "memory"})
    wait_until(lambda: 'run="shards"' not in left_out.get("/metrics")[1], "the daemon that was left out to know so")


def test_a_restore_that_makes_a_corrupt_shard_again_counts_as_a_repair(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2, http=True)
    protected_job(fleet.daemons, protect="1+1")
    flip_image_block(fleet.daemons[1], step=2, block=0)
    _, _, sources = restored_job(fleet.daemons, losses=1, protect="1+1")
    assert sources == {0: "memory", 1: "reconstruction"}
    page = fleet.daemons[1].get("/metrics")[1]
    assert 'ckptd_repaired_total{kind="slot",run="shards"} 1.0' in page
    assert 'ckptd_corrupt_total{place="memory",run="shards"} 1.0' in page
