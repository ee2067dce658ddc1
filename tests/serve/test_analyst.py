"""What an analyst tells every node that reports: seldom made anew, never stale, and never more than a screenful."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from ckptd.detect.faultlog import Family
from ckptd.detect.records import Fault, Kind
from ckptd.errors import InstanceChanged, InvalidRequest
from ckptd.model import Incarnation, Roster, RosterEntry
from ckptd.serve.diagnosis import messages
from ckptd.serve.diagnosis.analyst import TOLD_S, Analyst
from ckptd.serve.diagnosis.messages import MOST_RESOLVED, run_faults
from ckptd_api.v1 import coordinator_pb2, faults_pb2

INCARNATION = Incarnation(2, 0xAB)


def roster(*nodes: str, version: int = 1) -> Roster:
    entries = tuple(RosterEntry(rank, node, f"{node}:1", 7) for rank, node in enumerate(nodes))
    return Roster(version=version, incarnation_id=INCARNATION.id, block_bytes=1 << 20, entries=entries)


def analyst(nodes: Sequence[str] = ("n0", "n0", "n1", "n1")) -> Analyst:
    return Analyst("gpt", INCARNATION, roster(*nodes), lambda _: None)


def report(node: str, *ranks: int) -> coordinator_pb2.ReportRanksRequest:
    request = coordinator_pb2.ReportRanksRequest(run="gpt", node_id=node)
    for rank in ranks:
        item = request.ranks.add(rank=rank)
        item.heartbeat.step = 1
        item.coverage.source = "dispatcher"
    return request


def told(by: Analyst, now_s: float, node: str = "n0", is_judging: bool = True) -> faults_pb2.RunFaults:
    return run_faults(by, node, is_judging, now_s, 1000.0 + now_s)


def die(by: Analyst, rank: int, now_s: float) -> None:
    """A report of a rank that is gone, looked at once it is settled who was first."""
    request = report("n1", 2, 3)
    next(item for item in request.ranks if item.rank == rank).is_dead = True
    by.take(request, now_s)
    by.tick(now_s)
    by.tick(now_s + 2.0)


def test_what_is_told_is_made_once_a_second_however_many_nodes_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(Analyst, "problems", lambda self: made.append(1) or [])
    here = analyst()
    for at in range(100):
        told(here, 5.0 + at * TOLD_S / 50)
    assert len(made) == 2


def test_it_is_time_for_a_look_once_every_node_has_reported_since_the_last() -> None:
    here = analyst()
    here.take(report("n1", 2, 3), 0.0)
    assert not here.is_complete
    here.take(report("n0", 0, 1), 0.1)
    assert here.is_complete
    here.tick(0.2)
    assert not here.is_complete


def test_a_fault_is_told_at_once() -> None:
    here = analyst()
    assert not told(here, 0.0).faults
    die(here, 3, 0.0)
    assert [list(row.ranks) for row in told(here, 0.1).faults] == [[3]]


def test_what_stands_still_is_told_also_when_what_is_slow_cannot_be_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    here = analyst()
    here._has_news = True

    def fail(*args: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(here._judge, "weigh", fail)
    monkeypatch.setattr(here._judge, "look", lambda *args: True)
    changes = []
    here._on_change = changes.append
    with pytest.raises(ZeroDivisionError):
        here.tick(0.0)
    assert changes == [here]


def test_who_was_heard_of_is_told_within_a_second() -> None:
    here = analyst()
    assert told(here, 0.0).coverage.ranks_heard == 0
    here.take(report("n1", 2, 3), 0.1)
    assert told(here, TOLD_S).coverage.ranks_heard == 2


def test_a_daemon_that_comes_to_judge_says_so_at_once() -> None:
    here = analyst()
    assert not told(here, 0.0, is_judging=False).coverage.is_judging
    assert told(here, 0.0, is_judging=True).coverage.analyst == "n0"


def test_nothing_new_is_the_same_version() -> None:
    here = analyst()
    assert told(here, 0.0).version == told(here, 10.0).version


def test_of_the_faults_that_are_over_the_newest_are_told() -> None:
    here = analyst()
    log = here._judge.log
    for at in range(100):
        fault = Fault(Kind.SLOW_LINK, (), ("n0",), since_step=at, evidence={"at": at})
        log.update(Family.COMMUNICATION, [fault], float(at))
        for _ in range(Family.COMMUNICATION.value):
            log.update(Family.COMMUNICATION, [], float(at))
    log.update(Family.COMPUTE, [Fault(Kind.SLOW_COMPUTE, (1,))], 200.0)
    rows = told(here, 200.0).faults
    assert [row.since_step for row in rows[:-1]] == list(range(100 - MOST_RESOLVED, 100))
    assert (rows[-1].kind, rows[-1].resolved_s) == ("slow_compute", 0.0)
    assert json.loads(rows[0].evidence) == {"at": 100 - MOST_RESOLVED}


def test_a_report_does_not_look_through_the_roster(monkeypatch: pytest.MonkeyPatch) -> None:
    here = analyst([f"n{rank // 8}" for rank in range(64)])

    def scanned(self: Roster, node_id: str) -> tuple[int, ...]:
        raise AssertionError("the whole roster was looked through")

    monkeypatch.setattr(Roster, "ranks_of", scanned)
    monkeypatch.setattr(messages, "_run_faults", scanned)
    here.take(report("n7", *range(56, 64)), 0.0)
    assert here.ranks_heard() == 8


def test_ranks_are_those_of_the_newest_roster() -> None:
    here = analyst()
    with pytest.raises(InvalidRequest, match="node n0 has no rank 2"):
        here.take(report("n0", 2), 0.0)
    here.renew(roster("n0", "n0", "n0", "n2", version=2))
    here.take(report("n0", 2), 0.0)
    with pytest.raises(InstanceChanged, match="node n1 is not in version 2"):
        here.take(report("n1", 3), 0.0)
