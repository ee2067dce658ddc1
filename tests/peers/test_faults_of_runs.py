"""Faults of a run over several daemons: who judges, who knows, who takes over, and what is done about them."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fleet import MakeFleet
from harness import DaemonProcess, wait_until
from processes import ANSWER_S, CKPTD, clean_environment, run_cli
from shard_ranks import ShardJob
from timing_ranks import BYTES, TimingJob

from ckptd.cli import channel
from ckptd.format.timings import Op
from ckptd_api.v1 import operator_pb2
from ckptd_client.daemon import Daemon
from ckptd_client.timing.black_box import BlackBox

HANG_S = 25.0
PACE_S = 0.5  # between batches of steps, so that they are judged one after the other


def faults(daemon: DaemonProcess, *, has_resolved: bool = False) -> list[dict[str, Any]]:
    return answer(daemon, has_resolved=has_resolved)["faults"]


def answer(daemon: DaemonProcess, *, has_resolved: bool = False) -> dict[str, Any]:
    with channel.connect(daemon.address) as connected:
        request = operator_pb2.ListFaultsRequest(run="shards", has_resolved=has_resolved)
        found = connected.unary(connected.stub.ListFaults, request, ANSWER_S)
    return {
        "faults": [
            {"kind": f.kind, "ranks": list(f.ranks), "nodes": list(f.nodes), "confidence": f.confidence}
            | {"since_step": f.since_step, "evidence": json.loads(f.evidence), "resolved_s": f.resolved_s}
            for f in found.faults
        ],
        "coverage": [
            {"analyst": c.analyst, "is_judging": c.is_judging, "heard": c.ranks_heard} for c in found.coverage
        ],
    }


def test_a_slow_rank_is_named_on_every_daemon_and_resolved_once_it_is_not(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(4)
    job = TimingJob(fleet.daemons, protect="off")
    job.run_steps(40)
    wait_until(lambda: [c["heard"] for c in answer(fleet.daemons[0])["coverage"]] == [4], "all ranks to be heard of")
    assert all(faults(daemon) == [] for daemon in fleet.daemons)

    def is_known(compute_s: dict[int, float], ranks: list[list[int]]) -> bool:
        """After ten more steps."""
        job.run_steps(10, compute_s)
        time.sleep(PACE_S)
        return all([fault["ranks"] for fault in faults(daemon)] == ranks for daemon in fleet.daemons)

    wait_until(lambda: is_known({2: 0.13}, [[2]]), "the fault to be known everywhere", 60)
    for daemon in fleet.daemons:
        (fault,) = faults(daemon)
        assert fault["kind"] == "slow_compute"
        assert fault["since_step"] >= 30
        assert "rank 2" in fault["evidence"]["summary"]
        places = [place["name"] for place in fault["evidence"]["worst_positions"]]
        assert any("all_reduce" in name for name in places), places
    wait_until(lambda: is_known({}, []), "the fault to be over", 60)
    assert [fault["ranks"] for fault in faults(fleet.daemons[3], has_resolved=True)] == [[2]]


def test_the_restore_after_a_fault_asks_the_node_at_fault_last(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(4)
    job = TimingJob(fleet.daemons, protect="2+2")
    job.save(1)
    job.wait_protected(1)
    job.run_steps(40)

    def is_confirmed() -> bool:
        job.run_steps(10, {2: 0.13})
        time.sleep(PACE_S)
        return all([f["confidence"] for f in faults(daemon)] == ["confirmed"] for daemon in fleet.daemons)

    wait_until(is_confirmed, "the fault to be confirmed everywhere", 60)
    first, second, third, fourth = fleet.daemons
    moved = ShardJob([second, first, fourth, third], protect="2+2")
    assert moved.restore()[1] == {0: "peer", 1: "peer", 2: "reconstruction", 3: "peer"}
    fleet.lose(0, 1)  # without the node at fault nothing is whole now
    fleet.replace(0, 1)
    left = ShardJob([fleet.daemons[0], fleet.daemons[1], fourth, third], protect="2+2")
    _, sources = left.restore()
    assert sources[0] == sources[1] == "reconstruction"


@pytest.mark.slow
def test_what_was_judged_can_be_saved_and_judged_again_elsewhere(make_fleet: MakeFleet, tmp_path: Path) -> None:
    fleet = make_fleet(3)
    job = TimingJob(fleet.daemons, protect="off")
    for _ in range(8):
        job.run_steps(10, {1: 0.2} if job.at_step >= 40 else {})
        time.sleep(PACE_S)
    wait_until(lambda: [fault["ranks"] for fault in faults(fleet.daemons[2])] == [[1]], "the fault to be known")
    path = tmp_path / "run.ckptd-timings"
    saved = fleet.daemons[2].cli("faults", "shards", "--record", path)  # not the analyst: it is asked
    assert saved.rc == 0, saved.stderr
    judged = run_cli("faults", "--replay", path, "--json")
    assert [(f["kind"], f["ranks"]) for f in json.loads(judged.stdout)["faults"]] == [("slow_compute", [1])]


def test_a_rank_that_others_wait_for_is_named_and_those_that_wait_are_not(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(3)
    job = TimingJob(fleet.daemons, protect="off")
    job.run_steps(5)
    with job.beating(waiting={0, 1}):  # rank 2 lives: it may be saving, for a while
        (fault,) = wait_until(lambda: faults(fleet.daemons[1]), "the hang to be named", HANG_S)
    assert (fault["kind"], fault["ranks"], fault["confidence"]) == ("hang", [2], "suspect")


def test_a_mismatch_is_told_of_ranks_that_were_killed_by_it_before_they_could_tell(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2)
    job = TimingJob(fleet.daemons, protect="off")
    boxes = [black_box(daemon, job, rank) for rank, daemon in enumerate(fleet.daemons)]
    job.run_steps(40)
    for seq in range(1, 41):
        for box in boxes:
            box.write(0, Op.ALL_REDUCE, seq, BYTES)
    boxes[0].write(0, Op.ALL_REDUCE, 41, BYTES)
    boxes[1].write(0, Op.ALL_REDUCE, 41, BYTES // 2)
    for rank in job.ranks:
        rank.die(job)
    wait_until(lambda: faults(fleet.daemons[0]), "a fault")
    (fault,) = faults(fleet.daemons[0])
    assert (fault["kind"], fault["ranks"], fault["nodes"]) == ("desync", [1], [])
    assert fault["evidence"]["mismatches"][0]["seq"] == 41


def black_box(daemon: DaemonProcess, job: TimingJob, rank: int) -> BlackBox:
    """The memory that the daemon reads when ``rank`` is gone."""
    client = Daemon(f"unix://{daemon.socket}")
    client.open_session()
    fd = client.black_box(job.run, job.incarnation, rank)
    assert fd is not None
    box = BlackBox()
    box.move_to(fd)
    client.close()
    return box


@pytest.mark.parametrize(
    "flags", [pytest.param((), marks=pytest.mark.slow, id="text"), pytest.param(("--json",), id="json")]
)
def test_who_watches_through_a_pipe_is_told_each_change_at_once(make_fleet: MakeFleet, flags: tuple[str, ...]) -> None:
    fleet = make_fleet(2)
    job = TimingJob(fleet.daemons, protect="off")
    job.run_steps(20)
    command = [CKPTD, "faults", "--watch", *flags, "--socket", fleet.daemons[1].socket]
    said: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=clean_environment()) as watch:
        assert watch.stdout is not None
        reader = threading.Thread(target=lambda lines: said.extend(lines), args=(watch.stdout,))
        reader.start()
        try:
            wait_until(lambda: said, "the first answer")
            job.ranks[1].die(job)
            wait_until(lambda: any("death" in line for line in said), "the death")
        finally:
            watch.kill()
            reader.join()


@pytest.mark.slow
def test_when_the_coordinators_daemon_is_gone_the_next_judges_in_its_place(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(4)
    job = TimingJob(fleet.daemons, protect="off")
    job.run_steps(5)
    fleet.daemons[0].kill()
    with job.beating(waiting={0, 1, 2}, silent={0}):
        found = wait_until(lambda: faults(fleet.daemons[3]), "the hang to be named", HANG_S + 10)
    named = {rank for fault in found for rank in fault["ranks"]}
    assert 3 in named
    assert not named & {1, 2}
    second = fleet.daemons[1].status()["node_id"]
    wait_until(lambda: [c["analyst"] for c in answer(fleet.daemons[3])["coverage"]] == [second], "the analyst")


@pytest.mark.slow
def test_half_of_a_run_does_not_judge_it(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(4)
    job = TimingJob(fleet.daemons, protect="off")
    job.run_steps(5)
    for daemon in fleet.daemons[:2]:
        daemon.kill()
    with job.beating(waiting={2}, silent={0, 1}):
        left = fleet.daemons[2]
        wait_until(lambda: [c["is_judging"] for c in answer(left)["coverage"]] == [False], "nobody to judge", HANG_S)
    assert faults(fleet.daemons[2]) == []


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    return tmp_path / "notes"


def on_fault(notes: Path) -> dict[str, Any]:
    """Options of a daemon that notes each fault, in a line."""
    return {"env": {"CKPTD_ON_FAULT_LEVEL": "confirmed"}, "flags": ("--on-fault", f"cat >> {notes}; echo >> {notes}")}


@pytest.mark.slow
def test_a_command_is_run_on_a_fault_once_with_the_fault_on_its_input(make_fleet: MakeFleet, notes: Path) -> None:
    fleet = make_fleet(3, **on_fault(notes))
    job = TimingJob(fleet.daemons, protect="off")
    job.run_steps(5)
    with job.beating(waiting={0, 1}, silent={2}):
        wait_until(notes.exists, "the command to run", HANG_S)
        wait_until(lambda: "action done" in fleet.daemons[0].log, "the command to end")
    (line,) = notes.read_text().splitlines()
    told = json.loads(line)
    node_id = fleet.daemons[2].status()["node_id"]
    assert (told["run"], told["kind"], told["ranks"], told["nodes"]) == ("shards", "hang", [2], [node_id])
    assert told["addresses"] == {node_id: fleet.daemons[2].listen}
    with job.beating(waiting={0, 2}, silent={1}):  # another rank, within the hour
        wait_until(lambda: "no action on a fault" in fleet.daemons[0].log, "the second to be refused", HANG_S)
    assert "at most one node is acted on" in fleet.daemons[0].log
    assert len(notes.read_text().splitlines()) == 1


@pytest.mark.slow
def test_an_action_is_remembered_by_a_coordinator_that_was_restarted(make_fleet: MakeFleet, notes: Path) -> None:
    fleet = make_fleet(3, **on_fault(notes))
    job = TimingJob(fleet.daemons, protect="off")
    job.run_steps(5)
    with job.beating(waiting={0, 1}, silent={2}):
        wait_until(notes.exists, "the command to run", HANG_S)
    fleet.daemons[0].restart()
    job.rejoin(fleet.daemons[0])
    with job.beating(waiting={0, 2}, silent={1}):
        wait_until(lambda: "no action on a fault" in fleet.daemons[0].log, "the second to be refused", HANG_S)
    assert len(notes.read_text().splitlines()) == 1


@pytest.mark.slow
def test_with_less_confidence_than_the_owner_asked_for_nothing_is_run(make_fleet: MakeFleet, notes: Path) -> None:
    fleet = make_fleet(3, flags=on_fault(notes)["flags"], http=True)
    job = TimingJob(fleet.daemons, protect="off")
    job.run_steps(5)
    with job.beating(waiting={0, 1}, silent={2}):
        wait_until(lambda: faults(fleet.daemons[0]), "the hang to be named", HANG_S)
        node_id = fleet.daemons[2].status()["node_id"]
        series = f'ckptd_fault{{confidence="confirmed",kind="hang",node="{node_id}",run="shards"}} 1.0'
        wait_until(lambda: series in fleet.daemons[0].get("/metrics")[1], "the fault to be a metric")
    assert not notes.exists()
    page = fleet.daemons[0].get("/metrics")[1].splitlines()
    counted = [line for line in page if line.startswith("ckptd_fault_actions_total{")]
    assert counted
    assert all(line.endswith(" 0.0") for line in counted)
