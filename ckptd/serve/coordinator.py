"""The coordinator of one incarnation: ledger and pace behind a lock, the collection of drained arrays, the commit.

It lives in the daemon of rank 0's node and stays until its last drain is committed or given up. Its memory is soft: a
new instance rebuilds it from what the daemons report.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import structlog

from ckptd.errors import CkptdError, CommitConflict
from ckptd.format.manifest import ArrayRecord, Manifest, RankRecord
from ckptd.model import Incarnation, Roster, SnapshotId
from ckptd.peers.ledger import Ledger, Outcome
from ckptd.peers.pace import Pace
from ckptd.tiers.retention import expendable
from ckptd.tiers.spec import tiers_for
from ckptd.tiers.tier import Tier
from ckptd_api.convert import schedule_entry_to_pb
from ckptd_api.v1 import coordinator_pb2 as pb
from ckptd_api.v1 import types_pb2

log = structlog.get_logger()


class Coordinator:
    """Takes reports, answers watermarks. ``on_change`` is called, without the lock, when they change by themselves."""

    def __init__(
        self,
        run: str,
        incarnation: Incarnation,
        roster: Roster,
        parent: Callable[[], SnapshotId | None],
        tiers: list[Tier],
        pace: Pace,
        stage_deadline_s: float,
        on_change: Callable[[], None],
        keeps: Callable[[], set[SnapshotId]],
    ) -> None:
        self.run = run
        self.incarnation = incarnation
        self.roster = roster
        self._parent = parent
        # Tiers of a node's own are committed here too: every rank of the run is on this node.
        self._tiers = {tier.spec.url: tier for tier in tiers}
        self._pace = pace
        self._on_change = on_change
        self._keeps = keeps
        self._lock = threading.Lock()
        self._ledger = Ledger(roster.world_size, stage_deadline_s, has_tier=bool(self._tiers))
        self._written: dict[str, dict[int, RankRecord]] = {}
        self._committing = ThreadPoolExecutor(1, thread_name_prefix="commit")

    def set_pace(self, pace: Pace) -> None:
        """The intervals a rank asked for; the first to say so counts (all ranks ask the same)."""
        with self._lock:
            if not self._pace.schedule.at(1 << 62).every_steps:
                self._pace = pace

    @property
    def is_idle(self) -> bool:
        with self._lock:
            return self._ledger.is_idle

    def report(self, request: pb.ReportRequest) -> types_pb2.Watermarks:
        """Take one node's progress in order; the watermarks after it."""
        now = time.monotonic()
        with self._lock:
            for item in request.progress:
                self._take(item, now)
            for pace in request.paces:
                self._pace.report(pace.rank, pace.step, pace.step_seconds, pace.stall_seconds)
            self._ledger.left.update(request.left)
            return self._watermarks()

    def tick(self) -> None:
        with self._lock:
            self._ledger.tick(time.monotonic())

    def close(self) -> None:
        self._committing.shutdown(wait=False, cancel_futures=True)

    def _take(self, item: pb.Progress, now: float) -> None:
        ledger = self._ledger
        if item.level == pb.LEVEL_BEGUN:
            ledger.begun(item.rank, item.step, now)
        elif item.level == pb.LEVEL_STAGED:
            ledger.sealed(item.rank, item.step, item.is_persisted, now)
        elif item.level in (pb.LEVEL_DEAD, pb.LEVEL_FREED):
            ledger.died(item.step, Outcome(item.error or "StepDead", f"rank {item.rank}: {item.reason}"))
        elif item.level == pb.LEVEL_DRAIN_FAILED and ledger.draining == item.step:
            self._give_up(item.step, f"rank {item.rank}: {item.reason}")
        elif item.level == pb.LEVEL_DRAINED and ledger.draining == item.step and item.tier in self._tiers:
            arrays = tuple(ArrayRecord(a.dtype, a.size_bytes, a.digest) for a in item.arrays)
            record = RankRecord(item.rank, item.index_bytes, item.index_crc, arrays)
            self._written.setdefault(item.tier, {})[item.rank] = record
            wanted = [spec.url for spec in tiers_for(item.step, (tier.spec for tier in self._tiers.values()))]
            if all(len(self._written.get(url, {})) == self.roster.world_size for url in wanted):
                written, self._written = self._written, {}
                self._committing.submit(self._commit, item.step, written)

    def _watermarks(self) -> types_pb2.Watermarks:
        ledger = self._ledger
        marks = types_pb2.Watermarks(
            dead=[_outcome(step, outcome) for step, outcome in sorted(ledger.dead.items())],
            not_durable=[_outcome(step, outcome) for step, outcome in sorted(ledger.not_durable.items())],
            schedule=[schedule_entry_to_pb(entry) for entry in self._pace.schedule.entries],
            roster_version=self.roster.version,
        )
        for name in ("staged", "durable", "draining"):
            if (value := getattr(ledger, name)) is not None:
                setattr(marks, name, value)
        return marks

    # --- commit --------------------------------------------------------------------------------------------------
    def _commit(self, step: int, written: dict[str, dict[int, RankRecord]]) -> None:
        """Put the manifest into every shared tier; runs on the commit thread, whose failures become an outcome."""
        snapshot = SnapshotId(self.incarnation, step)
        try:
            for url, ranks in written.items():
                self._commit_to(self._tiers[url], snapshot, ranks)
        except CkptdError as error:
            log.warning("commit given up", run=self.run, step=step, reason=error.message)
            with self._lock:
                self._give_up(step, str(error))
        except Exception as error:  # a thread's boundary: the step must end, with its reason
            log.exception("commit failed", run=self.run, step=step)
            with self._lock:
                self._give_up(step, f"{type(error).__name__}: {error}")
        else:
            with self._lock:
                self._ledger.drained(step, is_durable=any(self._tiers[url].spec.scope == "shared" for url in written))
            log.info("checkpoint durable", run=self.run, step=step)
        self._on_change()
        self._retain()

    def _commit_to(self, tier: Tier, snapshot: SnapshotId, ranks: dict[int, RankRecord]) -> None:
        manifest = Manifest(
            run=self.run,
            snapshot=snapshot,
            parent=self._parent(),
            world_size=self.roster.world_size,
            roster_version=self.roster.version,
            block_bytes=self.roster.block_bytes,
            created_at_s=time.time(),
            ranks=tuple(ranks[rank] for rank in sorted(ranks)),
        )
        try:
            tier.commit(manifest)
        except CommitConflict:
            # Somebody finished this very checkpoint before us (`prune --finish`, or we, before a restart).
            if tier.manifest(self.run, snapshot).ranks != manifest.ranks:
                raise

    def _give_up(self, step: int, reason: str) -> None:
        self._written = {}
        self._ledger.drain_failed(step, reason)

    def _retain(self) -> None:
        """Delete what the retention rule lets go; a tier that cannot be read is asked again after the next drain."""
        for tier in self._tiers.values():
            try:
                for deletion in expendable_in(tier, self.run, self._keeps()):
                    tier.delete(self.run, deletion)
            except CkptdError as error:
                log.warning("retention postponed", run=self.run, tier=tier.spec.url, reason=error.message)


def expendable_in(tier: Tier, run: str, keeps: set[SnapshotId]) -> list[SnapshotId]:
    """What retention lets go in ``tier``. ``keeps`` are leased or being drained. A checkpoint counts as verified when
    its commit is complete: every array and index that the manifest names is there."""
    stored = tier.snapshots(run)
    committed = sorted((s.snapshot for s in stored if s.is_committed), reverse=True)
    verified = set()
    for snapshot in committed[: tier.spec.keep + 1]:
        try:
            if not tier.missing(tier.manifest(run, snapshot)):
                verified.add(snapshot)
        except CkptdError as error:
            log.warning("checkpoint does not count as verified", run=run, snapshot=str(snapshot), reason=error.message)
    return [d.snapshot for d in expendable(stored, tier.spec.keep, verified, keeps, keeps)]


def _outcome(step: int, outcome: Outcome) -> types_pb2.StepOutcome:
    return types_pb2.StepOutcome(step=step, error=outcome.error, reason=outcome.reason)
