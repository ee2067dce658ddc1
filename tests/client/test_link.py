"""Ranks that are threads, one store, daemons that are objects: who joins when, and what everybody is told of a change.

Every rank's ``Link`` runs its own threads, as in a job; only the daemons' answers are made up.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from fake_job import SOON_S, FakeDaemon, Job
from processes import wait_until

from ckptd.errors import DaemonUnreachable, InvalidRequest, RendezvousTimeout, RestoreUndecided
from ckptd.model import Roster
from ckptd_api.v1 import node_pb2
from ckptd_client import link as link_module
from ckptd_client.arguments import protection
from ckptd_client.board import Board, LocalBoard, StoreBoard
from ckptd_client.checkpointer import _unprotected
from ckptd_client.engine import CaptureEngine
from ckptd_client.restoring import Restoration, refuse


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look often, so that a test need not take seconds."""
    monkeypatch.setattr(link_module, "LOOK_S", 0.02)
    monkeypatch.setattr(link_module, "FIRST_S", 0.1)
    monkeypatch.setattr(link_module, "_BACKOFF_S", (0.01, 0.02))


@pytest.fixture
def job(request: pytest.FixtureRequest) -> Iterator[Callable[..., Job]]:
    """Starts jobs; they are closed after the test."""
    jobs: list[Job] = []

    def start(*daemons: FakeDaemon, board: Board | None = None, protect: str = "auto") -> Job:
        jobs.append(Job(list(daemons), board, protect))
        jobs[-1].start()
        return jobs[-1]

    yield start
    for started in jobs:
        started.close()


def store() -> Board:
    return StoreBoard(
        dist.TCPStore("127.0.0.1", 0, None, is_master=True, timeout=timedelta(seconds=30), wait_for_workers=False)
    )


def nodes(roster: Roster) -> list[str]:
    return [entry.node_id for entry in roster.entries]


# --- start ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("make_board", [LocalBoard, store])
def test_ranks_on_many_nodes_join_their_own_daemons_with_one_roster(
    job: Callable[..., Job], make_board: Callable[[], Board]
) -> None:
    daemons = [FakeDaemon(name) for name in "abc"]
    daemons[0].ordinal = 4
    started = job(*daemons, board=make_board(), protect="2+1")
    started.wait_joined()
    roster = started.wait_version(1)
    assert (nodes(roster), roster.protect, roster.from_step) == (["a", "b", "c"], "2+1", 0)
    assert {daemon.joins[0].incarnation.ordinal for daemon in daemons} == {5}
    assert [daemon.joins[0].rank for daemon in daemons] == [0, 1, 2]
    surveys = [request for method, request in daemons[0].calls if method == "Survey"]
    assert [[entry.node_id for entry in survey.entries] for survey in surveys] == [["a", "b", "c"]]


def test_a_second_start_in_the_same_store_is_another_incarnation(job: Callable[..., Job]) -> None:
    board = store()
    first = job(FakeDaemon("a"), FakeDaemon("b"), board=board)
    first.wait_joined()
    first.close()
    second = job(FakeDaemon("c"), FakeDaemon("d"), board=board)
    second.wait_joined()
    before, after = first.wait_version(1), second.wait_version(1)
    assert (nodes(before), nodes(after)) == (["a", "b"], ["c", "d"])
    assert before.incarnation_id != after.incarnation_id


def test_a_link_that_is_closed_amid_the_meeting_goes_at_once() -> None:
    alone = Job([FakeDaemon("a"), FakeDaemon("b")])
    alone.links[0].start()
    started = time.monotonic()
    alone.links[0].close(5.0)
    assert time.monotonic() - started < 2.0


def test_a_meeting_that_never_comes_about_is_told_by_name(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckptd_client.membership.MEET_S", 0.1)
    alone = Job([FakeDaemon("a"), FakeDaemon("b")])
    alone.links[0].start()
    wait_until(lambda: "rank 1" in str(alone.links[0].problem), "rank 1 to be missed", SOON_S)
    assert isinstance(alone.links[0].problem_at(3), RendezvousTimeout)
    alone.links[0].close(5.0)


# --- ranks without a daemon -------------------------------------------------------------------------------------------
def test_a_rank_without_a_daemon_holds_nobody_up_and_joins_when_it_has_one(job: Callable[..., Job]) -> None:
    daemons = [FakeDaemon("a"), FakeDaemon("b", is_up=False), FakeDaemon("c")]
    started = job(*daemons)
    started.wait_joined(0, 2)
    assert nodes(started.wait_version(1)) == ["a", "", "c"]
    # No rank copies anything for a step that one cannot take.
    assert str(started.links[0].problem_at(1)) == "rank 1 has no daemon"
    wait_until(lambda: "no daemon answers" in str(started.links[1].problem_at(1)), "rank 1 to say why", SOON_S)

    started.pace = (100, 0.1)
    daemons[1].become()
    started.wait_joined(1)
    roster = started.wait_version(2)
    assert (nodes(roster), roster.from_step) == (["a", "b", "c"], 100 + 20 + 1)
    for link in started.links:
        assert str(link.problem_at(120)) == "rank 1 has no daemon"
        assert link.problem_at(121) is None
    assert [daemon.watches for daemon in daemons] == [1, 1, 1]
    assert [[join.roster.version for join in daemon.joins] for daemon in daemons] == [[1, 2], [2], [1, 2]]


def test_without_rank_0s_daemon_nobody_joins_until_it_comes(job: Callable[..., Job]) -> None:
    daemons = [FakeDaemon("a", is_up=False), FakeDaemon("b")]
    daemons[0].ordinal = 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(link_module, "ROSTER_S", 0.05)
        started = job(*daemons)
        wait_until(lambda: "rank 0 has no daemon" in str(started.links[1].problem), "the reason", SOON_S)
    daemons[0].become()
    started.wait_joined()
    assert nodes(started.wait_version(2)) == ["a", "b"]
    assert {link.incarnation.ordinal for link in started.links} == {3}
    assert [[join.roster.version for join in daemon.joins] for daemon in daemons] == [[2], [2]]
    assert all(link.problem_at(0) is None for link in started.links)


def test_a_rank_alone_waits_for_its_daemon_and_loses_no_step_to_a_version(job: Callable[..., Job]) -> None:
    daemon = FakeDaemon("a", is_up=False)
    started = job(daemon)
    wait_until(lambda: started.links[0].failures > 2, "some failures", SOON_S)
    daemon.become()
    started.wait_joined()
    assert nodes(started.wait_version(1)) == ["a"]
    started.pace = (41, 0.01)
    daemon.become(node_id="b")
    assert started.wait_version(2).from_step == 42
    started.wait_joined()
    assert started.links[0].problem_at(42) is None


# --- changes ----------------------------------------------------------------------------------------------------------
def test_a_daemon_that_restarts_changes_nothing(job: Callable[..., Job]) -> None:
    daemons = [FakeDaemon("a"), FakeDaemon("b")]
    started = job(*daemons)
    started.wait_joined()
    daemons[1].become()
    wait_until(lambda: daemons[1].watches == 2, "rank 1 to watch again", SOON_S)
    assert started.restarts == [1]
    assert [join.roster.version for join in daemons[1].joins] == [1, 1]


def test_a_new_address_is_told_to_all_and_holds_nobody_up(job: Callable[..., Job]) -> None:
    daemons = [FakeDaemon("a"), FakeDaemon("b")]
    started = job(*daemons)
    started.wait_joined()
    started.pace = (10, 1.0)
    daemons[1].become(address="elsewhere:2")
    roster = started.wait_version(2)
    assert roster.entries[1].address == "elsewhere:2"
    assert roster.from_step == 13
    assert all(link.problem_at(step) is None for link in started.links for step in (11, 13))


def test_a_new_node_takes_part_from_the_step_that_its_version_is_for(job: Callable[..., Job]) -> None:
    daemons = [FakeDaemon("a"), FakeDaemon("b")]
    started = job(*daemons)
    started.wait_joined()
    started.pace = (10, 1.0)
    daemons[1].become(node_id="new")
    assert nodes(started.wait_version(2)) == ["a", "new"]
    started.wait_joined()
    assert "another node" in str(started.links[1].problem_at(12))
    assert started.links[0].problem_at(12) is None
    assert [link.problem_at(13) for link in started.links] == [None, None]


def test_two_changes_at_once_both_arrive(job: Callable[..., Job]) -> None:
    daemons = [FakeDaemon(name) for name in "abcd"]
    started = job(*daemons)
    started.wait_joined()
    started.pace = (10, 0.5)
    daemons[1].become(node_id="x")
    daemons[3].become(node_id="y")
    wait_until(
        lambda: all(
            link.membership and nodes(link.membership.roster) == ["a", "x", "c", "y"] for link in started.links
        ),
        "both nodes in the roster of all",
        SOON_S,
    )
    started.wait_joined()
    version = max(link.membership.roster.version for link in started.links if link.membership)
    assert version in (2, 3)
    for number in range(2, version + 1):
        assert started.wait_version(number).from_step == 10 + 4 + 1


def test_rank_0_changes_like_any_other(job: Callable[..., Job]) -> None:
    daemons = [FakeDaemon("a"), FakeDaemon("b"), FakeDaemon("c")]
    started = job(*daemons)
    started.wait_joined()
    started.pace = (7, 2.0)
    daemons[0].become(node_id="moved")
    roster = started.wait_version(2)
    assert (roster.coordinator.node_id, roster.from_step) == ("moved", 9)
    started.wait_joined()
    assert {daemon.joins[-1].incarnation.ordinal for daemon in daemons} == {1}


def test_word_of_a_new_version_in_the_watermarks_is_followed_at_once(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "LOOK_S", 1000.0)
    daemons = [FakeDaemon("a"), FakeDaemon("b")]
    started = job(*daemons)
    started.wait_joined()
    daemons[0].become(address="elsewhere:2")  # rank 0 publishes what it changed itself at once
    wait_until(lambda: (known := daemons[0].known) is not None and known.version == 2, "rank 0 to publish", SOON_S)
    assert daemons[1].known.version == 1  # type: ignore[union-attr]
    daemons[1].say(roster_version=2)
    started.wait_version(2)


def test_a_daemon_that_could_not_be_told_is_told_again(job: Callable[..., Job]) -> None:
    daemons = [FakeDaemon("a"), FakeDaemon("b")]
    started = job(*daemons)
    started.wait_joined()
    daemons[0].answers["Join"] = DaemonUnreachable("busy")
    daemons[1].become(address="elsewhere:2")
    refused = lambda: [request for method, request in daemons[0].calls if method == "Join"]  # noqa: E731
    wait_until(lambda: len(refused()) >= 3, "rank 0 to try again", SOON_S)
    assert started.links[0].problem is None
    del daemons[0].answers["Join"]
    started.wait_version(2)


class FragileBoard(LocalBoard):
    """A store that can be lost."""

    is_lost = False

    def get(self, key: str) -> bytes | None:
        if self.is_lost:
            raise RendezvousTimeout("the job's store does not answer")
        return super().get(key)


def test_a_store_that_is_gone_stops_no_snapshot(job: Callable[..., Job], caplog: pytest.LogCaptureFixture) -> None:
    board, daemons = FragileBoard(), [FakeDaemon("a"), FakeDaemon("b")]
    started = job(*daemons, board=board)
    started.wait_joined()
    board.is_lost = True
    wait_until(lambda: "the roster cannot change for now" in caplog.text, "a warning", SOON_S)
    daemons[1].say(staged=3)
    assert all(link.problem_at(3) is None for link in started.links)
    board.is_lost = False
    daemons[1].become(address="elsewhere:2")
    started.wait_version(2)


def test_a_slot_is_begun_with_the_version_in_force_at_its_step(job: Callable[..., Job]) -> None:
    daemons = [FakeDaemon("a"), FakeDaemon("b")]
    started = job(*daemons)
    started.wait_joined()
    started.pace = (10, 1.0)
    daemons[1].become(address="elsewhere:2")
    assert started.wait_version(2).from_step == 13
    engine = CaptureEngine(started.links[0], None)
    for step in (12, 13):
        plan = SimpleNamespace(segments=())
        capture: Any = SimpleNamespace(
            snapshot=SimpleNamespace(step=step), plan=plan, index=b"", is_persisted=False, failed=None
        )
        engine._begin(capture)
    engine.close(1.0)
    begun = [request for method, request in daemons[0].calls if method == "Begin"]
    assert [(request.step, request.roster_version) for request in begun] == [(12, 1), (13, 2)]


# --- protection -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("wish", ["off", "auto", "4+2"])
def test_a_wish_for_protection_that_can_be_is_taken(wish: str) -> None:
    assert protection(wish) == wish


@pytest.mark.parametrize("wish", ["", "on", "4", "4+0", "0+1", "200+60", "Auto", None, 2])
def test_a_wish_for_protection_that_cannot_be_is_refused(wish: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"protect="):
        protection(wish)


def test_it_is_known_early_when_nothing_can_be_protected(job: Callable[..., Job]) -> None:
    one = [FakeDaemon("a"), FakeDaemon("a")]
    two = [FakeDaemon("a"), FakeDaemon("b")]
    found = [job(*one), job(*two), job(*[FakeDaemon("a"), FakeDaemon("b")], protect="off")]
    reasons = [_unprotected(started.wait_version(1)) for started in found]
    assert reasons == ["the run has one node: there is no peer to hold parity", "", "protect is off"]


def test_pending_snapshots_are_told_of_their_incarnation(job: Callable[..., Job]) -> None:
    started = job(FakeDaemon("a"), FakeDaemon("b"))
    started.wait_joined()
    ids = {link.pending.incarnation_id for link in started.links}
    assert ids == {started.wait_version(1).incarnation_id}


# --- restore ----------------------------------------------------------------------------------------------------------
def restoration(job: Job, rank: int) -> Restoration:
    return Restoration(job.links[rank], job.board, {}, 1)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_cannot_take_part_in_a_restore_makes_the_others_raise(
    job: Callable[..., Job], failing: int
) -> None:
    daemons = [FakeDaemon("a"), FakeDaemon("b")]
    daemons[0].answers["ListCandidates"] = node_pb2.ListCandidatesResponse()
    started = job(*daemons)
    started.wait_joined()
    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(restoration(started, 1 - failing).run, None, None)
        refuse(started.links[failing], started.board, 1, RestoreUndecided("no answer from the daemon"))
        with pytest.raises(RestoreUndecided, match="no answer from the daemon"):
            other.result(SOON_S)
    assert not any(method == "Decide" for method, _ in daemons[0].calls)


def test_a_rank_that_has_not_met_the_others_refuses_in_silence() -> None:
    alone = Job([FakeDaemon("a"), FakeDaemon("b")])
    refuse(alone.links[0], alone.board, 1, RestoreUndecided("no answer from the daemon"))


@pytest.mark.parametrize(
    ("wanted", "found"),
    [("tier", ["s3://b/2"]), ("memory", ["memory", "memory"]), (None, ["", ""]), ("s3://b/2", ["s3://b/2"] * 2)],
)
def test_a_source_names_where_each_candidate_is_fetched_from(
    job: Callable[..., Job], caplog: pytest.LogCaptureFixture, wanted: str | None, found: list[str]
) -> None:
    daemon = FakeDaemon("a")
    sources = [["memory", "peer", "reconstruction"], ["memory", "s3://b/2", "file:///c"]]
    candidates = [node_pb2.Candidate(sources=s) for s in sources]
    notes = ["step 9 was lost with nodes b and c"]
    daemon.answers["ListCandidates"] = node_pb2.ListCandidatesResponse(candidates=candidates, notes=notes)
    started = job(daemon)
    started.wait_joined()
    with caplog.at_level(logging.WARNING):
        proposals = list(
            itertools.takewhile(lambda p: "source" in p, restoration(started, 0)._candidates(None, wanted))
        )
    assert [proposal["source"] for proposal in proposals] == found
    assert "step 9 was lost with nodes b and c" in caplog.text
    asked = next(request for method, request in daemon.calls if method == "ListCandidates")
    assert asked.source == ("" if wanted in (None, "tier") else wanted)
