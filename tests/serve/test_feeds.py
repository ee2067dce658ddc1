"""What a node keeps of its ranks' timings: bounded, and what the analyst is told of it."""

from __future__ import annotations

import os

import numpy as np
import pytest

from ckptd.detect.records import Communicator
from ckptd.errors import InvalidRequest
from ckptd.format.timings import BLACK_BOX_BYTES, ENTERED, OPERATION, SAMPLE, SELF, STEP, Op, Rows, pack, unpack
from ckptd.serve.diagnosis import feeds
from ckptd.serve.diagnosis.feeds import KEPT_STEPS, MOST_COMMUNICATORS, MOST_SIGNATURES, NodeFeed
from ckptd.serve.diagnosis.messages import rank_state
from ckptd_api.v1 import coordinator_pb2, node_pb2, timings_pb2
from ckptd_client.timing.black_box import BlackBox

SECOND = 1_000_000_000


def entry(row: int, id_: str) -> timings_pb2.CommunicatorEntry:
    return timings_pb2.CommunicatorEntry(row=row, id=id_, members=[0, 1])


def report(
    first_step: int, count: int, *communicators: timings_pb2.CommunicatorEntry, row: int = 0, rank: int = 0
) -> node_pb2.ReportTimingsRequest:
    """``count`` steps of 100 ms from ``first_step`` on, with an operation each in the communicator ``row``."""
    at = np.arange(first_step, first_step + count)
    operations, marks = np.zeros(count, OPERATION), np.zeros(count, STEP)
    operations["communicator"], operations["op"], operations["seq"], operations["peer"] = row, Op.ALL_REDUCE, at, -1
    operations["start_ns"] = at * (SECOND // 10) + 1000
    operations["end_ns"] = operations["start_ns"] + 1000
    marks["step"], marks["end_ns"] = at, at * (SECOND // 10)
    return node_pb2.ReportTimingsRequest(
        rank=rank,
        communicators=communicators,
        operations=pack(operations),
        steps=pack(marks),
        heartbeat=timings_pb2.Heartbeat(counts=[timings_pb2.CommunicatorCount(communicator=row, enqueued=1)]),
    )


def told(feed: NodeFeed, *ranks: int, is_dead: bool = False) -> coordinator_pb2.ReportRanksRequest:
    request = coordinator_pb2.ReportRanksRequest()
    for rank in ranks or (0,):
        request.ranks.add(rank=rank, is_dead=is_dead)
    feed.fill(request, 0.0)
    return request


def steps_of(request: coordinator_pb2.ReportRanksRequest) -> list[int]:
    rows: Rows = unpack(request.ranks[0].steps, SELF, "steps", 1 << 20)
    return rows["step"].tolist()


def samples_of(request: coordinator_pb2.ReportRanksRequest) -> Rows:
    return unpack(request.ranks[0].samples, SAMPLE, "samples", 1 << 20)


def test_a_rank_that_could_not_be_told_of_for_long_sends_its_newest_steps() -> None:
    feed = NodeFeed(2)
    for first in range(0, 5 * KEPT_STEPS, 50):
        assert feed.take(report(first, 50, entry(0, "w")), 0.0)
    last = 5 * KEPT_STEPS // 50 * 50 + 49
    assert steps_of(told(feed)) == list(range(last - KEPT_STEPS + 1, last + 1))


def test_of_a_rank_that_is_gone_what_it_entered_last_is_told_with_what_it_said_before() -> None:
    feed = NodeFeed(2)
    box = BlackBox()
    box.move_to(feed.open_black_box(0))
    feed.take(report(0, 5, entry(3, "w"), row=3), 0.0)
    for seq in range(1, 1000):
        box.write(3, Op.BROADCAST, seq, 10 * seq)
    box.write(9, Op.BROADCAST, 1, 1)  # of a communicator that was never told
    box.write(3, 77, 1000, 10000)  # what no client of ours writes
    assert not told(feed).ranks[0].heartbeat.signatures
    for _ in range(2):
        request = told(feed, is_dead=True)
        signatures = request.ranks[0].heartbeat.signatures
        assert sorted(s.seq for s in signatures) == list(range(1002 - MOST_SIGNATURES, 1001))
        assert {(s.communicator, s.size_bytes - 10 * s.seq) for s in signatures} == {(0, 0)}
        state = rank_state(request.ranks[0], "n", {0: Communicator("w", (0, 1))}, 0.0)
        assert state.signatures["w", 999] == (Op.BROADCAST, 9990)
        assert state.signatures["w", 1000] == (Op.OTHER, 10000)
        late = report(5, 5, row=3)
        late.heartbeat.signatures.add(communicator=3, seq=999, op=Op.BROADCAST, size_bytes=9990)
        feed.take(late, 0.1)  # it was under way; what is told twice counts once


def test_memory_full_of_nonsense_costs_nothing() -> None:
    feed = NodeFeed(2)
    fd = feed.open_black_box(0)
    rows = np.frombuffer(np.random.default_rng(1).bytes(BLACK_BOX_BYTES), ENTERED).copy()
    rows["communicator"] = 0
    os.write(fd, rows.tobytes())
    os.close(fd)
    feed.take(report(0, 5, entry(0, "w")), 0.0)
    request = told(feed, is_dead=True)
    assert len(request.ranks[0].heartbeat.signatures) == MOST_SIGNATURES
    state = rank_state(request.ranks[0], "n", {0: Communicator("w", (0, 1))}, 0.0)
    assert len(state.signatures) == MOST_SIGNATURES


def test_there_is_news_of_ranks_once_each_was_heard_of_since_the_last_report() -> None:
    feed = NodeFeed(2)
    feed.take(report(0, 5, entry(0, "w")), 0.0)
    assert not feed.has_news_of([0, 1])
    feed.take(report(0, 5, entry(0, "w"), rank=1), 0.0)
    assert feed.has_news_of([0, 1])
    told(feed, 0, 1)
    assert not feed.has_news_of([0, 1])


def test_what_positions_are_called_is_told_once_and_again_to_another_analyst() -> None:
    feed = NodeFeed(2)
    feed.begin("a")
    feed.take(report(0, 40, entry(0, "w")), 0.0)
    (names,) = ({name for name in told(feed).ranks[0].positions if name},)
    assert any("all_reduce" in name for name in names)
    feed.take(report(40, 40), 0.0)
    assert not told(feed).ranks[0].positions
    feed.begin("b")
    assert {name for name in told(feed).ranks[0].positions if name} == names


def test_an_analyst_that_is_new_is_told_the_newest_steps_and_those_that_came_since_once() -> None:
    feed = NodeFeed(2)
    feed.begin("a")
    feed.take(report(0, KEPT_STEPS + 1, entry(0, "w")), 0.0)
    assert len(steps_of(told(feed))) == KEPT_STEPS
    feed.begin("b")
    feed.take(report(KEPT_STEPS + 1, 100), 0.0)
    request = told(feed)
    assert steps_of(request) == list(range(101, KEPT_STEPS + 101))
    assert [known.id for known in request.communicators] == ["w"]
    feed.take(report(KEPT_STEPS + 101, 3), 0.0)
    request = told(feed)
    assert steps_of(request) == list(range(KEPT_STEPS + 101, KEPT_STEPS + 104))
    assert not request.communicators


@pytest.mark.parametrize("row", [MOST_COMMUNICATORS, 2**32 - 1])
def test_a_row_that_is_too_large_is_refused_by_name(row: int) -> None:
    feed = NodeFeed(2)
    with pytest.raises(InvalidRequest, match=f"row {row} is not below {MOST_COMMUNICATORS}"):
        feed.take(report(0, 3, entry(row, "w"), row=row), 0.0)


def test_a_rank_that_names_one_row_ever_anew_leaves_one_communicator() -> None:
    feed = NodeFeed(2)
    for at in range(200):
        assert feed.take(report(10 * at, 10, entry(0, f"group {at}")), 0.0)
    request = told(feed)
    assert [known.id for known in request.communicators] == ["group 199"]
    assert request.communicators[0].row < 2
    assert set(samples_of(request)["communicator"]) == {request.communicators[0].row}
    # Those of the group before are in no table any more.
    assert samples_of(request)["seq"].min() >= 1990 - 10


def test_a_communicator_lasts_as_long_as_one_rank_names_it() -> None:
    feed = NodeFeed(2)
    feed.take(report(0, 3, entry(0, "w")), 0.0)
    feed.take(report(0, 3, entry(5, "w"), row=5, rank=1), 0.0)
    feed.take(report(3, 3, entry(0, "x")), 0.0)
    request = told(feed, 0, 1)
    rows = {known.id: known.row for known in request.communicators}
    assert set(rows) == {"w", "x"}
    counted = [item.heartbeat.counts[0].communicator for item in request.ranks]
    assert counted == [rows["x"], rows["w"]]
    feed.take(report(3, 3, entry(5, "x"), row=5, rank=1), 0.0)
    feed.take(report(6, 3, entry(1, "y")), 0.0)
    assert [(known.id, known.row) for known in told(feed).communicators] == [("y", rows["w"])]


def test_samples_go_under_the_row_of_the_node() -> None:
    feed = NodeFeed(2)
    feed.take(report(0, 3, entry(7, "other"), rank=1, row=7), 0.0)
    feed.take(report(0, 5, entry(4000, "w"), row=4000), 0.0)
    request = told(feed)
    rows = {known.id: known.row for known in request.communicators}
    assert set(samples_of(request)["communicator"]) == {rows["w"]}


def test_a_node_with_too_many_communicators_says_so_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "MOST_OF_NODE", 3)
    feed = NodeFeed(2)
    with pytest.raises(InvalidRequest, match="a node has at most 3"):
        feed.take(report(0, 3, *(entry(row, f"group {row}") for row in range(4))), 0.0)
    assert feed.take(report(0, 3), 0.0)


def test_operations_of_a_communicator_that_is_not_known_are_asked_for_again() -> None:
    feed = NodeFeed(2)
    assert not feed.take(report(0, 3), 0.0)
    assert feed.take(report(0, 3, entry(0, "w")), 0.0)
    assert steps_of(told(feed)) == [1, 2]
