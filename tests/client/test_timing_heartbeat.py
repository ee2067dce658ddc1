"""The heartbeat: what it says of a rank at one moment, and that nothing is lost when a daemon goes and comes."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import wait_until
from timed_alone import Link, collecting, one_rank_group

from ckptd.errors import DaemonUnreachable, InvalidRequest
from ckptd.format.timings import OPERATION, STEP, Mask, Op, unpack
from ckptd_api.v1 import node_pb2
from ckptd_client.timing import communicators
from ckptd_client.timing import heartbeat as heartbeat_module
from ckptd_client.timing.collection import Collection
from ckptd_client.timing.heartbeat import Heartbeat

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
SOON_S = 10.0


@pytest.fixture
def tapped() -> Iterator[Collection]:
    with one_rank_group(), collecting() as collection:
        yield collection


@pytest.fixture
def link() -> Link:
    return Link()


@pytest.fixture
def heartbeat(tapped: Collection, link: Link) -> Heartbeat:
    """Without its thread: the test beats."""
    made = Heartbeat(tapped, link)
    tapped.reporters.append(made)
    return made


def stuck() -> dist.Work:
    """An operation that has not ended as long as nobody waits for it."""
    return dist.reduce_scatter_tensor(torch.empty(4), torch.ones(4), async_op=True)


def test_rows_go_once_and_after_the_communicators_that_they_name(heartbeat: Heartbeat, link: Link) -> None:
    dist.barrier()
    heartbeat.beat(1.0)
    dist.all_reduce(torch.ones(2))
    dist.barrier(group=dist.new_group([0]))
    heartbeat.beat(1.0)
    heartbeat.beat(1.0)
    assert link.rows() == [Op.BARRIER, Op.ALL_REDUCE, Op.BARRIER]
    assert [[entry.row for entry in request.communicators] for request in link.requests] == [[0], [1], []]
    entry = link.requests[0].communicators[0]
    assert (list(entry.members), entry.backend) == ([0], "cpu:gloo,cuda:gloo")
    assert (link.last.run, link.last.rank, link.last.incarnation) == ("run", 0, link.incarnation)


def test_the_end_of_a_step_is_told_at_once_when_the_last_beat_is_long_ago(
    tapped: Collection, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat_module, "INTERVAL_S", 4 * SOON_S)
    monkeypatch.setattr(heartbeat_module, "_REST", 0.0)
    beating = Heartbeat(tapped, link)
    beating.start()
    try:
        wait_until(lambda: beating._thread.is_alive(), "the thread")
        tapped.steps.mark(1)
        wait_until(lambda: link.requests and link.last.heartbeat.step == 1, "a beat", SOON_S)
    finally:
        beating.close(0.0)


def test_what_was_entered_is_in_memory_of_each_daemon_in_turn(heartbeat: Heartbeat, link: Link) -> None:
    dist.barrier()
    heartbeat.beat(1.0)
    dist.all_reduce(torch.ones(3))
    link.instance += 1  # the daemon was restarted
    heartbeat.beat(1.0)
    heartbeat.beat(1.0)
    dist.barrier()
    first, second = ([Op(row["op"]) for row in box.read()] for box in link.black_boxes)
    assert first == [Op.BARRIER, Op.ALL_REDUCE]
    assert second == [Op.BARRIER, Op.ALL_REDUCE, Op.BARRIER]
    row = link.black_boxes[1].read()[1]
    assert (row["communicator"], row["seq"], row["size_bytes"]) == (0, 2, 12)


def test_counts_say_what_was_entered_and_what_ended(heartbeat: Heartbeat, link: Link) -> None:
    dist.barrier()
    work = stuck()
    heartbeat.beat(1.0)
    assert [(c.enqueued, c.completed) for c in link.last.heartbeat.counts] == [(2, 1)]
    work.wait()
    heartbeat.beat(1.0)
    assert [(c.enqueued, c.completed) for c in link.last.heartbeat.counts] == [(2, 2)]
    assert link.last.coverage.operations_total == 2


def test_pending_operations_come_oldest_first_and_bounded(
    heartbeat: Heartbeat, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat_module, "MOST_PENDING", 2)
    works = [stuck() for _ in range(3)]
    heartbeat.beat(1.0)
    first, second = link.last.heartbeat.pending
    assert [(first.seq, first.op, first.size_bytes, first.peer), second.seq] == [(1, Op.REDUCE_SCATTER, 16, -1), 2]
    assert first.for_seconds >= second.for_seconds >= 0
    for work in works:
        work.wait()
    heartbeat.beat(1.0)
    assert not link.last.heartbeat.pending


def test_signatures_are_of_the_last_operations_and_of_those_pending(
    heartbeat: Heartbeat, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(communicators, "SIGNATURES", 4)
    monkeypatch.setattr(heartbeat_module, "WAITED_S", -1.0)
    work = stuck()
    for _ in range(6):
        dist.barrier()
    heartbeat.beat(1.0)
    found = {s.seq: (s.op, s.size_bytes) for s in link.last.heartbeat.signatures}
    assert found == {1: (Op.REDUCE_SCATTER, 16), **dict.fromkeys((4, 5, 6, 7), (Op.BARRIER, 0))}
    work.wait()


def test_signatures_are_of_communicators_in_which_something_waits(
    heartbeat: Heartbeat, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    dist.barrier(group=(other := dist.new_group([0])))
    work = stuck()
    heartbeat.beat(1.0)
    assert not link.last.heartbeat.signatures
    [pending] = heartbeat._collection.recorder.pending
    pending.start_ns -= int(heartbeat_module.WAITED_S * 1e9)
    heartbeat.beat(1.0)
    assert [(s.communicator, s.seq, s.op) for s in link.last.heartbeat.signatures] == [(1, 1, Op.REDUCE_SCATTER)]
    monkeypatch.setattr(heartbeat_module, "STILL_S", -1.0)
    heartbeat.beat(1.0)
    assert {s.communicator for s in link.last.heartbeat.signatures} == {0, 1}
    work.wait()
    dist.destroy_process_group(other)


def test_the_last_report_has_every_signature(tapped: Collection, link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat_module, "INTERVAL_S", 60.0)
    made = Heartbeat(tapped, link)
    made.start()
    dist.barrier()
    made.close()
    assert [(s.seq, s.op) for s in link.last.heartbeat.signatures] == [(1, Op.BARRIER)]


def test_a_group_that_is_gone_is_told_no_more_but_named_to_a_new_daemon(heartbeat: Heartbeat, link: Link) -> None:
    dist.barrier()
    group = dist.new_group([0])
    dist.barrier(group=group)
    left = dist.reduce_scatter_tensor(torch.empty(4), torch.ones(4), group=group, async_op=True)
    heartbeat.beat(1.0)
    assert [count.communicator for count in link.last.heartbeat.counts] == [0, 1]
    dist.destroy_process_group(group)
    del group
    gc.collect()
    heartbeat.beat(1.0, is_last=True)
    beat = link.last.heartbeat
    assert [count.communicator for count in beat.counts] == [0]
    assert {s.communicator for s in beat.signatures} == {0}
    assert not beat.pending
    link.instance = 2
    heartbeat.beat(1.0)
    assert [entry.row for entry in link.last.communicators] == [0, 1]
    left.wait()


def test_the_masks_in_force_go_along(heartbeat: Heartbeat, link: Link, tapped: Collection) -> None:
    tapped.steps._warm_up = 0
    heartbeat.beat(1.0)
    assert link.last.heartbeat.mask == Mask.NONE
    with tapped.steps.masked("evaluation"):
        heartbeat.beat(1.0)
    assert link.last.heartbeat.mask == Mask.EVALUATION
    heartbeat.beat(1.0)
    assert link.last.heartbeat.mask == Mask.NONE


def test_steps_go_with_the_operations(tapped: Collection, heartbeat: Heartbeat, link: Link) -> None:
    heartbeat.beat(1.0)
    assert link.last.heartbeat.step == -1
    tapped.steps.mark(4)
    tapped.steps.mark(5)
    heartbeat.beat(1.0)
    assert unpack(link.last.steps, STEP, "steps", 10)["step"].tolist() == [4, 5]
    assert link.last.heartbeat.step == 5
    heartbeat.beat(1.0)
    assert link.last.steps == b""


def test_the_stack_comes_while_something_is_stuck_and_no_longer(
    heartbeat: Heartbeat, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = stuck()
    heartbeat.beat(1.0)
    assert link.last.heartbeat.stack == ""
    monkeypatch.setattr(heartbeat_module, "STILL_S", -1.0)
    for _ in range(2):
        heartbeat.beat(1.0)
        assert "test_the_stack_comes" in link.last.heartbeat.stack
    monkeypatch.undo()
    work.wait()
    heartbeat.beat(1.0)
    assert link.last.heartbeat.stack == ""


def test_many_rows_go_in_several_messages_and_marks_with_the_last(
    tapped: Collection, heartbeat: Heartbeat, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat_module, "MOST_ROWS", 4)
    for _ in range(10):
        dist.barrier()
    tapped.steps.mark(1)
    heartbeat.beat(1.0)
    assert len(link.rows()) == 10
    assert [bool(request.steps) for request in link.requests] == [False, False, True]


# --- a daemon that goes and comes -------------------------------------------------------------------------------------
def test_what_was_not_delivered_is_sent_again(heartbeat: Heartbeat, link: Link) -> None:
    link.error = DaemonUnreachable("gone")
    dist.barrier()
    with pytest.raises(DaemonUnreachable):
        heartbeat.beat(1.0)
    dist.barrier()
    link.error = None
    heartbeat.beat(1.0)
    assert len(link.rows()) == 2
    assert [entry.row for entry in link.last.communicators] == [0]


def test_a_daemon_that_is_another_process_gets_the_communicators_again(heartbeat: Heartbeat, link: Link) -> None:
    dist.barrier()
    heartbeat.beat(1.0)
    link.instance = 2
    heartbeat.beat(1.0)
    heartbeat.beat(1.0)
    assert [len(request.communicators) for request in link.requests] == [1, 1, 0]


def test_a_daemon_that_misses_communicators_gets_them_with_the_same_rows(heartbeat: Heartbeat, link: Link) -> None:
    dist.barrier()
    heartbeat.beat(1.0)
    dist.barrier()
    link.answers = [node_pb2.ReportTimingsResponse(is_missing_communicators=True)]
    heartbeat.beat(1.0)
    assert [len(request.communicators) for request in link.requests] == [1, 0, 1]
    assert link.requests[1].operations == link.requests[2].operations != b""


def test_rows_that_a_daemon_refuses_do_not_hold_up_others(heartbeat: Heartbeat, link: Link) -> None:
    link.error = InvalidRequest("not these")
    dist.barrier()
    with pytest.raises(InvalidRequest):
        heartbeat.beat(1.0)
    link.error = None
    dist.all_reduce(torch.ones(1))
    heartbeat.beat(1.0)
    assert link.rows() == [Op.ALL_REDUCE]


def test_nothing_is_sent_while_the_rank_has_not_joined(heartbeat: Heartbeat, link: Link) -> None:
    link.problem = DaemonUnreachable("not yet")
    dist.barrier()
    heartbeat.beat(1.0)
    assert link.requests == []
    link.problem = None
    heartbeat.beat(1.0)
    assert link.rows() == [Op.BARRIER]


def test_of_two_users_the_first_reports_and_the_second_takes_over(
    tapped: Collection, heartbeat: Heartbeat, link: Link
) -> None:
    other = Link()
    second = Heartbeat(tapped, other)
    tapped.reporters.append(second)
    dist.barrier()
    second.beat(1.0)
    heartbeat.beat(1.0)
    assert (len(link.rows()), len(other.rows())) == (1, 0)
    tapped.reporters.remove(heartbeat)
    dist.barrier()
    second.beat(1.0)
    assert (len(link.rows()), len(other.rows())) == (1, 1)
    assert [entry.row for entry in other.last.communicators] == [0]


# --- the thread -------------------------------------------------------------------------------------------------------
def test_it_beats_by_itself_and_flushes_at_the_end(
    tapped: Collection, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat_module, "INTERVAL_S", 0.01)
    made = Heartbeat(tapped, link)
    made.start()
    dist.barrier()
    wait_until(lambda: link.rows() == [Op.BARRIER], "the row", SOON_S)
    monkeypatch.setattr(heartbeat_module, "INTERVAL_S", 60.0)
    time.sleep(0.05)
    dist.all_reduce(torch.ones(1))
    made.close()
    assert link.rows() == [Op.BARRIER, Op.ALL_REDUCE]
    assert tapped.reporters == []
    assert "ckptd-timing" not in [thread.name for thread in threading.enumerate()]


def test_it_can_be_told_not_to_flush(tapped: Collection, link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat_module, "INTERVAL_S", 60.0)
    made = Heartbeat(tapped, link)
    made.start()
    dist.barrier()
    made.close(flush_s=0)
    assert link.requests == []


def test_a_daemon_that_fails_does_not_end_it(tapped: Collection, link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat_module, "INTERVAL_S", 0.01)
    link.error = DaemonUnreachable("gone")
    made = Heartbeat(tapped, link)
    made.start()
    dist.barrier()
    time.sleep(0.05)
    link.error = None
    wait_until(lambda: link.rows() == [Op.BARRIER], "the row", SOON_S)
    made.close()


def test_a_program_that_ends_without_a_word_has_flushed() -> None:
    program = Path(__file__).with_name("flushed_program.py")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == [str(OPERATION.itemsize), "True"]
