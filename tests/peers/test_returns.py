"""Nodes that come back with the memory they had: used where it fits, not where the run has gone on without it."""

from __future__ import annotations

import pytest
from fleet import MakeFleet
from harness import wait_until
from shard_ranks import ShardJob

from ckptd.errors import RestoreUndecided


def test_a_node_that_comes_back_with_its_memory_serves_from_it(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(4)
    job = ShardJob(fleet.daemons, protect="2+2")
    job.save(1)
    job.wait_protected(1)
    held = fleet.parity(1)
    for position in (0, 2):
        fleet.daemons[position].restart()
    assert fleet.parity(1) == held
    job = ShardJob(fleet.daemons, protect="2+2")
    restored, sources = job.restore()
    assert restored.step == 1
    assert set(sources.values()) == {"memory"}
    job.wait_whole(restored, losses=2)
    assert fleet.parity(1) == held  # nothing had to be made again


def test_one_more_loss_than_parity_makes_up_for_is_mended_by_a_node_that_comes_back(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(6)
    job = ShardJob(fleet.daemons)
    job.save(1)
    job.wait_protected(1)
    fleet.daemons[4].kill()
    fleet.lose(1, 2)
    fleet.replace(1, 2)
    away, *_ = fleet.start(1)
    placement = [*fleet.daemons[:4], away, fleet.daemons[5]]
    with pytest.raises(RestoreUndecided, match=r"step 1 .* is not recoverable: .* ranks 1, 2, 4"):
        ShardJob(placement).candidates()
    fleet.daemons[4].restart()  # at its old address: the old roster names it, the new one does not
    job = ShardJob(placement)
    restored, sources = job.restore()
    assert restored.step == 1
    apart = {1: "reconstruction", 2: "reconstruction", 4: "peer"}
    assert sources == dict.fromkeys(range(6), "memory") | apart
    job.wait_whole(restored, losses=2)


def test_a_node_that_was_away_while_the_run_went_on_restores_what_is_newer_than_its_memory(
    make_fleet: MakeFleet,
) -> None:
    fleet = make_fleet(4)
    job = ShardJob(fleet.daemons, protect="2+2")
    job.save(1)
    job.wait_protected(1)
    stale = fleet.daemons[2]
    stale.kill()
    fleet.replace(2)
    job = ShardJob(fleet.daemons, protect="2+2")
    assert job.restore()[1][2] == "reconstruction"
    for step in (2, 3):
        job.save(step)
        job.wait_protected(step)
    fleet.lose(2)
    stale.restart()
    fleet.daemons[2] = stale
    job = ShardJob(fleet.daemons, protect="2+2")
    restored, sources = job.restore()
    assert restored.step == 3
    assert sources == {0: "memory", 1: "memory", 2: "reconstruction", 3: "memory"}
    job.wait_whole(restored, losses=2)
    wait_until(lambda: not any(fleet.parity(1).values()), "what it had kept to be given up")


def test_a_branch_that_the_run_has_left_does_not_come_back_with_a_node(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(4, options_of=lambda _: {"failpoints": "protect.before=sleep:600@2"})
    job = ShardJob(fleet.daemons, protect="2+2")
    job.save(1)
    job.wait_protected(1)
    job.save(2)  # staged, and protected nowhere
    job.wait_protecting(2)
    away = fleet.daemons[1]
    away.kill()
    fleet.replace(1)
    job = ShardJob(fleet.daemons, protect="2+2")
    assert job.restore()[0].step == 1
    job.save(2)  # another one: its bytes are not those of the first
    job.wait_protected(2)
    fleet.lose(1)
    away.restart()
    fleet.daemons[1] = away
    job = ShardJob(fleet.daemons, protect="2+2")
    restored, sources = job.restore()
    assert (restored.incarnation.ordinal, restored.step) == (2, 2)
    assert sources == {0: "memory", 1: "reconstruction", 2: "memory", 3: "memory"}
    job.wait_whole(restored, losses=2)
