"""Between a run's watermarks and the protector: what is to be protected, what came of it, which parity may go."""

from __future__ import annotations

import threading
from collections.abc import Callable

import structlog

from ckptd.arena.arena import Arena
from ckptd.arena.recycle import RunMarks, why_kept
from ckptd.erasure.groups import group_of
from ckptd.format.slot import SlotState
from ckptd.model import SnapshotId
from ckptd.peers.protect import Protector, Task
from ckptd.serve.node_run import NodeRun
from ckptd_api.convert import snapshot_from_pb
from ckptd_api.v1 import coordinator_pb2 as pb

log = structlog.get_logger()


class Protecting:
    """See the module. ``marks_of(run)`` is what the recycle rule knows of a run."""

    def __init__(self, arena: Arena, protector: Protector, marks_of: Callable[[str], RunMarks]) -> None:
        self._arena = arena
        self._protector = protector
        self._marks_of = marks_of

    def follow(self, run: NodeRun) -> None:
        """The watermarks or the roster of ``run`` have changed."""
        self.recycle(run.run)
        self._confirm(run)
        with run.changed:  # one at a time, and all of one message: the last to come here has the newest
            marks, roster = run.watermarks, run.roster
            snapshot = snapshot_from_pb(marks.protecting) if marks.HasField("protecting") else None
            wanted = (snapshot, roster.version, marks.protect_attempt) if snapshot else None
            if wanted == run.protecting:
                return
            run.protecting = wanted
            group = group_of(run.groups, run.node_id)
        if snapshot is None or wanted is None or group is None:
            return

        def report(problem: str | None) -> None:
            if run.protecting != wanted:
                return
            run.is_making_parity = False
            level = pb.LEVEL_PROTECTED if problem is None else pb.LEVEL_PROTECT_FAILED
            run.report(run.protection(level, snapshot, problem or "", roster.version))

        run.is_making_parity = True
        self._protector.submit(
            Task(
                run=run.run,
                snapshot=snapshot,
                roster=roster,
                group=group,
                node_id=run.node_id,
                is_wanted=lambda: run.protecting == wanted,
                report=report,
            )
        )

    def _confirm(self, run: NodeRun) -> None:
        """Withdraw what counts as protected when this node's part is not here: a daemon that restarted may have found
        its parity damaged."""
        snapshot = run.parity_id()
        if snapshot == run.confirmed:
            return
        run.confirmed = snapshot
        if snapshot and group_of(run.groups, run.node_id) and snapshot not in run.parity_in_place():
            # Reports are answered by what calls this: a thread, so that it does not wait for itself.
            reason = "not in memory after a restart"
            threading.Thread(target=self.withdraw, args=(run, snapshot, reason), daemon=True).start()

    def recycle(self, run: str) -> None:
        """Free the parity of snapshots whose shards need not be kept either."""
        with self._arena.lock:  # a fragment that is sealed meanwhile must not be missing from what is kept
            marks = self._marks_of(run)
            held = {file.held.group.snapshot for file in self._arena.parity.sealed(run)}
            self._arena.parity.recycle(run, {snapshot for snapshot in held if _is_kept(snapshot, marks)})

    def withdraw(self, run: NodeRun, snapshot: SnapshotId, reason: str) -> None:
        """Parity of ``snapshot`` that was reported in place is not there any more."""
        run.report(run.protection(pb.LEVEL_PARITY_LOST, snapshot, reason))


def _is_kept(snapshot: SnapshotId, marks: RunMarks) -> bool:
    return why_kept(SlotState.SEALED, snapshot, is_leased=False, marks=marks) is not None
