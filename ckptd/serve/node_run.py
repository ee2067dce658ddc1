"""One incarnation of one run on this node: its ranks, what the coordinator last said, and what to report to it.

Events come from the services and from the drainer; each is reported to the coordinator at once, and the watermarks in
the answer wake the ranks' watch streams and start or end drains. When the coordinator cannot be reached nothing is
recycled (the last watermarks stay in force) and the report is kept for the next try.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import structlog

from ckptd.arena.arena import Arena, Lease
from ckptd.errors import CkptdError
from ckptd.format.slot import SlotState
from ckptd.metrics import Metrics
from ckptd.model import Incarnation, Roster, SnapshotId
from ckptd.serve.drainer import Drain, Drainer
from ckptd_api.convert import incarnation_to_pb
from ckptd_api.v1 import coordinator_pb2 as pb
from ckptd_api.v1 import types_pb2

_MOST_UNSENT: Final = 4096
log = structlog.get_logger()
Link = Callable[[pb.ReportRequest], types_pb2.Watermarks]


@dataclass(slots=True)
class RankState:
    """A rank of this node: ``state`` is "joined", "left" or "dead"."""

    pid: int
    state: Literal["joined", "left", "dead"]


class NodeRun:
    """See the module. ``link`` carries a report to the coordinator, wherever it is."""

    def __init__(
        self,
        run: str,
        incarnation: Incarnation,
        roster: Roster,
        node_id: str,
        instance: int,
        arena: Arena,
        drainer: Drainer,
        metrics: Metrics,
        link: Link,
    ) -> None:
        self.run = run
        self.incarnation = incarnation
        self.roster = roster
        self.ranks: dict[int, RankState] = {}
        self.watermarks = types_pb2.Watermarks()
        self.changed = threading.Condition()
        self.version = 0
        self._node_id = node_id
        self._instance = instance
        self._arena = arena
        self._drainer = drainer
        self._metrics = metrics
        self._link = link
        self._unsent: list[pb.Progress] = []
        self._paces: list[pb.Pace] = []
        self._left: set[int] = set()
        self._sending = threading.Lock()
        self._drain_leases: dict[int, list[Lease]] = {}
        self._dead_seen: set[int] = set()

    # --- ranks ---------------------------------------------------------------------------------------------------
    def join(self, rank: int, pid: int) -> None:
        with self.changed:
            self.ranks[rank] = RankState(pid, "joined")
        self._metrics.ranks.labels(self.run).set(self._alive())

    def leave(self, rank: int, state: Literal["left", "dead"]) -> None:
        """The rank is gone: by close(), or by death, and then what it was writing is dead."""
        with self.changed:
            if rank in self.ranks:
                self.ranks[rank].state = state
        self._arena.release_holder(self.holder(rank))
        self._metrics.ranks.labels(self.run).set(self._alive())
        for slot in self._arena.slots_of(self.run, rank):
            header = slot.header
            if slot.state is SlotState.WRITING and header and header.snapshot.incarnation == self.incarnation:
                self._arena.take_back(slot)
                self.report(
                    self.dead(rank, header.snapshot.step, "StepDead", f"rank {rank} {state} while it was saving")
                )
        if state == "left":
            self._left.add(rank)
            self.report()

    def _alive(self) -> int:
        return sum(rank.state == "joined" for rank in self.ranks.values())

    @property
    def has_members(self) -> bool:
        """Some rank of this node is joined."""
        return self._alive() > 0

    @property
    def has_ended(self) -> bool:
        """Every rank of this node called close()."""
        mine = set(self.roster.ranks_of(self._node_id))
        return mine <= self._left

    def holder(self, rank: int) -> str:
        """The holder of this rank's leases."""
        return f"{self.run}/{self.incarnation}/{rank}"

    # --- reports -------------------------------------------------------------------------------------------------
    @staticmethod
    def dead(rank: int, step: int, error: str, reason: str) -> pb.Progress:
        return pb.Progress(rank=rank, step=step, level=pb.LEVEL_DEAD, error=error, reason=reason)

    def report_held(self) -> None:
        """Tell the coordinator what this node holds sealed of the incarnation: after a restart of either."""
        held = [s.header for s in self._arena.sealed(self.run) if s.header]
        mine = sorted((h for h in held if h.snapshot.incarnation == self.incarnation), key=lambda h: h.snapshot.step)
        self.report(
            *(
                pb.Progress(rank=h.rank, step=h.snapshot.step, level=pb.LEVEL_STAGED, is_persisted=h.is_persisted)
                for h in mine
            )
        )

    def report_pace(self, rank: int, step: int, step_s: float, stall_s: float) -> None:
        with self._sending:
            self._paces.append(pb.Pace(rank=rank, step=step, step_seconds=step_s, stall_seconds=stall_s))
        self.report()

    def report(self, *progress: pb.Progress) -> None:
        """Send ``progress``, and what could not be sent before, and take the watermarks that come back."""
        with self._sending:
            self._unsent = [*self._unsent, *progress][-_MOST_UNSENT:]
            request = pb.ReportRequest(
                run=self.run,
                incarnation=incarnation_to_pb(self.incarnation),
                node_id=self._node_id,
                instance=self._instance,
                progress=self._unsent,
                paces=self._paces,
                left=sorted(self._left),
            )
            try:
                marks = self._link(request)
            except CkptdError as error:
                log.warning("coordinator cannot be reached", run=self.run, reason=error.message)
                return
            self._unsent, self._paces = [], []
            self._apply(marks)  # under the lock, so that an older answer never overtakes a newer one

    # --- watermarks ----------------------------------------------------------------------------------------------
    def _apply(self, marks: types_pb2.Watermarks) -> None:
        """Take the run's watermarks: free what is dead, start or end drains, wake the ranks."""
        with self.changed:
            if marks == self.watermarks:
                return
            self._count(self.watermarks, marks)
            self.watermarks = marks
            self.version += 1
            self._follow_drain(marks)
            self.changed.notify_all()

    def staged_id(self) -> SnapshotId | None:
        marks = self.watermarks
        return SnapshotId(self.incarnation, marks.staged) if marks.HasField("staged") else None

    def dead_ids(self) -> set[SnapshotId]:
        return {SnapshotId(self.incarnation, outcome.step) for outcome in self.watermarks.dead}

    @property
    def is_draining(self) -> bool:
        return bool(self._drain_leases)

    def wait_drained(self, timeout_s: float) -> bool:
        """True once nothing of this incarnation is on its way to a tier."""
        with self.changed:
            return self.changed.wait_for(lambda: not self._drain_leases, timeout_s)

    def draining_ids(self) -> set[SnapshotId]:
        return {SnapshotId(self.incarnation, step) for step in self._drain_leases}

    def _follow_drain(self, marks: types_pb2.Watermarks) -> None:
        draining = marks.draining if marks.HasField("draining") else None
        for step in [s for s in self._drain_leases if s != draining]:
            for lease in self._drain_leases.pop(step):
                self._arena.release(lease.id)
        if draining is None or draining in self._drain_leases:
            return
        snapshot = SnapshotId(self.incarnation, draining)
        self._drain_leases[draining] = []
        for rank in self.roster.ranks_of(self._node_id):
            slot = self._arena.find_sealed(self.run, snapshot, rank)
            if slot is None:
                log.warning("nothing to drain", run=self.run, rank=rank, step=draining)
                threading.Thread(target=self._lost, args=(rank, draining), daemon=True).start()
                continue
            self._drain_leases[draining].append(self._arena.lease(slot, f"drain/{self.run}/{snapshot}"))
            self._drainer.submit(Drain(self.run, snapshot, rank, slot, self.report))

    def _lost(self, rank: int, step: int) -> None:
        reason = "its slot is not in memory any more"
        self.report(pb.Progress(rank=rank, step=step, level=pb.LEVEL_DRAIN_FAILED, reason=reason))

    def _count(self, old: types_pb2.Watermarks, new: types_pb2.Watermarks) -> None:
        for level in ("staged", "durable"):
            if new.HasField(level) and (not old.HasField(level) or getattr(new, level) != getattr(old, level)):
                self._metrics.snapshot_step.labels(self.run, level).set(getattr(new, level))
                self._metrics.snapshot_timestamp_seconds.labels(self.run, level).set_to_current_time()
        fresh = {outcome.step for outcome in new.dead} - self._dead_seen
        self._metrics.dead_steps_total.labels(self.run).inc(len(fresh))
        self._dead_seen = {outcome.step for outcome in new.dead}
        failed = {o.step for o in new.not_durable if o.error == "DrainFailed"}
        before = {o.step for o in old.not_durable if o.error == "DrainFailed"}
        self._metrics.commits_total.labels(self.run, "failed").inc(len(failed - before))
        if new.HasField("durable") and (not old.HasField("durable") or new.durable != old.durable):
            self._metrics.commits_total.labels(self.run, "committed").inc()
