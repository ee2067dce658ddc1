"""A picture is asked of any daemon of a run and made by the one that judges it; without one it is said why."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ckptd.errors import DaemonUnreachable, InvalidRequest, UnknownRun
from ckptd.format.timings import SELF, pack
from ckptd.model import Incarnation, Roster, RosterEntry
from ckptd.serve.diagnosis.analyst import Analyst
from ckptd.serve.diagnosis.pictures import find_pictures, only_run, pictures_here
from ckptd_api.convert import incarnation_from_pb
from ckptd_api.v1 import coordinator_pb2, faults_pb2

RUN = "gpt"
INCARNATION = Incarnation(2, 0xAB)
ROSTER = Roster(
    version=1,
    incarnation_id=INCARNATION.id,
    block_bytes=1 << 20,
    entries=tuple(RosterEntry(rank, f"n{rank}", f"host{rank}:1", 7) for rank in range(2)),
)


def analyst_of(steps: int) -> Analyst:
    """One that was told ``steps`` steps of both ranks."""
    analyst = Analyst(RUN, INCARNATION, ROSTER, lambda _: None)
    for rank in range(2):
        rows = np.zeros(steps, SELF)
        rows["step"] = np.arange(steps)
        rows["length_s"], rows["self_s"] = 1.0, 0.5 + rank
        report = coordinator_pb2.ReportRanksRequest(run=RUN, node_id=f"n{rank}")
        report.ranks.add(rank=rank, steps=pack(rows))
        analyst.take(report, 0.0)
    return analyst


class FakeNode:
    """A daemon as the handlers see it; ``others`` answer at their addresses."""

    def __init__(self, node_id: str, analyst: Analyst | None = None, coverage: Any = None, **others: FakeNode) -> None:
        self.node_id = node_id
        self.asked: list[str] = []
        self._others = others
        newest = None if coverage is None else (INCARNATION, coverage)
        self.diagnosis = SimpleNamespace(
            newest=lambda run: newest if run == RUN else None,
            analyst=lambda run, incarnation: analyst if (run, incarnation) == (RUN, INCARNATION) else None,
        )
        self.peering = SimpleNamespace(channels=SimpleNamespace(peer=self._peer))

    def find_run(self, run: str, incarnation: Incarnation) -> Any:
        return SimpleNamespace(roster=ROSTER) if (run, incarnation) == (RUN, INCARNATION) else None

    def _peer(self, address: str) -> Any:
        def call(method: str, request: Any, timeout_s: float) -> Any:
            self.asked.append(address)
            node = self._others.get(address.split(":")[0])
            if node is None:
                raise DaemonUnreachable(f"no daemon at {address}")
            return pictures_here(node, request.run, incarnation_from_pb(request.incarnation))  # type: ignore[arg-type]

        return SimpleNamespace(call=call, coordinator=SimpleNamespace(GetPictures="GetPictures"))


def judged_by(node_id: str) -> faults_pb2.RunCoverage:
    return faults_pb2.RunCoverage(run=RUN, analyst=node_id, is_judging=bool(node_id))


def find(node: FakeNode) -> Any:
    return find_pictures(node, RUN)  # type: ignore[arg-type]


def test_the_daemon_that_judges_draws_itself() -> None:
    node = FakeNode("n0", analyst_of(20), judged_by("n0"))
    answer = find(node)
    document = json.loads(answer.pictures)
    assert (answer.analyst, node.asked) == ("n0", [])
    assert (document["run"], document["incarnation"]) == (RUN, str(INCARNATION))
    assert [row["node"] for row in document["steps"]["rows"]] == ["n0", "n1"]
    assert document["steps"]["steps"] == list(range(20))


def test_another_daemon_asks_the_one_that_judges() -> None:
    judging = FakeNode("n1", analyst_of(20), judged_by("n1"))
    node = FakeNode("n0", None, judged_by("n1"), host1=judging)
    answer = find(node)
    assert (answer.analyst, node.asked) == ("n1", ["host1:1"])
    assert answer.pictures == find(judging).pictures


@pytest.mark.parametrize(
    ("node", "words"),
    [
        (FakeNode("n0"), "no rank reports timings"),
        (FakeNode("n0", None, judged_by("")), "nobody judges it"),
        (FakeNode("n0", None, judged_by("n0")), "does not judge it any more"),
        (FakeNode("n0", None, judged_by("n9")), "not in it any more"),
        (FakeNode("n0", analyst_of(0), judged_by("n0")), "no step of it is known"),
    ],
)
def test_a_run_that_cannot_be_drawn_is_not_found_and_it_is_said_why(node: FakeNode, words: str) -> None:
    with pytest.raises(UnknownRun, match=words):
        find(node)


def test_an_analyst_that_does_not_answer_is_an_error_of_its_own() -> None:
    with pytest.raises(DaemonUnreachable, match="host1:1"):
        find(FakeNode("n0", None, judged_by("n1")))


def test_without_a_name_the_only_run_is_meant() -> None:
    node: Any = FakeNode("n0", None, judged_by("n0"))
    assert only_run(node, ["other", RUN]) == RUN
    with pytest.raises(UnknownRun, match="no run reports timings"):
        only_run(node, ["other"])
    with pytest.raises(InvalidRequest, match=f"{RUN}, {RUN}"):
        only_run(node, [RUN, RUN])
