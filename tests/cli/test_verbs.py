"""What each verb shows and how it exits, against a daemon whose answers are given."""

from __future__ import annotations

import json

import pytest
from fake_daemon import Ckptd, FakeDaemon, row

from ckptd.errors import NoTier, UnknownRun
from ckptd_api.v1 import operator_pb2 as pb


def status_answer() -> pb.GetStatusResponse:
    answer = pb.GetStatusResponse(
        version="0.1.0", node_id="n1", pid=77, memory_bytes=8 << 30, used_bytes=3 << 29, arena="/dev/shm/ckptd-x"
    )
    run = answer.runs.add(run="gpt", world_size=4, owner="ann", state="active")
    run.incarnation.ordinal = 3
    run.watermarks.staged = 120
    run.watermarks.dead.add(step=110, error="NoSlot", reason="none free")
    run.ranks.add(rank=0, pid=1, state="joined")
    run.ranks.add(rank=1, pid=2, state="dead")
    answer.slots.add(slot="s0", run="gpt", rank=0, state="SEALED", slot_bytes=1 << 20).snapshot.step = 120
    answer.slots.add(slot="s1", run="gpt", rank=0, state="FREE", slot_bytes=1 << 20)
    answer.tiers.add(url="file:///ckpt", scope="shared", is_healthy=True)
    return answer


# --- status -------------------------------------------------------------------------------------------------------
def test_status_shows_memory_runs_slots_and_tiers(daemon: FakeDaemon, ckptd: Ckptd) -> None:
    daemon.operator.answers["GetStatus"] = status_answer()
    result = ckptd("status", "--socket", daemon.socket)
    assert result.returncode == 0
    assert "memory: 1.5GiB of 8GiB in /dev/shm/ckptd-x" in result.stdout
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["gpt", "active", "3-0000000000000000", "1/2", "of", "4", "120", "-", "-", "1", "ann"] in lines
    assert ["s0", "gpt", "0", "SEALED", "120", "1MiB", "0"] in lines
    assert ["s1", "gpt", "0", "FREE", "-", "1MiB", "0"] in lines
    assert ["file:///ckpt", "shared", "ok"] in lines


def test_status_as_json_is_the_message_with_numbers_and_nulls(daemon: FakeDaemon, ckptd: Ckptd) -> None:
    daemon.operator.answers["GetStatus"] = status_answer()
    result = ckptd("status", "--json", CKPTD_DAEMON=f"unix://{daemon.socket}")
    answer = json.loads(result.stdout)
    assert (result.returncode, result.stderr) == (0, "")
    assert answer["memory_bytes"] == 8 << 30
    assert answer["runs"][0]["incarnation"] == "3-0000000000000000"
    assert answer["runs"][0]["watermarks"]["staged"] == 120
    assert answer["runs"][0]["watermarks"]["durable"] is None
    assert answer["runs"][0]["parent"] is None
    assert answer["slots"][0]["snapshot"]["step"] == 120
    assert answer["problems"] == []


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_status_of_a_daemon_less_than_whole_exits_3(daemon: FakeDaemon, ckptd: Ckptd, flags: tuple[str, ...]) -> None:
    answer = status_answer()
    answer.problems.append("no new slots: memory is short")
    daemon.operator.answers["GetStatus"] = answer
    result = ckptd("status", "--socket", daemon.socket, *flags)
    assert result.returncode == 3
    assert "no new slots: memory is short" in result.stdout

    answer = status_answer()
    answer.tiers.add(url="file:///b", scope="node", is_healthy=False, problem="read-only")
    daemon.operator.answers["GetStatus"] = answer
    result = ckptd("status", "--socket", daemon.socket, *flags)
    assert result.returncode == 3
    assert "read-only" in result.stdout


# --- ls, show -----------------------------------------------------------------------------------------------------
def test_ls_lists_runs_and_then_checkpoints(daemon: FakeDaemon, ckptd: Ckptd) -> None:
    rows = [row(120), row(100, "file:///ckpt", "durable", parent=row(60).snapshot)]
    daemon.operator.answers["ListCheckpoints"] = pb.ListCheckpointsResponse(rows=rows)
    runs = ckptd("ls", "--socket", daemon.socket)
    assert runs.returncode == 0
    assert runs.stdout.splitlines()[0].split()[:3] == ["RUN", "NEWEST", "STEP"]
    steps = ckptd("ls", "gpt", "--socket", daemon.socket)
    assert [line.split()[:4] for line in steps.stdout.splitlines()[1:]] == [
        ["120", "3-00000000000000ab", "staged", "memory"],
        ["100", "3-00000000000000ab", "durable", "file:///ckpt"],
    ]
    assert steps.stdout.splitlines()[2].endswith("60@3")
    assert [request.run for request in daemon.operator.requests] == ["", "gpt"]


def test_ls_as_json(daemon: FakeDaemon, ckptd: Ckptd) -> None:
    daemon.operator.answers["ListCheckpoints"] = pb.ListCheckpointsResponse(rows=[row(120)])
    (checkpoint,) = json.loads(ckptd("ls", "gpt", "--json", "--socket", daemon.socket).stdout)["checkpoints"]
    assert checkpoint["snapshot"] == {"incarnation": "3-00000000000000ab", "step": 120}
    assert "runs" in json.loads(ckptd("ls", "--json", "--socket", daemon.socket).stdout)


def test_ls_without_any_run_is_an_empty_table(daemon: FakeDaemon, ckptd: Ckptd) -> None:
    daemon.operator.answers["ListCheckpoints"] = pb.ListCheckpointsResponse()
    result = ckptd("ls", "--socket", daemon.socket)
    assert (result.returncode, len(result.stdout.splitlines())) == (0, 1)


def test_an_unknown_run_exits_5_whether_the_daemon_refuses_or_knows_nothing(daemon: FakeDaemon, ckptd: Ckptd) -> None:
    daemon.operator.answers["ListCheckpoints"] = UnknownRun("no run 'nope'")
    result = ckptd("ls", "nope", "--socket", daemon.socket, "--json")
    assert result.returncode == 5
    assert json.loads(result.stdout)["error"]["name"] == "UnknownRun"
    assert result.stderr.splitlines() == [
        "ckptd: error: no run 'nope'",
        "hint: `ckptd ls` lists the runs this daemon and its tiers know",
    ]
    daemon.operator.answers["ListCheckpoints"] = pb.ListCheckpointsResponse()
    assert ckptd("ls", "nope", "--socket", daemon.socket).returncode == 5


def test_show_gives_copies_and_the_first_tensors(daemon: FakeDaemon, ckptd: Ckptd) -> None:
    answer = pb.ShowCheckpointResponse(copies=[row()])
    for index in range(60):
        answer.tensors.add(name=f"layer.{index}", dtype="bfloat16", global_shape=[4, 8], ranks=[0, 1, 2, 5])
    answer.tensors[0].global_shape[:] = []
    daemon.operator.answers["ShowCheckpoint"] = answer
    lines = ckptd("show", "gpt", "100", "--socket", daemon.socket).stdout.splitlines()
    assert [line.split() for line in lines if line.startswith("layer.")][:2] == [
        ["layer.0", "bfloat16", "scalar", "0-2,5"],
        ["layer.1", "bfloat16", "4x8", "0-2,5"],
    ]
    assert sum(line.startswith("layer.") for line in lines) == 50
    assert lines[-1] == "... 50 of 60 tensors; --json lists all"
    full = json.loads(ckptd("show", "gpt", "100", "--json", "--socket", daemon.socket).stdout)
    assert len(full["tensors"]) == 60
    assert full["tensors"][1] == {
        "name": "layer.1",
        "dtype": "bfloat16",
        "global_shape": [4, 8],
        "ranks": [0, 1, 2, 5],
    }


def test_show_of_a_step_without_a_copy_exits_5(daemon: FakeDaemon, ckptd: Ckptd) -> None:
    daemon.operator.answers["ShowCheckpoint"] = pb.ShowCheckpointResponse()
    assert ckptd("show", "gpt", "7", "--socket", daemon.socket).returncode == 5


# --- verify -------------------------------------------------------------------------------------------------------
WHERE = "in this node's memory, its parity and the tiers"


def test_verify_without_findings_exits_0(daemon: FakeDaemon, ckptd: Ckptd) -> None:
    daemon.operator.answers["Verify"] = [
        pb.VerifyResponse(bytes_done=1 << 20, bytes_total=3 << 20),
        pb.VerifyResponse(bytes_done=3 << 20, bytes_total=3 << 20, copies_checked=2),
    ]
    result = ckptd("verify", "gpt", "--socket", daemon.socket)
    assert (result.returncode, result.stdout) == (0, f"checked 2 copies, 3MiB, {WHERE}: no findings\n")
    assert not daemon.operator.requests[0].HasField("step")


def test_verify_lists_every_finding_once_and_exits_4(daemon: FakeDaemon, ckptd: Ckptd) -> None:
    finding = pb.Finding(source="memory", snapshot=row().snapshot, problem="rank 1 float32: block 17")
    daemon.operator.answers["Verify"] = [
        pb.VerifyResponse(bytes_done=1, findings=[finding]),
        pb.VerifyResponse(bytes_done=2, copies_checked=1, findings=[finding]),
    ]
    result = ckptd("verify", "gpt", "100", "--socket", daemon.socket)
    assert result.returncode == 4
    assert result.stdout.splitlines()[0] == f"checked 1 copy, 2B, {WHERE}: 1 finding"
    assert result.stdout.count("block 17") == 1
    assert daemon.operator.requests[0].step == 100
    result = ckptd("verify", "gpt", "--json", "--socket", daemon.socket)
    assert result.returncode == 4
    assert json.loads(result.stdout)["findings"][0]["problem"] == "rank 1 float32: block 17"


def test_verify_of_nothing_does_not_read_as_sound(daemon: FakeDaemon, ckptd: Ckptd) -> None:
    daemon.operator.answers["Verify"] = [pb.VerifyResponse()]
    assert ckptd("verify", "gpt", "--socket", daemon.socket).returncode == 5
    assert "step 9" in ckptd("verify", "gpt", "9", "--socket", daemon.socket).stderr


# --- prune --------------------------------------------------------------------------------------------------------
def plan(*, is_done: bool = False, problem: str = "") -> pb.PruneResponse:
    action = pb.PruneAction(
        verb="delete", checkpoint=row(60, "file:///ckpt", "durable"), reason="keep=5", is_done=is_done, problem=problem
    )
    return pb.PruneResponse(actions=[action])


def test_prune_shows_the_plan_and_does_nothing(daemon: FakeDaemon, ckptd: Ckptd) -> None:
    daemon.operator.answers["Prune"] = plan()
    result = ckptd("prune", "gpt", "--socket", daemon.socket)
    assert result.returncode == 0
    assert "planned" in result.stdout
    assert result.stdout.splitlines()[-1] == "this is the plan; --apply does it"
    assert not daemon.operator.requests[0].is_applied


def test_prune_applies_when_told_and_a_failure_exits_1(daemon: FakeDaemon, ckptd: Ckptd) -> None:
    daemon.operator.answers["Prune"] = plan(is_done=True)
    result = ckptd("prune", "gpt", "--apply", "--finish", "--socket", daemon.socket)
    assert (result.returncode, result.stdout.split()[-1]) == (0, "done")
    assert daemon.operator.requests[0].is_applied
    assert daemon.operator.requests[0].is_finish
    daemon.operator.answers["Prune"] = plan(problem="read-only file system")
    result = ckptd("prune", "gpt", "--apply", "--json", "--socket", daemon.socket)
    assert result.returncode == 1
    assert json.loads(result.stdout)["actions"][0]["problem"] == "read-only file system"


def test_prune_without_anything_to_do_says_so(daemon: FakeDaemon, ckptd: Ckptd) -> None:
    daemon.operator.answers["Prune"] = pb.PruneResponse()
    assert ckptd("prune", "gpt", "--socket", daemon.socket).stdout == "nothing to do\n"
    daemon.operator.answers["Prune"] = NoTier("this daemon has no tier")
    result = ckptd("prune", "gpt", "--socket", daemon.socket)
    assert (result.returncode, result.stderr.count("\n")) == (1, 2)
