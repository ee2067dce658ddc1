"""The rules of retention, for any history of a run."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ckptd.model import Incarnation, SnapshotId
from ckptd.tiers import StoredSnapshot, expendable

snapshots = st.builds(
    lambda ordinal, step: SnapshotId(Incarnation(ordinal, 99), step), st.integers(1, 4), st.integers(1, 9)
)
histories = st.dictionaries(snapshots, st.booleans(), max_size=20).map(
    lambda held: [StoredSnapshot(snapshot, is_committed) for snapshot, is_committed in held.items()]
)
some = st.sets(snapshots, max_size=6)


def sid(ordinal: int, step: int) -> SnapshotId:
    return SnapshotId(Incarnation(ordinal, 99), step)


def committed(stored: list[StoredSnapshot]) -> list[SnapshotId]:
    return sorted(entry.snapshot for entry in stored if entry.is_committed)


@given(histories, st.integers(1, 4), some, some, some)
def test_the_rules_hold_for_any_history(
    stored: list[StoredSnapshot],
    keep: int,
    verified: set[SnapshotId],
    leased: set[SnapshotId],
    draining: set[SnapshotId],
) -> None:
    gone = {deletion.snapshot for deletion in expendable(stored, keep, verified, leased, draining)}
    whole = committed(stored)
    sound = [snapshot for snapshot in whole if snapshot in verified]
    assert gone <= {entry.snapshot for entry in stored}
    assert not gone & (leased | draining)
    assert not gone & set(whole[-keep:])
    assert not gone & set(sound[-1:])
    newest = max((s.incarnation.ordinal for s in [*(e.snapshot for e in stored), *draining]), default=0)
    for snapshot in gone & set(whole):
        assert snapshot.incarnation.ordinal == newest or any(s.incarnation.ordinal == newest for s in sound)
    for snapshot in gone - set(whole):
        assert snapshot < whole[-1]


@given(histories, st.integers(1, 4), some, some, some)
def test_deleting_what_is_expendable_leaves_nothing_more_to_delete(
    stored: list[StoredSnapshot],
    keep: int,
    verified: set[SnapshotId],
    leased: set[SnapshotId],
    draining: set[SnapshotId],
) -> None:
    gone = {deletion.snapshot for deletion in expendable(stored, keep, verified, leased, draining)}
    left = [entry for entry in stored if entry.snapshot not in gone]
    assert expendable(left, keep, verified, leased, draining) == []


@given(histories, st.integers(1, 4), some)
def test_the_order_of_the_listing_does_not_matter(
    stored: list[StoredSnapshot], keep: int, verified: set[SnapshotId]
) -> None:
    assert expendable(stored, keep, verified, [], []) == expendable(stored[::-1], keep, verified, [], [])


def test_the_newest_stay_and_older_ones_go_with_a_reason() -> None:
    stored = [StoredSnapshot(sid(1, step), True) for step in (1, 2, 3, 4)]
    (first, second) = expendable(stored, 2, [sid(1, 4)], [], [])
    assert (first.snapshot, second.snapshot) == (sid(1, 1), sid(1, 2))
    assert first.reason == "older than the newest 2 checkpoints"


def test_an_older_incarnation_stays_until_the_newer_one_has_a_verified_checkpoint() -> None:
    stored = [StoredSnapshot(sid(1, step), True) for step in (1, 2, 3)] + [StoredSnapshot(sid(2, 4), True)]
    assert expendable(stored, 1, [sid(1, 3)], [], []) == []
    assert [d.snapshot for d in expendable(stored, 1, [sid(1, 3), sid(2, 4)], [], [])] == [sid(1, s) for s in (1, 2, 3)]


def test_the_newest_verified_stays_when_what_is_newer_was_never_verified() -> None:
    stored = [StoredSnapshot(sid(1, step), True) for step in (1, 2, 3)]
    assert [d.snapshot for d in expendable(stored, 1, [sid(1, 2)], [], [])] == [sid(1, 1)]


def test_leftovers_go_only_when_something_newer_is_committed() -> None:
    leftover, newer = StoredSnapshot(sid(1, 1), False), StoredSnapshot(sid(1, 2), True)
    assert expendable([leftover], 1, [], [], []) == []
    assert [d.snapshot for d in expendable([leftover, newer], 1, [], [], [])] == [sid(1, 1)]
    assert expendable([leftover, newer], 1, [], [], [sid(1, 1)]) == []
    assert expendable([StoredSnapshot(sid(1, 3), False), newer], 1, [], [], []) == []
