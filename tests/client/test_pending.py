"""Futures of snapshots: each ends once, whatever its owner does with it, and never under a lock of ours."""

from __future__ import annotations

from ckptd.errors import DaemonUnreachable, StepDead
from ckptd_api.v1 import types_pb2
from ckptd_client.pending import Pending
from ckptd_client.snapshot import Snapshot


def open_snapshot(pending: Pending, step: int) -> Snapshot:
    snapshot = Snapshot(step)
    pending.add(snapshot)
    return snapshot


def test_a_callback_of_a_future_may_save_again() -> None:
    pending = Pending()
    made: list[Snapshot] = []
    snapshot = open_snapshot(pending, 1)
    snapshot.staged.add_done_callback(lambda _: made.append(open_snapshot(pending, 2)))
    pending.apply(types_pb2.Watermarks(staged=1))
    assert made[0].step == 2
    pending.close(DaemonUnreachable("closed"))
    assert isinstance(made[0].staged.exception(), DaemonUnreachable)


def test_a_future_that_its_owner_cancelled_disturbs_nobody() -> None:
    pending = Pending()
    cancelled, other = open_snapshot(pending, 1), open_snapshot(pending, 2)
    cancelled.staged.cancel()
    pending.apply(types_pb2.Watermarks(staged=2))
    assert not cancelled.is_staged
    assert other.is_staged


def test_two_who_know_the_end_of_a_step_do_not_collide() -> None:
    pending = Pending()
    snapshot = open_snapshot(pending, 3)
    snapshot.fail(StepDead("the worker gave it up"))
    pending.apply(types_pb2.Watermarks(staged=3, durable=3))
    assert isinstance(snapshot.staged.exception(), StepDead)


def test_a_drain_that_takes_long_is_not_given_up_while_it_is_heard_of() -> None:
    pending = Pending()
    snapshot = open_snapshot(pending, 1)
    pending._open[1] = (snapshot, -1e9)
    pending.apply(types_pb2.Watermarks(staged=1, draining=1))
    assert not snapshot.durable.done()
    pending.apply(types_pb2.Watermarks(staged=1, durable=1))
    assert snapshot.durable.result() == 1
