"""Ranks that meet in the job's store: one roster for all, whatever lies there from before, and its later versions."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from processes import wait_until

from ckptd.errors import DaemonUnreachable, RendezvousTimeout
from ckptd.model import Roster, RosterEntry
from ckptd_api.v1 import node_pb2
from ckptd_client import membership
from ckptd_client.board import Board, LocalBoard, StoreBoard
from ckptd_client.membership import Meeting, Membership, entry_of
from ckptd_client.rosters import Publisher, Rosters, next_version

RUN = "run"
ESTIMATE = 1 << 20


def about(node: str, address: str = "") -> node_pb2.DescribeResponse:
    return node_pb2.DescribeResponse(node_id=node, address=address or f"{node}:1", domains={"rack": "r1", "a": "b"})


def fresh_entry(rank: int, node: str | None = None) -> RosterEntry:
    described = node_pb2.DescribeResponse() if node == "" else about(node or f"node{rank}")
    return entry_of(rank, described, ESTIMATE)


@pytest.fixture(params=["dictionary", "store"])
def board(request: pytest.FixtureRequest) -> Board:
    if request.param == "dictionary":
        return LocalBoard()
    store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, timeout=timedelta(seconds=30), wait_for_workers=False)
    return StoreBoard(store)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def meetings(board: Board, world_size: int) -> list[Meeting]:
    return [Meeting(board, RUN, rank, world_size) for rank in range(world_size)]


def begin(
    threads: ThreadPoolExecutor, ranks: Sequence[Meeting], entries: Sequence[RosterEntry], protect: str = "auto"
) -> list[Future[Roster]]:
    return [threads.submit(m.meet, entry, protect) for m, entry in zip(ranks, entries, strict=True)]


def meet(threads: ThreadPoolExecutor, board: Board, entries: Sequence[RosterEntry]) -> Roster:
    """The roster that all ranks took."""
    found = {f.result(10) for f in begin(threads, meetings(board, len(entries)), entries)}
    assert len(found) == 1
    return found.pop()


# --- the board --------------------------------------------------------------------------------------------------------
def test_a_counter_starts_at_nothing_and_is_read_as_digits(board: Board) -> None:
    assert board.get("n") is None
    assert [board.add("n", 1), board.add("n", 2)] == [1, 3]
    assert board.get("n") == b"3"


# --- the first roster -------------------------------------------------------------------------------------------------
def test_all_ranks_take_the_same_roster(board: Board, threads: ThreadPoolExecutor) -> None:
    entries = [fresh_entry(rank) for rank in range(3)]
    roster = meet(threads, board, entries)
    assert roster.entries == tuple(entries)
    assert (roster.version, roster.from_step, roster.protect) == (1, 0, "auto")
    assert list(roster.nodes) == ["node0", "node1", "node2"]


def test_the_wish_of_rank_0_is_that_of_the_roster(threads: ThreadPoolExecutor) -> None:
    first, second = meetings(LocalBoard(), 2)
    found = [threads.submit(first.meet, fresh_entry(0), "4+2"), threads.submit(second.meet, fresh_entry(1), "off")]
    assert [f.result(10).protect for f in found] == ["4+2", "4+2"]


def test_a_rank_without_a_daemon_takes_part(threads: ThreadPoolExecutor) -> None:
    roster = meet(threads, LocalBoard(), [fresh_entry(0), fresh_entry(1, node="")])
    assert [entry.node_id for entry in roster.entries] == ["node0", ""]
    assert roster.block_bytes > 0


def test_keys_of_an_earlier_start_do_no_harm(board: Board, threads: ThreadPoolExecutor) -> None:
    before = meet(threads, board, [fresh_entry(rank, f"old{rank}") for rank in range(3)])
    entries = [fresh_entry(rank) for rank in range(3)]
    after = meet(threads, board, entries)
    assert after.entries == tuple(entries)
    assert after.incarnation_id != before.incarnation_id


def test_a_rank_that_was_early_does_not_keep_the_stale_entry_of_a_late_one(threads: ThreadPoolExecutor) -> None:
    board = LocalBoard()
    meet(threads, board, [fresh_entry(rank, f"old{rank}") for rank in range(3)])
    ranks, entries = meetings(board, 3), [fresh_entry(rank) for rank in range(3)]
    early = begin(threads, ranks[:2], entries[:2])
    acknowledgement = f"/ack/1/{entries[1].nonce:016x}"
    wait_until(lambda: any(key.endswith(acknowledgement) for key in list(board._values)), "rank 1 to acknowledge")
    late = begin(threads, ranks[2:], entries[2:])
    assert {f.result(10).entries for f in (*early, *late)} == {tuple(entries)}


def test_deadlines_name_the_ranks_that_are_missing(
    threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "MEET_S", 0.2)
    first, second, _, _ = meetings(LocalBoard(), 4)
    led, followed = begin(threads, [first, second], [fresh_entry(0), fresh_entry(1)])
    with pytest.raises(RendezvousTimeout, match="no word from rank 2, 3 within"):
        led.result(10)
    with pytest.raises(RendezvousTimeout, match="no word from rank 0"):
        followed.result(10)


def test_a_rank_of_an_earlier_start_is_not_taken_for_one_of_this(
    threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = LocalBoard()
    meet(threads, board, [fresh_entry(rank) for rank in range(3)])
    monkeypatch.setattr(membership, "MEET_S", 0.2)
    led, followed = begin(threads, meetings(board, 3)[:2], [fresh_entry(0), fresh_entry(1)])
    with pytest.raises(RendezvousTimeout, match="no acknowledgement from rank 2 in time"):
        led.result(10)
    with pytest.raises(RendezvousTimeout, match="rank 0 still waits for other ranks"):
        followed.result(10)


def test_a_meeting_that_failed_is_taken_up_where_it_was(
    threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank came after the deadline: what the others acknowledged before is still good."""
    board = LocalBoard()
    meet(threads, board, [fresh_entry(rank) for rank in range(3)])
    ranks, entries = meetings(board, 3), [fresh_entry(rank) for rank in range(3)]
    monkeypatch.setattr(membership, "MEET_S", 0.2)
    for failed in begin(threads, ranks[:2], entries[:2]):
        assert isinstance(failed.exception(10), RendezvousTimeout)
    acknowledged = {key for key in board._values if key.endswith(f"/ack/1/{entries[1].nonce:016x}")}
    monkeypatch.setattr(membership, "MEET_S", 10.0)
    found = {f.result(10) for f in begin(threads, ranks, entries)}
    assert [roster.entries for roster in found] == [tuple(entries)]
    assert {f"ckptd/{RUN}/{roster.incarnation_id:016x}" for roster in found} == {
        k.split("/ack")[0] for k in acknowledged
    }


def test_a_meeting_that_is_stopped_ends_at_once(threads: ThreadPoolExecutor) -> None:
    """It must not lead the ranks of the next start, whose entries lie under the same keys."""
    ranks = meetings(LocalBoard(), 3)
    found = begin(threads, ranks[:2], [fresh_entry(0), fresh_entry(1)])
    for rank in ranks:
        rank.stop.set()
    assert [type(f.exception(1)) for f in found] == [RendezvousTimeout, RendezvousTimeout]


# --- the ordinal ------------------------------------------------------------------------------------------------------
class Oracle:
    """The part of a daemon that knows ordinals."""

    def __init__(self, highest: int, error: Exception | None = None) -> None:
        self.highest = highest
        self.error = error
        self.asked: list[node_pb2.SurveyRequest] = []

    def call(self, method: str, request: node_pb2.SurveyRequest, timeout_s: float) -> node_pb2.SurveyResponse:
        assert method == "Survey"
        self.asked.append(request)
        if self.error:
            raise self.error
        return node_pb2.SurveyResponse(highest_ordinal=self.highest)


def test_rank_0_asks_the_daemons_of_the_roster_and_tells_the_others(board: Board, threads: ThreadPoolExecutor) -> None:
    ranks, roster, oracle = meetings(board, 2), first_roster(), Oracle(6)
    waiting: Future[int] = threads.submit(ranks[1].ordinal, Oracle(99), roster)  # type: ignore[arg-type]
    assert ranks[0].ordinal(oracle, roster) == 7  # type: ignore[arg-type]
    assert waiting.result(5) == 7
    assert [entry.address for entry in oracle.asked[0].entries] == ["node0:1", "node1:1"]


def test_an_ordinal_that_was_told_is_not_asked_for_again() -> None:
    ranks, roster = meetings(LocalBoard(), 2), first_roster()
    assert ranks[0].ordinal(Oracle(6), roster) == 7  # type: ignore[arg-type]
    assert ranks[0].ordinal(Oracle(7), roster) == 7  # type: ignore[arg-type]


def test_without_a_survey_there_is_no_ordinal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "ORDINAL_S", 0.1)
    ranks, roster = meetings(LocalBoard(), 2), first_roster()
    with pytest.raises(DaemonUnreachable):
        ranks[0].ordinal(Oracle(0, DaemonUnreachable("gone")), roster)  # type: ignore[arg-type]
    with pytest.raises(RendezvousTimeout, match="ordinal of the incarnation: no word from rank 0"):
        ranks[1].ordinal(Oracle(0), roster)  # type: ignore[arg-type]


# --- later versions ---------------------------------------------------------------------------------------------------
def first_roster(world_size: int = 2, absent: Sequence[int] = ()) -> Roster:
    entries = (fresh_entry(rank, "" if rank in absent else None) for rank in range(world_size))
    return Roster(1, 0xBEEF, 1 << 16, tuple(entries), protect="auto")


def at(newest_step: int, step_s: float | None) -> Callable[[], tuple[int, float | None]]:
    return lambda: (newest_step, step_s)


def test_a_changed_entry_makes_the_next_version_and_all_read_the_same(board: Board) -> None:
    rosters, roster = Rosters(board, RUN, 0xBEEF), first_roster(absent=[1])
    publisher = Publisher(rosters, 2.0)
    rosters.publish(roster)
    assert publisher.look(roster, at(10, 0.5)) == []
    moved = fresh_entry(1, "node1")
    rosters.put(moved)
    found = publisher.look(roster, at(10, 0.5))
    assert [(r.version, r.from_step, r.entries[1], r.protect) for r in found] == [(2, 15, moved, "auto")]
    assert publisher.look(found[0], at(11, 0.5)) == []
    assert rosters.after(0) == [roster, *found]
    assert rosters.after(1) == found
    assert rosters.after(2) == []


def test_changes_of_several_ranks_at_once_are_one_version() -> None:
    rosters, roster = Rosters(LocalBoard(), RUN, 0xBEEF), first_roster(3, absent=[1, 2])
    publisher = Publisher(rosters, 2.0)
    rosters.put(fresh_entry(1, "node1"))
    rosters.put(fresh_entry(2, "node2"))
    rosters.put(fresh_entry(2, "node3"))
    found = publisher.look(roster, at(-1, None))
    assert [[entry.node_id for entry in r.entries] for r in found] == [["node0", "node1", "node3"]]
    assert publisher.look(found[0], at(-1, None)) == []


def test_a_rank_that_looks_late_gets_every_version() -> None:
    rosters, roster = Rosters(LocalBoard(), RUN, 0xBEEF), first_roster(absent=[1])
    publisher = Publisher(rosters, 2.0)
    known = Membership((roster,))
    for number in range(3):
        rosters.put(fresh_entry(1, f"node{number + 2}"))
        publisher.look(Membership((roster, *rosters.after(1))).roster, at(10 * number, 1.0))
    for version in rosters.after(known.roster.version):
        known = known.extended(version)
    assert [r.version for r in known.rosters] == [1, 2, 3, 4]
    assert known.extended(roster) is known


class FailingBoard(LocalBoard):
    """Fails the writes that the test asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.failing = ""

    def set(self, key: str, value: bytes) -> None:
        if self.failing and key.endswith(self.failing):
            raise RendezvousTimeout("the job's store does not answer")
        super().set(key, value)


@pytest.mark.parametrize("failing", ["/roster/2", "/version"])
def test_a_version_keeps_its_content_when_the_store_fails_amid_it(failing: str) -> None:
    board = FailingBoard()
    rosters, roster = Rosters(board, RUN, 0xBEEF), first_roster(absent=[1])
    publisher = Publisher(rosters, 2.0)
    rosters.put(fresh_entry(1, "node1"))
    board.failing = failing
    with pytest.raises(RendezvousTimeout):
        publisher.look(roster, at(10, 1.0))
    assert rosters.after(1) == []
    rosters.put(fresh_entry(1, "node2"))
    board.failing = ""
    second = publisher.look(roster, at(20, 1.0))
    assert [(r.version, r.from_step, r.entries[1].node_id) for r in second] == [(2, 13, "node1")]
    third = publisher.look(second[0], at(20, 1.0))
    assert [(r.version, r.from_step, r.entries[1].node_id) for r in third] == [(3, 23, "node2")]


def test_an_unknown_step_time_makes_the_next_step_the_first() -> None:
    roster = first_roster()
    assert next_version(roster, roster.entries, 7, None, 2.0).from_step == 8
    assert next_version(roster, roster.entries, -1, None, 2.0).from_step == 0
    assert next_version(roster, roster.entries, 7, 0.3, 2.0).from_step == 7 + 7 + 1


# --- the version in force ---------------------------------------------------------------------------------------------
def test_a_version_that_was_overtaken_before_it_was_in_force_never_is() -> None:
    first = first_roster()
    second, third = replace(first, version=2, from_step=300), replace(first, version=3, from_step=113)
    known = Membership((first, second, third))
    assert [known.roster_at(step).version for step in (0, 112, 113, 299, 300, 10**9)] == [1, 1, 3, 3, 3, 3]


@given(st.lists(st.integers(0, 50), max_size=6), st.integers(0, 60))
def test_ranks_that_know_the_same_versions_agree_on_every_step(from_steps: list[int], step: int) -> None:
    """In whatever order they heard of them, and whether or not a version for a later step is known yet."""
    first = first_roster()
    rosters = [first, *(replace(first, version=n, from_step=f) for n, f in enumerate(from_steps, 2))]
    in_force = Membership(tuple(rosters)).roster_at(step)
    assert in_force.from_step <= step
    assert in_force.version == max(r.version for r in rosters if r.from_step <= step)
    needed = list(itertools.takewhile(lambda r: r.version <= in_force.version, rosters))
    assert Membership(tuple(needed)).roster_at(step) == in_force


def test_a_step_is_taken_when_every_rank_has_a_daemon_and_this_one_its_own() -> None:
    first = first_roster(3, absent=[1, 2])
    entries = (first.entries[0], fresh_entry(1), fresh_entry(2))
    known = Membership((first, replace(first, version=2, entries=entries, from_step=20)))
    assert known.obstacle(19, 0, "node0") == "rank 1, 2 has no daemon"
    assert known.obstacle(20, 0, "node0") == ""
    assert "another node" in known.obstacle(20, 1, "elsewhere")


def test_a_local_board_counts_for_many_threads() -> None:
    board, done = LocalBoard(), []
    workers = [threading.Thread(target=lambda: done.extend(board.add("n", 1) for _ in range(50))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(done) == list(range(1, 201))


def test_an_entry_of_a_silent_daemon_has_no_node() -> None:
    empty: Any = entry_of(3, node_pb2.DescribeResponse(), 5)
    assert (empty.rank, empty.node_id, empty.address, empty.estimated_bytes) == (3, "", "", 5)
    assert empty.nonce != entry_of(3, node_pb2.DescribeResponse(), 5).nonce
