"""Drains of a run over several nodes: one commit in a shared tier, one a node in tiers of their own, lost nodes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from harness import DaemonProcess, Stage, wait_until
from shard_ranks import ShardJob


def _nodes(stage: Stage, count: int, *tiers: str, **options: object) -> list[DaemonProcess]:
    return [stage.daemon(listen=True, memory="32MiB", tiers=tiers, **options) for _ in range(count)]


def _give_up_reason(daemon: DaemonProcess, step: int) -> str:
    outcomes = daemon.run_status("shards")["watermarks"]["not_durable"]
    return next((o["reason"] for o in outcomes if o["step"] == step), "")


def test_every_node_writes_its_ranks_and_the_coordinator_commits_once(stage: Stage, tmp_path: Path) -> None:
    nodes = _nodes(stage, 3, f"file://{tmp_path}/tier,every=1")
    job = ShardJob(nodes, protect="2+1")
    job.save(1, persist=True)
    for node in nodes:
        node.wait_mark("shards", "durable", 1)
    assert nodes[2].steps("shards", "tier", "durable") == [1]
    assert not nodes[1].findings("shards")


def test_each_node_commits_its_own_tier(stage: Stage) -> None:
    nodes = _nodes(stage, 2, "file://{folder}/tier,scope=node,every=1")
    job = ShardJob(nodes, protect="1+1")
    job.save(1, persist=True)
    for node in nodes:
        wait_until(lambda node=node: node.steps("shards", "tier", "durable") == [1], "the node's own commit")  # type: ignore[misc]
    assert nodes[0].watermark("shards", "durable") is None  # a node's own tier goes with the node


def test_shards_of_a_lost_node_are_drained_by_a_survivor(stage: Stage, tmp_path: Path) -> None:
    tier = f"file://{tmp_path}/tier,every=1"
    nodes = _nodes(stage, 2, tier)
    # The last node never gets to write: every drain of it waits, until it is killed.
    nodes += _nodes(stage, 1, tier, failpoints="drain.before=sleep:120")
    job = ShardJob(nodes, protect="2+1")
    job.save(1, persist=True)
    job.wait_protected(1)
    nodes[2].close()
    nodes[0].wait_mark("shards", "durable", 1, 60)
    assert not nodes[0].findings("shards")


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_drain_that_others_have_done_ends_after_the_coordinators_restart(
    stage: Stage, tmp_path: Path, count: int
) -> None:
    tier = f"file://{tmp_path}/tier,every=1"
    nodes = _nodes(stage, 1, tier, failpoints="drain.before=sleep:60")
    nodes += _nodes(stage, count - 1, tier)
    job = ShardJob(nodes, protect="off")
    job.save(1, persist=True)
    for rank in range(1, count):
        written = f"shards/step-*/rank-0000{rank}"
        wait_until(lambda written=written: list((tmp_path / "tier").glob(written)), "the others' drains")  # type: ignore[misc]
    time.sleep(0.5)  # they tell that they are done; the sooner the restart, the easier
    nodes[0].restart()
    job.rejoin(nodes[0])
    nodes[0].wait_mark("shards", "durable", 1)


@pytest.mark.slow
def test_a_drain_of_an_older_step_goes_on_after_the_coordinators_restart(stage: Stage, tmp_path: Path) -> None:
    tier = f"file://{tmp_path}/tier,every=1"
    nodes = _nodes(stage, 1, tier)
    nodes += _nodes(stage, 1, tier, failpoints="drain.before=sleep:5")
    job = ShardJob(nodes, protect="off")
    job.save(1, persist=True)
    nodes[0].wait_mark("shards", "draining", 1)
    job.save(2)
    for node in nodes:
        node.wait_mark("shards", "staged", 2)
    nodes[0].restart()
    job.rejoin(nodes[0])
    nodes[0].wait_mark("shards", "durable", 1)


@pytest.mark.slow
def test_a_drain_that_nobody_can_take_over_is_given_up_with_the_reason(stage: Stage, tmp_path: Path) -> None:
    tier = f"file://{tmp_path}/tier,every=1"
    nodes = _nodes(stage, 1, tier)
    nodes += _nodes(stage, 1, tier, failpoints="drain.before=sleep:120")
    job = ShardJob(nodes, protect="off")
    job.save(1, persist=True)
    nodes[1].close()
    wait_until(lambda: _give_up_reason(nodes[0], 1), "the drain to be given up", 60)
    assert "was not heard of" in _give_up_reason(nodes[0], 1)


def test_a_daemon_that_serves_other_tiers_fails_the_drain_and_is_named(stage: Stage, tmp_path: Path) -> None:
    nodes = [stage.daemon(listen=True, memory="32MiB", tiers=[f"file://{tmp_path}/tier,every=1"])]
    nodes += _nodes(stage, 1)
    job = ShardJob(nodes, protect="off")
    job.save(1, persist=True)
    wait_until(lambda: _give_up_reason(nodes[0], 1), "the drain to be given up")
    assert nodes[1].status()["node_id"] in _give_up_reason(nodes[0], 1)


def test_prune_finish_completes_the_commit_of_a_lost_coordinator(stage: Stage, tmp_path: Path) -> None:
    tier = f"file://{tmp_path}/tier,every=1"
    # The coordinator's own shard never gets to the tier.
    coordinator = stage.daemon(listen=True, memory="32MiB", tiers=[tier], failpoints="drain.before=sleep:120")
    other = stage.daemon(listen=True, memory="32MiB", tiers=[tier])
    job = ShardJob([coordinator, other], protect="1+1")
    job.save(1, persist=True)
    job.wait_protected(1)
    wait_until(lambda: list((tmp_path / "tier").glob("shards/step-*/rank-00001")), "the other node's drain")
    coordinator.close()
    wait_until(lambda: other.cli("prune", "shards", "--finish", "--apply").rc == 0, "the commit to be finished")
    assert other.steps("shards", "tier", "durable") == [1]
    assert not other.findings("shards")
