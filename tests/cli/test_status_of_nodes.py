"""What ``status``, ``ls`` and ``verify`` say of a run over several nodes: from given answers, and from real daemons."""

from __future__ import annotations

import json
import re

import pytest
from fake_daemon import Ckptd, FakeDaemon, row
from harness import Stage, wait_until
from shard_ranks import ShardJob

from ckptd_api.v1 import operator_pb2 as pb


def protected_run(
    *, losses: int | None = 2, silent: tuple[str, ...] = (), state: str = "active"
) -> pb.GetStatusResponse:
    answer = pb.GetStatusResponse(version="0.1.0", node_id="n1", pid=77, memory_bytes=1 << 30, arena="/dev/shm/x")
    run = answer.runs.add(run="gpt", world_size=96, owner="ann", state=state, roster_version=3)
    run.incarnation.ordinal = 3
    for group in range(5):
        run.groups.add(k=6 if group < 4 else 7, m=2, node_ids=["a", "b"])
    run.watermarks.staged = 130
    if losses is not None:
        run.watermarks.protected = 120
        run.watermarks.losses_tolerated = losses
        run.watermarks.parity_of.step = 120
        run.watermarks.parity_of.incarnation.ordinal = 3
    run.watermarks.silent_nodes.extend(silent)
    return answer


# --- status -------------------------------------------------------------------------------------------------------
def test_status_shows_how_a_run_is_protected(daemon: FakeDaemon, ckptd: Ckptd) -> None:
    answer = protected_run()
    answer.runs[0].protection_note = "6+2 asked, 41 nodes: tolerance 2"
    answer.runs.add(run="alone", world_size=1, owner="ann", state="active")
    answer.parity.add(
        run="gpt", state="sealed", geometry="6+2", stripe=7, row=1, size_bytes=3 << 20
    ).snapshot.step = 120
    answer.parity.add(run="gpt", state="free", size_bytes=1 << 20)
    daemon.operator.answers["GetStatus"] = answer
    result = ckptd("status", "--socket", daemon.socket)
    assert result.returncode == 0
    lines = [re.split(r"  +", line.strip()) for line in result.stdout.splitlines()]
    assert ["gpt", "3-0000000000000000", "3", "4 x 6+2, 1 x 7+2", "120@3", "2", "0"] in lines
    assert ["note: gpt: 6+2 asked, 41 nodes: tolerance 2"] in lines
    assert ["gpt", "sealed", "120", "6+2", "7", "1", "3MiB"] in lines
    assert ["gpt", "free", "-", "-", "-", "-", "1MiB"] in lines
    assert sum(line[0] == "alone" for line in lines) == 1  # it has no groups: nothing to say of its protection


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (protected_run(losses=1), 0),
        (protected_run(losses=0), 3),
        (protected_run(losses=-1), 3),
        (protected_run(losses=None), 0),  # nothing was protected yet
        (protected_run(losses=1, silent=("n7",)), 3),
        (protected_run(losses=0, silent=("n7",), state="ended"), 0),
    ],
)
def test_status_of_a_run_at_risk_exits_3(
    daemon: FakeDaemon, ckptd: Ckptd, answer: pb.GetStatusResponse, code: int
) -> None:
    daemon.operator.answers["GetStatus"] = answer
    assert ckptd("status", "--socket", daemon.socket).returncode == code


def test_status_names_some_of_the_silent_nodes(daemon: FakeDaemon, ckptd: Ckptd) -> None:
    daemon.operator.answers["GetStatus"] = protected_run(silent=("n2", "n3", "n5", "n8", "n9"))
    assert "silent: gpt: n2, n3, n5 and 2 more\n" in ckptd("status", "--socket", daemon.socket).stdout


# --- verify -------------------------------------------------------------------------------------------------------
def test_what_verify_could_not_check_is_a_note_and_no_finding(daemon: FakeDaemon, ckptd: Ckptd) -> None:
    note = pb.Finding(source="parity", problem="step 100, stripe 0 row 0 of 1+1: not held against its data: gone")
    daemon.operator.answers["Verify"] = [
        pb.VerifyResponse(bytes_done=1, findings=[note]),
        pb.VerifyResponse(bytes_done=2, copies_checked=2),
    ]
    result = ckptd("verify", "gpt", "--socket", daemon.socket)
    assert result.returncode == 0
    assert result.stdout.splitlines()[1] == f"note: {note.problem}"
    plain = json.loads(ckptd("verify", "gpt", "--json", "--socket", daemon.socket).stdout)
    assert (plain["findings"], plain["notes"]) == ([], [note.problem])
    wrong = pb.Finding(source="parity", snapshot=row().snapshot, problem="stripe 0 row 0 of 1+1: block 3")
    daemon.operator.answers["Verify"] = [pb.VerifyResponse(copies_checked=1, findings=[note, wrong])]
    assert ckptd("verify", "gpt", "--socket", daemon.socket).returncode == 4


# --- real daemons -------------------------------------------------------------------------------------------------
def test_ls_and_status_of_a_node_tell_what_the_whole_run_has_reached(stage: Stage) -> None:
    nodes = [stage.daemon(listen=True, wait=False) for _ in range(2)]
    for node in nodes:
        node.wait_ready()
    off = ShardJob(nodes, run="off", protect="off")
    off.save(1, ranks=[0])
    assert [(r["state"], r["source"]) for r in nodes[0].rows("off")] == [("partial", "memory")]
    assert nodes[0].findings("off") == []
    off.save(2)
    for node in nodes:
        wait_until(lambda node=node: node.steps("off", state="staged") == [2], "step 2 to be staged here")  # type: ignore[misc]
    on = ShardJob(nodes, run="on", protect="1+1")
    on.save(1)
    on.wait_protected(1)
    for node in nodes:
        wait_until(lambda node=node: node.steps("on", state="protected") == [1], "step 1 to be protected here")  # type: ignore[misc]
    rc, stdout, _ = nodes[1].cli("status")
    assert rc == 0
    assert re.search(r"^on .* 1 x 1\+1 +1@1 +1 +0$", stdout, re.MULTILINE), stdout
    assert re.search(r"^on +sealed +1 +1\+1 +1 +0 ", stdout, re.MULTILINE), stdout
    assert re.search(r"^ +1 +1-\w+ +protected +memory", nodes[1].cli("ls", "on").stdout, re.MULTILINE)
