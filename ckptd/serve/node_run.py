"""One incarnation of one run on this node: its ranks, what the coordinator last said, and what to report to it.

Events come from the services, the drainer and the protector; each is reported to the coordinator at once (by a thread
of its own when that is another daemon), and the watermarks in the answer wake the ranks' watch streams and start or end
drains and protection. When the coordinator cannot be reached nothing is recycled (the last watermarks stay in force),
``problem`` says so, and the report is kept for the next try.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Literal

import structlog

from ckptd.arena.arena import Arena, Lease
from ckptd.erasure.groups import group_of, plan_groups
from ckptd.erasure.stripes import Stripes
from ckptd.errors import CkptdError
from ckptd.format.slot import SlotState
from ckptd.metrics import Metrics
from ckptd.model import Incarnation, Roster, SnapshotId
from ckptd.serve.commits import NodeCommits
from ckptd.serve.drainer import Drain, Drainer
from ckptd_api.convert import incarnation_to_pb, snapshot_from_pb
from ckptd_api.v1 import coordinator_pb2 as pb
from ckptd_api.v1 import types_pb2

_MOST_UNSENT: Final = 4096
log = structlog.get_logger()
Link = Callable[[Roster, pb.ReportRequest], pb.ReportResponse]
_BEAT_S: Final = 0.4
_NODES_PER_SECOND: Final = 2000  # reports that one coordinator takes


@dataclass(slots=True)
class RankState:
    """A rank of this node: ``state`` is "joined", "left" or "dead"."""

    pid: int
    state: Literal["joined", "left", "dead"]


class NodeRun:
    """See the module. ``link`` carries a report to the coordinator that a roster names; ``on_marks`` is called when the
    watermarks or the roster have changed."""

    def __init__(
        self,
        run: str,
        incarnation: Incarnation,
        roster: Roster,
        node_id: str,
        instance: int,
        arena: Arena,
        drainer: Drainer,
        commits: NodeCommits,
        metrics: Metrics,
        link: Link,
        on_marks: Callable[[NodeRun], None],
    ) -> None:
        self.run = run
        self.incarnation = incarnation
        self.roster = roster
        self.groups = plan_groups(roster)
        self.problem: CkptdError | None = None
        self.protecting: tuple[SnapshotId, int] | None = None
        self.ranks: dict[int, RankState] = {}
        self.watermarks = types_pb2.Watermarks()
        self.changed = threading.Condition()
        self.version = 0
        self._node_id = node_id
        self._instance = instance
        self._arena = arena
        self._drainer = drainer
        self._metrics = metrics
        self._commits = commits
        self._link = link
        self._on_marks = on_marks
        self._coordinator = 0  # the instance of it that answered last
        self._reported_s = 0.0
        self._queue = threading.Lock()
        self._reports = ThreadPoolExecutor(1, thread_name_prefix="reports")
        self._is_report_due = False
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

    @property
    def node_id(self) -> str:
        return self._node_id

    @property
    def is_coordinated_here(self) -> bool:
        return self.roster.coordinator.node_id == self._node_id

    def renew(self, roster: Roster) -> None:
        """A later version of the roster."""
        with self.changed:
            if roster.version <= self.roster.version:
                return
            self.roster, self.groups = roster, plan_groups(roster)
        self._on_marks(self)

    def close(self) -> None:
        self._reports.shutdown(wait=False, cancel_futures=True)

    def holder(self, rank: int) -> str:
        """The holder of this rank's leases."""
        return f"{self.run}/{self.incarnation}/{rank}"

    # --- reports -------------------------------------------------------------------------------------------------
    @staticmethod
    def dead(rank: int, step: int, error: str, reason: str) -> pb.Progress:
        return pb.Progress(rank=rank, step=step, level=pb.LEVEL_DEAD, error=error, reason=reason)

    def report_held(self) -> None:
        """Tell the coordinator what this node holds of the incarnation: after a restart of either."""
        held = [s.header for s in self._arena.sealed(self.run) if s.header]
        mine = sorted((h for h in held if h.snapshot.incarnation == self.incarnation), key=lambda h: h.snapshot.step)
        self.report(
            *(
                pb.Progress(
                    rank=h.rank,
                    step=h.snapshot.step,
                    level=pb.LEVEL_STAGED,
                    is_persisted=h.is_persisted,
                    roster_version=h.roster_version,
                )
                for h in mine
            ),
            *(self.protection(pb.LEVEL_PROTECTED, snapshot) for snapshot in self.parity_in_place()),
        )

    def parity_in_place(self) -> list[SnapshotId]:
        """The snapshots of this incarnation of which all parity that this node should hold is here."""
        group = group_of(self.groups, self._node_id)
        if group is None:
            return []
        files = self._arena.parity.sealed(self.run)
        found = {}
        for record in {f.held.group.key: f.held.group for f in files}.values():
            if record.geometry != group.geometry or record.snapshot.incarnation != self.incarnation:
                continue
            if [i.ranks for i in record.images] != [self.roster.ranks_of(member) for member in group.members]:
                continue
            wanted = Stripes(record.geometry, 1).parity_of(group.position(self._node_id))
            here = {(f.held.stripe, f.held.row) for f in files if f.held.group.key == record.key}
            if here.issuperset(wanted):
                found[record.snapshot] = True
        return sorted(found)

    def protection(self, level: pb.Level.ValueType, snapshot: SnapshotId, reason: str = "") -> pb.Progress:
        """What came of this node's parity of ``snapshot``."""
        return pb.Progress(
            step=snapshot.step,
            level=level,
            reason=reason,
            incarnation=incarnation_to_pb(snapshot.incarnation),
            roster_version=self.roster.version,
        )

    def report_pace(self, rank: int, step: int, step_s: float, stall_s: float) -> None:
        with self._queue:
            self._paces.append(pb.Pace(rank=rank, step=step, step_seconds=step_s, stall_seconds=stall_s))
        self.report()

    def report(self, *progress: pb.Progress) -> None:
        """Send ``progress``, and what could not be sent before, and take the watermarks that come back: now when the
        coordinator is here, else soon, so that no caller waits for another node."""
        with self._queue:
            self._unsent = [*self._unsent, *progress][-_MOST_UNSENT:]
        if self.is_coordinated_here:
            self._send()
            return
        with self._queue:
            if self._is_report_due:
                return
            self._is_report_due = True
        with suppress(RuntimeError):  # closed: the run is over here
            self._reports.submit(self._send)

    def beat(self) -> None:
        """Report as a sign of life, when nothing was reported for a while: the more nodes, the longer."""
        wait_s = _BEAT_S + (0 if self.is_coordinated_here else len(self.roster.nodes) / _NODES_PER_SECOND)
        if time.monotonic() - self._reported_s > wait_s:
            self.report()

    def hear(self) -> None:
        """Have watermarks of the coordinator, or raise why there are none: a rank without a schedule would skip what
        the others take."""
        if self._coordinator == 0:
            self._send()
        if self._coordinator == 0 and self.problem is not None:
            raise self.problem

    def _send(self) -> None:
        with self._sending:
            with self._queue:
                self._is_report_due = False
                progress, paces, self._unsent, self._paces = self._unsent, self._paces, [], []
            self._reported_s = time.monotonic()
            request = pb.ReportRequest(
                run=self.run,
                incarnation=incarnation_to_pb(self.incarnation),
                node_id=self._node_id,
                instance=self._instance,
                progress=progress,
                paces=paces,
                left=sorted(self._left),
            )
            try:
                answer = self._link(self.roster, request)
            except CkptdError as error:
                with self._queue:
                    self._unsent = [*progress, *self._unsent][-_MOST_UNSENT:]
                self._note(error)
                return
            self._note(None)
            is_new = self._coordinator not in (0, answer.instance)
            self._coordinator = answer.instance
            self._apply(answer.watermarks)  # under the lock, so that an older answer never overtakes a newer one
        if is_new:
            self.report_held()

    def _note(self, problem: CkptdError | None) -> None:
        if (problem is None) != (self.problem is None):
            if problem:
                log.warning("coordinator cannot be reached", run=self.run, reason=problem.message)
            else:
                log.info("coordinator is back", run=self.run)
        self.problem = problem

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
        self._on_marks(self)

    def staged_id(self) -> SnapshotId | None:
        marks = self.watermarks
        return SnapshotId(self.incarnation, marks.staged) if marks.HasField("staged") else None

    def parity_id(self) -> SnapshotId | None:
        """The snapshot that is protected everywhere."""
        return snapshot_from_pb(self.watermarks.parity_of) if self.watermarks.HasField("parity_of") else None

    def protecting_id(self) -> SnapshotId | None:
        return snapshot_from_pb(self.watermarks.protecting) if self.watermarks.HasField("protecting") else None

    def dead_ids(self) -> set[SnapshotId]:
        return {SnapshotId(self.incarnation, outcome.step) for outcome in self.watermarks.dead}

    @property
    def is_draining(self) -> bool:
        return bool(self._drain_leases)

    def wait_settled(self, timeout_s: float) -> bool:
        """True once nothing of this incarnation is on its way to a tier or to peers."""
        with self.changed:
            return self.changed.wait_for(lambda: not self._drain_leases and self.protecting is None, timeout_s)

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
            self._drainer.submit(Drain(self.run, snapshot, rank, slot, self._commits, self.report))

    def _lost(self, rank: int, step: int) -> None:
        reason = "its slot is not in memory any more"
        self.report(pb.Progress(rank=rank, step=step, level=pb.LEVEL_DRAIN_FAILED, reason=reason))

    def _count(self, old: types_pb2.Watermarks, new: types_pb2.Watermarks) -> None:
        for level in ("staged", "protected", "durable"):
            if new.HasField(level) and (not old.HasField(level) or getattr(new, level) != getattr(old, level)):
                self._metrics.snapshot_step.labels(self.run, level).set(getattr(new, level))
                self._metrics.snapshot_timestamp_seconds.labels(self.run, level).set_to_current_time()
        fresh = {outcome.step for outcome in new.dead} - self._dead_seen
        self._metrics.dead_steps_total.labels(self.run).inc(len(fresh))
        self._dead_seen = {outcome.step for outcome in new.dead}
        failed = {o.step for o in new.not_durable if o.error == "DrainFailed"}
        if new.HasField("losses_tolerated"):
            self._metrics.losses_tolerated.labels(self.run).set(new.losses_tolerated)
        before = {o.step for o in old.not_durable if o.error == "DrainFailed"}
        self._metrics.commits_total.labels(self.run, "failed").inc(len(failed - before))
        if new.HasField("durable") and (not old.HasField("durable") or new.durable != old.durable):
            self._metrics.commits_total.labels(self.run, "committed").inc()
