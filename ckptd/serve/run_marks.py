"""What the recycle rule must know of a run on this node, from its records, its newest start and the parity here."""

from __future__ import annotations

from ckptd.arena.arena import Arena
from ckptd.arena.records import IncarnationRecord, RunRecord
from ckptd.arena.recycle import RunMarks
from ckptd.model import SnapshotId
from ckptd.serve.node_run import NodeRun


def marks_of(record: RunRecord | None, node_run: NodeRun | None, arena: Arena) -> RunMarks:
    """``node_run``: the newest incarnation of ``record`` as taken up here; None when it is not."""
    newest = record.newest if record else None
    if record is None or newest is None:
        return RunMarks()
    if node_run is None:
        before = _parity_before(record.run, newest, arena)
        return RunMarks(newest.incarnation, newest.is_decided, newest.parent, fallbacks=before)
    staged, protected, protecting, dead, is_protected = node_run.reached()
    # Until something of this incarnation is protected, what was protected before is all that a lost node leaves.
    is_bare = bool(node_run.groups) and not is_protected
    fallbacks = _parity_before(record.run, newest, arena) if is_bare else ()
    return RunMarks(
        newest.incarnation, newest.is_decided, newest.parent, staged, protected, protecting, fallbacks, dead
    )


def _parity_before(run: str, newest: IncarnationRecord, arena: Arena) -> set[SnapshotId]:
    """Snapshots of older incarnations, not newer than the one restored, of which parity is here."""
    with arena.lock:
        held = {file.held.group.snapshot for file in arena.parity.sealed(run)}
    return {s for s in held if newest.parent and s <= newest.parent}
