"""The recycle rule: what may be overwritten, and what never."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.arena.recycle import UNDECIDED, RunMarks, why_kept
from ckptd.format.slot import SlotState
from ckptd.model import Incarnation, SnapshotId

OLD, NOW = Incarnation(1, 11), Incarnation(2, 22)
FREE, WRITING, SEALED = SlotState.FREE, SlotState.WRITING, SlotState.SEALED
incarnations = st.sampled_from([OLD, NOW, Incarnation(3, 33)])
snapshots = st.builds(SnapshotId, incarnations, st.integers(0, 6))
marks = st.builds(
    RunMarks,
    current=st.one_of(st.none(), st.just(NOW)),
    is_decided=st.booleans(),
    restored=st.one_of(st.none(), snapshots),
    staged=st.one_of(st.none(), st.builds(SnapshotId, st.just(NOW), st.integers(0, 6))),
    protected=st.one_of(st.none(), snapshots),
    protecting=st.one_of(st.none(), snapshots),
    dead=st.sets(snapshots, max_size=4),
)


def at(step: int, incarnation: Incarnation = NOW) -> SnapshotId:
    return SnapshotId(incarnation, step)


@pytest.mark.parametrize(
    ("state", "snapshot", "reason"),
    [
        (SEALED, at(5), "newest staged"),
        (SEALED, at(6), "sealed, not yet staged"),
        (SEALED, at(4), None),
        (SEALED, at(3), "protected"),
        (WRITING, at(7), "being written"),
        (WRITING, at(9, OLD), None),
        (SEALED, at(8), None),  # dead
        (SEALED, at(2, OLD), None),
        (FREE, at(5), None),
    ],
)
def test_a_slot_is_kept_for(state: SlotState, snapshot: SnapshotId, reason: str | None) -> None:
    known = RunMarks(NOW, True, at(2, OLD), at(5), protected=at(3), dead={at(8)})
    assert why_kept(state, snapshot, False, known) == reason


def test_what_is_protected_is_kept_although_a_coordinator_that_restarted_takes_it_for_dead() -> None:
    assert why_kept(SEALED, at(3), False, RunMarks(NOW, True, None, at(5), at(3), dead={at(3)})) == "protected"


def test_what_was_restored_is_kept_until_something_newer_is_staged() -> None:
    assert why_kept(SEALED, at(2, OLD), False, RunMarks(NOW, True, at(2, OLD))) == "restored"
    assert why_kept(SEALED, at(1, OLD), False, RunMarks(NOW, True, at(2, OLD))) is None
    assert why_kept(SEALED, at(2, OLD), False, RunMarks(NOW, True, at(2, OLD), at(1))) is None


def test_everything_sealed_before_waits_for_the_restore_decision() -> None:
    assert why_kept(SEALED, at(1, OLD), False, RunMarks(NOW, False)) == UNDECIDED
    assert why_kept(SEALED, at(1, OLD), False, RunMarks()) == UNDECIDED


@given(state=st.sampled_from(SlotState), snapshot=st.one_of(st.none(), snapshots), known=marks)
def test_a_leased_slot_is_kept_whatever_else_holds(
    state: SlotState, snapshot: SnapshotId | None, known: RunMarks
) -> None:
    assert why_kept(state, snapshot, True, known) == "leased"


@given(snapshot=snapshots, known=marks)
def test_nothing_that_a_restart_would_need_is_free(snapshot: SnapshotId, known: RunMarks) -> None:
    """The newest staged, the newest protected, and before the first staged step the restored one."""
    if snapshot in known.dead or known.current is None:
        return
    needed = snapshot in (known.staged, known.protected, known.protecting)
    needed |= known.staged is None and snapshot == known.restored
    needed |= not known.is_decided and snapshot.incarnation < known.current
    if needed:
        assert why_kept(SEALED, snapshot, False, known) is not None


@given(step=st.integers(0, 20), staged=st.integers(0, 20))
def test_with_one_step_staged_at_most_that_one_and_newer_ones_are_kept(step: int, staged: int) -> None:
    kept = why_kept(SEALED, at(step), False, RunMarks(NOW, True, None, at(staged)))
    assert (kept is not None) == (step >= staged)
