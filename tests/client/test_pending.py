"""Futures of snapshots: each ends once, whatever its owner does with it, and never under a lock of ours."""

from __future__ import annotations

import pytest

from ckptd.errors import CkptdError, DaemonUnreachable, NoProtection, ProtectFailed, StepDead, Superseded
from ckptd_api.v1 import types_pb2
from ckptd_client.pending import Pending
from ckptd_client.snapshot import Snapshot

OURS, OLDER = 0xBEEF, 0xC0FFEE


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


# --- protected --------------------------------------------------------------------------------------------------------
@pytest.fixture
def pending() -> Pending:
    pending = Pending()
    pending.incarnation_id = OURS
    return pending


def protecting(step: int, incarnation: int = OURS) -> types_pb2.SnapshotId:
    return types_pb2.SnapshotId(incarnation=types_pb2.Incarnation(ordinal=1, id=incarnation), step=step)


def not_protected(step: int, error: type[CkptdError], reason: str) -> types_pb2.StepOutcome:
    return types_pb2.StepOutcome(step=step, error=error.__name__, reason=reason)


def test_a_step_whose_parity_is_in_place_is_protected(pending: Pending) -> None:
    snapshot = open_snapshot(pending, 4)
    pending.apply(types_pb2.Watermarks(staged=4, protecting=protecting(4)))
    assert not snapshot.protected.done()
    pending.apply(types_pb2.Watermarks(staged=4, protected=4))
    assert snapshot.protected.result() == 4


def test_a_step_is_not_protected_before_it_is_staged(pending: Pending) -> None:
    snapshot = open_snapshot(pending, 4)
    pending.apply(types_pb2.Watermarks(staged=3, protected=3, protecting=protecting(5)))
    assert not snapshot.protected.done()


@pytest.mark.parametrize(
    "marks",
    [
        types_pb2.Watermarks(staged=6, protected=6),
        types_pb2.Watermarks(staged=6, protected=2, protecting=protecting(6)),
        types_pb2.Watermarks(staged=7, protected=5, protecting=protecting(6)),
    ],
)
def test_a_step_that_protection_passed_over_is_superseded(pending: Pending, marks: types_pb2.Watermarks) -> None:
    snapshot = open_snapshot(pending, 4)
    pending.apply(marks)
    assert snapshot.is_staged
    error = snapshot.protected.exception()
    assert isinstance(error, Superseded)
    assert error.message == "step 4 was passed over: protection went on to step 6"
    assert not snapshot.durable.done()


def test_the_protection_of_another_step_says_nothing_of_a_newer_one(pending: Pending) -> None:
    snapshot = open_snapshot(pending, 4)
    pending.apply(types_pb2.Watermarks(staged=4, protected=2, protecting=protecting(3)))
    assert not snapshot.protected.done()


def test_what_is_protected_of_an_older_incarnation_supersedes_nothing(pending: Pending) -> None:
    """After a restore the restored snapshot is protected first; its step is of another branch."""
    snapshot = open_snapshot(pending, 4)
    pending.apply(types_pb2.Watermarks(staged=4, protecting=protecting(900, OLDER)))
    assert not snapshot.protected.done()


@pytest.mark.parametrize("kind", [ProtectFailed, NoProtection, Superseded])
def test_a_step_that_cannot_be_protected_fails_with_the_reason(pending: Pending, kind: type[CkptdError]) -> None:
    snapshot = open_snapshot(pending, 4)
    outcome = not_protected(4, kind, "node b has no memory left")
    pending.apply(types_pb2.Watermarks(staged=5, protected=2, not_protected=[outcome], protecting=protecting(5)))
    error = snapshot.protected.exception()
    assert type(error) is kind
    assert error.message == "step 4: node b has no memory left"


def test_a_dead_step_is_not_protected_either(pending: Pending) -> None:
    snapshot = open_snapshot(pending, 4)
    died = types_pb2.StepOutcome(step=4, error="StepDead", reason="rank 1 has no daemon")
    pending.apply(types_pb2.Watermarks(staged=3, protected=3, dead=[died]))
    assert isinstance(snapshot.protected.exception(), StepDead)


def test_an_answer_that_is_known_before_is_kept(pending: Pending) -> None:
    snapshot = open_snapshot(pending, 4)
    snapshot.protected.set_exception(NoProtection("protect is off"))
    pending.apply(types_pb2.Watermarks(staged=4, protected=4))
    assert isinstance(snapshot.protected.exception(), NoProtection)


def test_protection_that_takes_long_is_not_given_up_while_it_is_heard_of(pending: Pending) -> None:
    snapshot = open_snapshot(pending, 1)
    pending._open[1] = (snapshot, -1e9)
    pending.apply(types_pb2.Watermarks(staged=1, durable=1, protecting=protecting(1)))
    assert not snapshot.protected.done()
    pending._open[1] = (snapshot, -1e9)
    pending.apply(types_pb2.Watermarks(staged=1, durable=1, protecting=protecting(1, OLDER)))
    assert isinstance(snapshot.protected.exception(), DaemonUnreachable)
    assert pending._open == {}


def test_protection_under_way_at_close_ends_with_the_reason(pending: Pending) -> None:
    snapshot = open_snapshot(pending, 4)
    pending.apply(types_pb2.Watermarks(staged=4, durable=4, protecting=protecting(4)))
    pending.close(DaemonUnreachable("closed"))
    assert isinstance(snapshot.protected.exception(), DaemonUnreachable)
    assert snapshot.durable.result() == 4
