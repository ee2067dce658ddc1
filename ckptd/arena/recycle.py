"""Which slots must be kept: the recycle rule, pure.

A slot is kept while its step is the newest staged, the newest protected, the one being protected, sealed but neither
staged nor dead, or leased; every other slot is free. Of older incarnations everything sealed is kept until the restore
is decided, then the restored snapshot until the new incarnation has staged one of its own, and what was protected
before until the new incarnation has protected something.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from ckptd.format.slot import SlotState
from ckptd.model import Incarnation, SnapshotId

UNDECIDED: Final = "waits for the restore decision"


@dataclass(frozen=True, slots=True)
class RunMarks:
    """What the recycle rule must know of a run.

    Attributes:
        current: the newest incarnation the daemon knows, None when it knows none yet.
        is_decided: the current incarnation has decided what to restore (or has begun to save).
        restored: the snapshot it restored.
        staged, protected, protecting: the newest of the current incarnation.
        fallbacks: what was protected before, while nothing of the current incarnation is.
        dead: snapshots that will never be staged.
    """

    current: Incarnation | None = None
    is_decided: bool = False
    restored: SnapshotId | None = None
    staged: SnapshotId | None = None
    protected: SnapshotId | None = None
    protecting: SnapshotId | None = None
    fallbacks: Collection[SnapshotId] = ()
    dead: Collection[SnapshotId] = ()


def why_kept(state: SlotState, snapshot: SnapshotId | None, is_leased: bool, marks: RunMarks) -> str | None:
    """Why the slot may not be reused, or None when it is free."""
    if is_leased:
        return "leased"
    if state is SlotState.FREE or snapshot is None:
        return None
    is_protected = snapshot in (marks.protected, marks.protecting) or snapshot in marks.fallbacks
    if snapshot in marks.dead and not is_protected:
        return None
    if state is SlotState.WRITING:
        return None if marks.current and snapshot.incarnation < marks.current else "being written"
    if marks.current is None or (snapshot.incarnation < marks.current and not marks.is_decided):
        return UNDECIDED
    if is_protected:
        return "protected"
    if snapshot.incarnation < marks.current:
        return "restored" if snapshot == marks.restored and marks.staged is None else None
    if marks.staged is None or snapshot > marks.staged:
        return "sealed, not yet staged"
    return "newest staged" if snapshot == marks.staged else None
