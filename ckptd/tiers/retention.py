"""Which stored snapshots may go: a pure function of what is stored, verified, leased and being drained.

Layer: tiers, pure. Invariants (``tests/tiers/test_retention.py``): the newest ``keep`` committed checkpoints stay, the
newest verified one stays, nothing leased or draining goes, and while no checkpoint of the newest incarnation is
verified no checkpoint of an older one goes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ckptd.model import SnapshotId
from ckptd.tiers.tier import StoredSnapshot


@dataclass(frozen=True, slots=True)
class Deletion:
    """A snapshot that may be deleted, and why, as a clause for people."""

    snapshot: SnapshotId
    reason: str


def expendable(
    stored: Sequence[StoredSnapshot],
    keep: int,
    verified: Collection[SnapshotId],
    leased: Collection[SnapshotId],
    draining: Collection[SnapshotId],
) -> list[Deletion]:
    """What of ``stored`` may be deleted now, oldest first.

    Args:
        stored: everything the tier holds of one run, in any order.
        keep: how many of the newest committed checkpoints stay, at least 1.
        verified: checkpoints that were read in full and found whole.
        leased: snapshots under a read or any other lease.
        draining: snapshots being written or committed.
    """
    committed = sorted(entry.snapshot for entry in stored if entry.is_committed)
    if not committed:
        return []
    kept = set(committed[-max(1, keep) :])
    sound = [snapshot for snapshot in committed if snapshot in verified]
    kept.update(sound[-1:])
    held = {*leased, *draining}
    newest_ordinal = max(s.incarnation.ordinal for s in (*(entry.snapshot for entry in stored), *draining))
    is_newest_verified = any(snapshot.incarnation.ordinal == newest_ordinal for snapshot in sound)
    deletions = []
    for snapshot, is_committed in sorted(stored):
        if snapshot in held or snapshot in kept:
            continue
        if not is_committed:
            if snapshot < committed[-1]:
                deletions.append(Deletion(snapshot, f"never committed, and older than {committed[-1]}"))
        elif snapshot.incarnation.ordinal == newest_ordinal or is_newest_verified:
            deletions.append(Deletion(snapshot, f"older than the newest {keep} checkpoints"))
    return deletions
