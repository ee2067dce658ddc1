"""One incarnation of one run on this node: its ranks, what the coordinator last said, and what to report to it.

Events come from the services, the drainer and the protector; each is reported to the coordinator, and the watermarks in
the answer wake the ranks' watch streams and start or end drains and protection. When the coordinator cannot be reached
nothing is recycled: the last watermarks stay in force.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final, Literal, NamedTuple

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
from ckptd.serve.members import Member
from ckptd.serve.reporter import Reporter
from ckptd.serve.run_metrics import RunMetrics
from ckptd_api.convert import incarnation_to_pb, snapshot_from_pb
from ckptd_api.v1 import coordinator_pb2 as pb
from ckptd_api.v1 import types_pb2

_LOOK_S: Final = 0.2
log = structlog.get_logger()
Link = Callable[[Roster, pb.ReportRequest], pb.ReportResponse]


class Reached(NamedTuple):
    """How far a run is. ``protected`` stays when protection is withdrawn: what is left of it may still do."""

    staged: SnapshotId | None
    protected: SnapshotId | None
    protecting: SnapshotId | None
    dead: set[SnapshotId]
    is_protected: bool


class NodeRun:
    """See the module. ``link`` carries a report to the coordinator that a roster names; ``on_marks`` is called when the
    watermarks or the roster have changed; ``fetch`` brings a rank's shard into a leased slot here."""

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
        fetch: Callable[[NodeRun, SnapshotId, int], Lease],
    ) -> None:
        self.run = run
        self.incarnation = incarnation
        self.roster = roster
        self.slot_bytes: dict[int, int] = {}
        # Kept also while it is withdrawn: what is left of its parity may still make up for a loss.
        self.last_parity: SnapshotId | None = None
        self.confirmed: SnapshotId | None = None
        self.is_making_parity = False
        self.groups = plan_groups(roster)
        self.protecting: tuple[SnapshotId, int, int] | None = None  # with the roster's version and the attempt
        self.ranks: dict[int, Member] = {}
        self.watermarks = types_pb2.Watermarks()
        self.changed = threading.Condition()
        self.version = 0
        self._node_id = node_id
        self._instance = instance
        self._arena = arena
        self._drainer = drainer
        self._figures = RunMetrics(metrics, run, self._sealed_at_s())
        self._commits = commits
        self._link = link
        self._on_marks = on_marks
        self._fetch = fetch
        self._left: set[int] = set()
        self.reporter = Reporter(self)
        self._drain_leases: dict[int, dict[int, Lease]] = {}
        self._adopting: set[tuple[int, int]] = set()

    # --- ranks ---------------------------------------------------------------------------------------------------
    def join(self, rank: int, pid: int) -> None:
        with self.changed:
            known = self.ranks.get(rank)
            if known is None or known.pid != pid or known.state != "joined":  # else: it brings a later roster
                self.ranks[rank] = Member(pid)

    def prepare_slots(self, count: int) -> None:
        """Start to make ``count`` slots for each rank here, of the size that it expects to need."""
        for rank, slot_bytes in list(self.slot_bytes.items()):
            try:
                self._arena.prepare(self.run, rank, slot_bytes, count)
            except CkptdError as error:
                # Not fatal: begin() will say the same of a real size.
                log.warning("slots not prepared", run=self.run, rank=rank, reason=error.message)

    def leave(self, rank: int, state: Literal["left", "dead"], error: str = "") -> None:
        """The rank is gone: by close(), or by death, and then what it was writing is dead."""
        with self.changed:
            if rank in self.ranks:
                self.ranks[rank].go(state, error)
        self._arena.release_holder(self.holder(rank))
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

    def wake_watches(self) -> None:
        """A stream ended: whoever feeds it looks at once."""
        with self.changed:
            self.version += 1
            self.changed.notify_all()

    def _alive(self) -> int:
        return sum(rank.state == "joined" for rank in list(self.ranks.values()))

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
        self.reporter.close()

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
            *(
                self.protection(pb.LEVEL_PROTECTED, snapshot)
                for snapshot in sorted(self.parity_in_place())
                if snapshot.incarnation == self.incarnation
            ),
        )

    def parity_in_place(self) -> set[SnapshotId]:
        """The snapshots of which all parity that this node should hold is here."""
        group = group_of(self.groups, self._node_id)
        if group is None:
            return set()
        with self._arena.lock:
            held = [file.held for file in self._arena.parity.sealed(self.run)]
        found = set()
        for record in {h.group.key: h.group for h in held}.values():
            if record.geometry != group.geometry:
                continue
            if [i.ranks for i in record.images] != [self.roster.ranks_of(member) for member in group.members]:
                continue
            wanted = Stripes(record.geometry, 1).parity_of(group.position(self._node_id))
            here = {(h.stripe, h.row) for h in held if h.group.key == record.key}
            if here.issuperset(wanted):
                found.add(record.snapshot)
        return found

    def _sealed_at_s(self) -> dict[int, float]:
        """When each step of the incarnation that is here was sealed, since the epoch."""
        headers = [slot.header for slot in self._arena.sealed(self.run)]
        mine = [header for header in headers if header and header.snapshot.incarnation == self.incarnation]
        return {h.snapshot.step: h.sealed_at_s for h in sorted(mine, key=lambda h: h.sealed_at_s)}

    def protection(
        self, level: pb.Level.ValueType, snapshot: SnapshotId, reason: str = "", version: int | None = None
    ) -> pb.Progress:
        """What came of this node's parity of ``snapshot``, in groups of that roster ``version`` (None: the newest)."""
        return pb.Progress(
            step=snapshot.step,
            level=level,
            reason=reason,
            incarnation=incarnation_to_pb(snapshot.incarnation),
            roster_version=self.roster.version if version is None else version,
        )

    def report_pace(self, rank: int, step: int, step_s: float, stall_s: float) -> None:
        if rank in self.ranks:
            self.ranks[rank].step_s = step_s
        self.reporter.report(paces=[pb.Pace(rank=rank, step=step, step_seconds=step_s, stall_seconds=stall_s)])

    def report(self, *progress: pb.Progress) -> None:
        """Tell the coordinator, and take the watermarks that come back: now when it is here, else soon."""
        self.reporter.report(progress)

    @property
    def is_waiting(self) -> bool:
        """Something that this node has done is not answered by the watermarks yet."""
        staged = self.staged_id()
        mine = [s.header.snapshot for s in self._arena.sealed(self.run) if s.header]
        newest = max((s for s in mine if s.incarnation == self.incarnation), default=None)
        is_staging = newest is not None and newest not in self.dead_ids() and (staged is None or newest > staged)
        return is_staging or (self.watermarks.HasField("protecting") and not self.is_making_parity)

    @property
    def node_count(self) -> int:
        return len(self.roster.nodes)

    def request(self, progress: Sequence[pb.Progress], paces: Sequence[pb.Pace]) -> pb.ReportRequest:
        marks = self.watermarks
        return pb.ReportRequest(
            run=self.run,
            incarnation=incarnation_to_pb(self.incarnation),
            node_id=self._node_id,
            instance=self._instance,
            progress=progress,
            paces=paces,
            left=sorted(self._left),
            staged=marks.staged if marks.HasField("staged") else None,
            durable=marks.durable if marks.HasField("durable") else None,
        )

    def send(self, request: pb.ReportRequest) -> pb.ReportResponse:
        return self._link(self.roster, request)

    # --- watermarks ----------------------------------------------------------------------------------------------
    def take(self, answer: pb.ReportResponse) -> None:
        """Take the run's watermarks: free what is dead, start or end drains, wake the ranks."""
        marks = answer.watermarks
        with self.changed:
            if marks == self.watermarks:
                return
            self._figures.follow(marks)
            self.watermarks = marks
            self.version += 1
            self.last_parity = self.parity_id() or self.last_parity
            self._follow_drain(marks)
            self._follow_adoptions(marks)
            self.changed.notify_all()
        self._on_marks(self)

    def reached(self) -> Reached:
        """All of one message: watermarks may be replaced at any moment."""
        marks = self.watermarks
        parity = snapshot_from_pb(marks.parity_of) if marks.HasField("parity_of") else None
        return Reached(
            SnapshotId(self.incarnation, marks.staged) if marks.HasField("staged") else None,
            parity or self.last_parity,
            snapshot_from_pb(marks.protecting) if marks.HasField("protecting") else None,
            {SnapshotId(self.incarnation, outcome.step) for outcome in marks.dead},
            is_protected=parity is not None,
        )

    def staged_id(self) -> SnapshotId | None:
        marks = self.watermarks
        return SnapshotId(self.incarnation, marks.staged) if marks.HasField("staged") else None

    def parity_id(self) -> SnapshotId | None:
        """The snapshot that is protected everywhere."""
        marks = self.watermarks
        return snapshot_from_pb(marks.parity_of) if marks.HasField("parity_of") else None

    def protecting_id(self) -> SnapshotId | None:
        return self.reached().protecting

    def dead_ids(self) -> set[SnapshotId]:
        return {SnapshotId(self.incarnation, outcome.step) for outcome in self.watermarks.dead}

    @property
    def is_draining(self) -> bool:
        return bool(self._drain_leases)

    def wait_settled(self, timeout_s: float) -> bool:
        """True once nothing of this incarnation is on its way to a tier or to peers; without the coordinator nobody can
        say that protection is complete, so then it is not waited for."""
        until = time.monotonic() + timeout_s
        with self.changed:
            while self._drain_leases or (self.protecting is not None and self.reporter.problem is None):
                if time.monotonic() > until:
                    return False
                self.changed.wait(_LOOK_S)
        return True

    def draining_ids(self) -> set[SnapshotId]:
        return {SnapshotId(self.incarnation, step) for step in self._drain_leases}

    def _follow_drain(self, marks: types_pb2.Watermarks) -> None:
        draining = marks.draining if marks.HasField("draining") else None
        for step in [s for s in self._drain_leases if s != draining]:
            for lease in self._drain_leases.pop(step).values():
                self._arena.release(lease.id)
        if draining is None or draining in self._drain_leases:
            return
        snapshot = SnapshotId(self.incarnation, draining)
        self._drain_leases[draining] = {}
        for rank in self.roster.ranks_of(self._node_id):
            with self._arena.lock:  # nothing may be recycled between finding it and leasing it
                slot = self._arena.find_sealed(self.run, snapshot, rank)
                found = self._arena.lease(slot, f"drain/{self.run}/{snapshot}") if slot else None
            if found is None:
                reason = "its slot is not in memory any more"
                threading.Thread(target=self._drain_failed, args=(rank, draining, reason), daemon=True).start()
                continue
            self._drain(snapshot, rank, found)

    def _drain(self, snapshot: SnapshotId, rank: int, lease: Lease) -> None:
        lease.deadline_s = math.inf  # a drain may wait for long behind others; it is released when the drain ends
        self._drain_leases[snapshot.step][rank] = lease
        self._drainer.submit(Drain(self.run, snapshot, rank, lease.slot, self._commits, self.report))

    def _drain_failed(self, rank: int, step: int, reason: str) -> None:
        self.report(pb.Progress(rank=rank, step=step, level=pb.LEVEL_DRAIN_FAILED, reason=reason))

    def _follow_adoptions(self, marks: types_pb2.Watermarks) -> None:
        """Bring shards of a lost node here and drain them, when the coordinator says that it is this node's turn."""
        adopted = self._drain_leases.get(marks.draining) if marks.HasField("draining") else None
        for rank in [a.rank for a in marks.adoptions if a.node_id == self._node_id]:
            if adopted is not None and rank not in adopted and (marks.draining, rank) not in self._adopting:
                self._adopting.add((marks.draining, rank))
                threading.Thread(target=self._adopt, args=(rank, marks.draining), name="adoption", daemon=True).start()

    def _adopt(self, rank: int, step: int) -> None:
        snapshot = SnapshotId(self.incarnation, step)
        log.info("draining for a lost node", run=self.run, rank=rank, step=step)
        try:
            lease = self._fetch(self, snapshot, rank)
        except CkptdError as error:
            self._drain_failed(rank, step, f"its node is lost, and it cannot be had from peers: {error.message}")
            return
        except Exception as error:  # a thread's boundary: the drain must end, with its reason
            log.exception("adoption failed", run=self.run, rank=rank, step=step)
            self._drain_failed(rank, step, f"{type(error).__name__}: {error}")
            return
        finally:
            self._adopting.discard((step, rank))
        with self.changed:
            if step in self._drain_leases:
                self._drain(snapshot, rank, lease)
                return
        self._arena.release(lease.id)
