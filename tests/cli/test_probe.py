"""What ``ckptd probe`` shows and how it exits, against a daemon whose answers are given."""

from __future__ import annotations

import json
import re

import pytest
from fake_daemon import Ckptd, FakeDaemon

from ckptd.errors import InvalidRequest
from ckptd_api.v1 import operator_pb2 as pb


def result(**verdict: object) -> pb.ProbeResult:
    """Two pairs, the second of which failed; with a verdict when one is given."""
    found = pb.ProbeResult()
    found.pairs.add(
        a="n1", b="n2", to_a_bytes_per_second=1.25e9, to_b_bytes_per_second=8.1e8, round_trip_seconds=0.00052
    )
    found.pairs.add(a="n3", b="n4", problem="n4 is away")
    if verdict:
        found.verdicts.add(**verdict)  # type: ignore[arg-type]
    return found


def answers(found: pb.ProbeResult) -> list[pb.ProbeResponse]:
    return [pb.ProbeResponse(phase="first round: 2 pairs"), pb.ProbeResponse(result=found)]


def lines_of(text: str) -> list[list[str]]:
    return [re.split(r"  +", line.strip()) for line in text.splitlines()]


def test_pairs_are_a_table_and_what_begins_is_said_beside_it(daemon: FakeDaemon, ckptd: Ckptd) -> None:
    daemon.operator.answers["Probe"] = answers(result())
    shown = ckptd("probe", "gpt", "--socket", daemon.socket)
    assert shown.returncode == 0
    lines = lines_of(shown.stdout)
    assert ["n1", "n2", "810 MB/s", "1.25 GB/s", "0.52 ms", "-"] in lines
    assert ["n3", "n4", "-", "-", "-", "n4 is away"] in lines
    assert lines[-1] == ["all alike: nothing is slow"]
    assert "first round: 2 pairs" in shown.stderr


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        (
            {"blame": "node", "nodes": ["n4"], "is_certain": True, "slowdown": 2.06},
            "slow node: n4, 2.1 times the median",
        ),
        ({"blame": "node", "nodes": ["n4"], "is_certain": True}, "unreachable node: n4"),
        (
            {"blame": "link", "nodes": ["n3", "n4"], "slowdown": 4.0},
            "slow link: n3 - n4, 4.0 times the median (or one of its ends: too few pairs to tell)",
        ),
        (
            {"blame": "compute", "nodes": ["n4"], "is_certain": True, "slowdown": 1.5},
            "slow cores: node n4, 1.5 times the median",
        ),
    ],
)
@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_what_is_slow_or_away_exits_3(
    daemon: FakeDaemon, ckptd: Ckptd, verdict: dict[str, object], said: str, flags: tuple[str, ...]
) -> None:
    daemon.operator.answers["Probe"] = answers(result(**verdict))
    shown = ckptd("probe", "gpt", "--socket", daemon.socket, *flags)
    assert shown.returncode == 3
    if flags:
        (told,) = json.loads(shown.stdout)["verdicts"]
        assert told == {"is_certain": False, "slowdown": None} | verdict
    else:
        assert said in shown.stdout.splitlines()


def test_cores_are_a_table_of_their_own_and_one_that_is_not_known_exits_3(daemon: FakeDaemon, ckptd: Ckptd) -> None:
    found = result()
    found.nodes.add(node_id="n1", product_seconds=0.0041, copy_seconds=0.00085)
    daemon.operator.answers["Probe"] = answers(found)
    shown = ckptd("probe", "gpt", "--compute", "--socket", daemon.socket)
    assert shown.returncode == 0
    assert ["n1", "4.1 ms", "0.85 ms", "-"] in lines_of(shown.stdout)
    assert daemon.operator.requests[-1].has_compute
    found.nodes.add(node_id="n2", problem="no daemon answers")
    daemon.operator.answers["Probe"] = answers(found)
    shown = ckptd("probe", "gpt", "--compute", "--socket", daemon.socket)
    assert shown.returncode == 3
    assert ["n2", "-", "-", "no daemon answers"] in lines_of(shown.stdout)


def test_what_was_verified_and_what_to_know_is_said(daemon: FakeDaemon, ckptd: Ckptd) -> None:
    found = result(blame="node", nodes=["n4"], is_certain=True, slowdown=2.0)
    found.verified.add(kind="slow_comm", ranks=[3], nodes=["n4"], confidence="verified")
    found.notes.append("the analyst could not be told")
    daemon.operator.answers["Probe"] = answers(found)
    shown = ckptd("probe", "gpt", "--socket", daemon.socket)
    assert {"verified: slow_comm of n4", "note: the analyst could not be told"} <= set(shown.stdout.splitlines())
    document = json.loads(ckptd("probe", "gpt", "--json", "--socket", daemon.socket).stdout)
    assert document["run"] == "gpt"
    assert document["verified"] == [{"kind": "slow_comm", "ranks": [3], "nodes": ["n4"]}]
    assert document["pairs"][1]["round_trip_seconds"] is None


def test_what_could_not_be_measured_does_not_read_as_well(daemon: FakeDaemon, ckptd: Ckptd) -> None:
    found = result()
    found.not_measured = 3
    daemon.operator.answers["Probe"] = answers(found)
    shown = ckptd("probe", "gpt", "--socket", daemon.socket)
    assert shown.returncode == 3
    assert "all alike" not in shown.stdout
    assert "no time was left for 3 of the measurements" in shown.stdout


def test_nodes_are_named_by_their_ids(daemon: FakeDaemon, ckptd: Ckptd) -> None:
    daemon.operator.answers["Probe"] = answers(result())
    assert ckptd("probe", "gpt", "--node", "n1", "--node", "n2", "--socket", daemon.socket).returncode == 0
    assert daemon.operator.requests == [pb.ProbeRequest(run="gpt", nodes=["n1", "n2"])]


@pytest.mark.parametrize(
    ("states", "found"),
    [
        ([], "no run is active here"),
        (["ended", "idle"], "no run is active here"),
        (["active", "active"], "2 runs are active here: run0, run1"),
    ],
)
def test_without_a_run_one_must_be_active(daemon: FakeDaemon, ckptd: Ckptd, states: list[str], found: str) -> None:
    status = pb.GetStatusResponse()
    for number, state in enumerate(states):
        status.runs.add(run=f"run{number}", state=state)
    daemon.operator.answers["GetStatus"] = status
    refused = ckptd("probe", "--socket", daemon.socket)
    assert refused.returncode == 2
    assert found in refused.stderr
    assert "ckptd probe RUN" in refused.stderr


def test_the_only_active_run_is_probed(daemon: FakeDaemon, ckptd: Ckptd) -> None:
    status = pb.GetStatusResponse()
    status.runs.add(run="old", state="ended")
    status.runs.add(run="gpt", state="active").incarnation.ordinal = 3
    status.runs.add(run="gpt", state="active").incarnation.ordinal = 4
    daemon.operator.answers |= {"GetStatus": status, "Probe": answers(result())}
    assert json.loads(ckptd("probe", "--json", "--socket", daemon.socket).stdout)["run"] == "gpt"


def test_a_refusal_and_a_daemon_that_is_away_are_one_line(daemon: FakeDaemon, ckptd: Ckptd) -> None:
    daemon.operator.answers["Probe"] = lambda _request: InvalidRequest("run gpt is on one node")
    refused = ckptd("probe", "gpt", "--socket", daemon.socket)
    assert refused.returncode == 2
    assert "ckptd: error: run gpt is on one node" in refused.stderr.splitlines()
    assert ckptd("probe", "gpt", "--socket", "/nope/d.sock").returncode == 6
