"""The coordinator of one incarnation: ledger and pace behind a lock, the collection of drained arrays, the commit.

It lives in the daemon of rank 0's node and stays until its last drain is committed or given up. Its memory is soft: a
new instance rebuilds it from what the daemons report. It commits in shared tiers; each node commits in its own.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import structlog

from ckptd.erasure.groups import Group, group_of, losses_tolerated, plan_groups
from ckptd.errors import CkptdError, DrainFailed, InstanceChanged, InvalidRequest
from ckptd.format.manifest import ArrayRecord, Manifest, RankRecord
from ckptd.model import Incarnation, Roster, SnapshotId
from ckptd.peers.ledger import Ledger, Outcome
from ckptd.peers.pace import Pace
from ckptd.peers.protection import Protection
from ckptd.serve.commits import commit, retain
from ckptd.tiers.spec import tiers_for
from ckptd.tiers.tier import Tier
from ckptd_api.convert import incarnation_from_pb, schedule_entry_to_pb, snapshot_to_pb
from ckptd_api.v1 import coordinator_pb2 as pb
from ckptd_api.v1 import types_pb2

SILENT_S: Final = 10.0
MOST_PROGRESS: Final = 8192
_PROTECTION_LEVELS: Final = (pb.LEVEL_PROTECTED, pb.LEVEL_PROTECT_FAILED, pb.LEVEL_PARITY_LOST)
_RETRY_PROTECTION_S: Final = 10.0
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
        self._tiers = {tier.spec.url: tier for tier in tiers if tier.spec.scope == "shared"}
        self._pace = pace
        self._on_change = on_change
        self._keeps = keeps
        self._lock = threading.Lock()
        self._ledger = Ledger(roster.world_size, stage_deadline_s, has_tier=bool(tiers))
        self._groups: tuple[Group, ...] = plan_groups(roster)
        # Attempts of another instance of this daemon are not taken for this one's.
        self._protection = Protection(_members(self._groups), _RETRY_PROTECTION_S, attempt=secrets.randbits(48))
        self._heard_s = dict.fromkeys(roster.nodes, time.monotonic())
        self._written: dict[str, dict[int, RankRecord]] = {}
        self._drained: set[int] = set()
        self._adoptions: dict[int, str] = {}
        self._seen_silent: set[str] = set()
        self._restored: SnapshotId | None = None  # to be protected
        self._reported: set[str] = set()  # nodes
        self._is_committing = False
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

    @property
    def is_draining(self) -> bool:
        with self._lock:
            return self._ledger.draining is not None

    def report(self, request: pb.ReportRequest) -> types_pb2.Watermarks:
        """Take one node's progress in order; the watermarks after it. InvalidRequest on what no daemon of this roster
        would report."""
        self._check(request)
        now = time.monotonic()
        with self._lock:
            self._heard_s[request.node_id] = now
            self._ledger.known(
                request.staged if request.HasField("staged") else None,
                request.durable if request.HasField("durable") else None,
            )
            for item in request.progress:
                self._take(item, request.node_id, now)
            if self._ledger.staged is not None:
                self._protection.staged(SnapshotId(self.incarnation, self._ledger.staged))
            for pace in request.paces:
                self._pace.report(pace.rank, pace.step, pace.step_seconds, pace.stall_seconds)
            self._ledger.left.update(request.left)
            self._reported.add(request.node_id)
            self._protect_restored(now)
            return self._watermarks()

    def _check(self, request: pb.ReportRequest) -> None:
        if request.node_id not in self.roster.nodes:
            # Perhaps in the next version, which has not come here yet.
            raise InstanceChanged(f"node {request.node_id} is not in version {self.roster.version} of the roster")
        if len(request.progress) > MOST_PROGRESS or len(request.paces) > MOST_PROGRESS:
            raise InvalidRequest(f"a report has at most {MOST_PROGRESS} items")
        ranks = {*(p.rank for p in request.progress), *(p.rank for p in request.paces), *request.left}
        if max(ranks, default=0) >= self.roster.world_size:
            raise InvalidRequest(f"rank {max(ranks)} is not in a roster of {self.roster.world_size}")

    def tick(self) -> None:
        with self._lock:
            now = time.monotonic()
            self._ledger.tick(now)
            silent = self._silent(now)
            for node in set(silent) - self._seen_silent:
                log.warning("node not heard of", run=self.run, node=node, seconds=SILENT_S)
            self._seen_silent = set(silent)
            self._protect_restored(now)
            self._protection.tick(now, silent)
            self._adopt_drains_of(silent)

    def restored(self, snapshot: SnapshotId) -> None:
        """Every rank holds ``snapshot`` again: it is to be protected on the nodes of this roster."""
        with self._lock:
            self._restored = snapshot
            self._protect_restored(time.monotonic())

    def _protect_restored(self, now: float) -> None:
        """Not before every node could say that the run has gone on since: a coordinator that restarted would have slots
        kept for what nobody needs any more."""
        if self._ledger.newest_staged is not None:
            self._restored = None
        elif self._restored is not None and self.roster.nodes.keys() <= self._reported.union(self._silent(now)):
            self._protection.staged(self._restored)
            self._restored = None

    def safeguard(self) -> None:
        """The job stands still: make durable what is staged. Its protection goes on by itself."""
        with self._lock:
            self._ledger.safeguard()

    def hurry(self, *, is_durable: bool) -> int | None:
        """A node is about to fail: have a snapshot taken soon; the step, None when one is under way already."""
        with self._lock:
            return self._pace.demand(is_persisted=is_durable and bool(self._tiers))

    def renew(self, roster: Roster) -> None:
        """A later version of the roster."""
        with self._lock:
            if roster.version <= self.roster.version:
                return
            self.roster, self._groups = roster, plan_groups(roster)
            now = time.monotonic()
            self._heard_s = {node: self._heard_s.get(node, now) for node in roster.nodes}
            self._protection.renew(_members(self._groups))

    @property
    def groups(self) -> tuple[Group, ...]:
        return self._groups

    def _silent(self, now: float) -> list[str]:
        return sorted(node for node, heard_s in self._heard_s.items() if now - heard_s > SILENT_S)

    def close(self) -> None:
        self._committing.shutdown(wait=False, cancel_futures=True)

    def _take(self, item: pb.Progress, node: str, now: float) -> None:
        ledger = self._ledger
        if self._is_committing and item.level in (pb.LEVEL_DRAINED, pb.LEVEL_DRAIN_FAILED):
            return  # of a drain whose every shard is written
        if item.level == pb.LEVEL_BEGUN:
            ledger.begun(item.rank, item.step, now, item.roster_version)
        elif item.level == pb.LEVEL_STAGED:
            ledger.sealed(item.rank, item.step, item.is_persisted, now, item.roster_version)
        elif item.level in _PROTECTION_LEVELS:
            self._take_protection(item, node, now)
        elif item.level in (pb.LEVEL_DEAD, pb.LEVEL_FREED):
            ledger.died(item.step, Outcome(item.error or "StepDead", f"rank {item.rank}: {item.reason}"))
        elif item.level == pb.LEVEL_DRAIN_FAILED and ledger.draining == item.step:
            self._give_up(item.step, f"rank {item.rank}: {item.reason}")
        elif item.level == pb.LEVEL_DRAINED and ledger.draining == item.step and item.tier in self._tiers:
            arrays = tuple(ArrayRecord(a.dtype, a.size_bytes, a.digest) for a in item.arrays)
            record = RankRecord(item.rank, item.index_bytes, item.index_crc, arrays)
            self._written.setdefault(item.tier, {})[item.rank] = record
        elif item.level == pb.LEVEL_DRAINED and ledger.draining == item.step and not item.tier:
            self._drained.add(item.rank)
            if len(self._drained) == self.roster.world_size:
                written, self._is_committing = self._written, True
                self._end_drain()
                self._committing.submit(self._commit, item.step, written)

    def _take_protection(self, item: pb.Progress, node: str, now: float) -> None:
        if item.roster_version != self.roster.version:
            return  # of groups that are none any more
        snapshot = SnapshotId(incarnation_from_pb(item.incarnation), item.step)
        if item.level == pb.LEVEL_PROTECTED:
            self._protection.protected(node, snapshot)
        elif item.level == pb.LEVEL_PROTECT_FAILED:
            self._protection.failed(node, snapshot, item.reason, now)
        else:
            log.warning("parity lost", run=self.run, node=node, snapshot=str(snapshot), reason=item.reason)
            self._protection.parity_lost(node, snapshot, now)

    def _watermarks(self) -> types_pb2.Watermarks:
        ledger = self._ledger
        marks = types_pb2.Watermarks(
            dead=[_outcome(step, outcome) for step, outcome in sorted(ledger.dead.items())],
            not_durable=[_outcome(step, outcome) for step, outcome in sorted(ledger.not_durable.items())],
            schedule=[schedule_entry_to_pb(entry) for entry in self._pace.schedule.entries],
            roster_version=self.roster.version,
        )
        levels = {"staged": ledger.newest_staged, "durable": ledger.durable, "draining": ledger.draining}
        for name, step in levels.items():
            if step is not None:
                setattr(marks, name, step)
        self._mark_protection(marks)
        for rank, node in sorted(self._adoptions.items()):
            marks.adoptions.append(types_pb2.Adoption(rank=rank, node_id=node))
        return marks

    def _mark_protection(self, marks: types_pb2.Watermarks) -> None:
        protection, silent = self._protection, self._silent(time.monotonic())
        marks.silent_nodes.extend(silent)
        if protection.protecting is not None:
            marks.protecting.CopyFrom(snapshot_to_pb(protection.protecting))
            marks.protect_attempt = protection.attempt
        if protection.parity_of is not None:
            marks.parity_of.CopyFrom(snapshot_to_pb(protection.parity_of))
            marks.losses_tolerated = losses_tolerated(self._groups, silent)
            if protection.parity_of.incarnation == self.incarnation:
                marks.protected = protection.parity_of.step
        for snapshot, outcome in sorted(protection.not_protected.items()):
            if snapshot.incarnation == self.incarnation:
                marks.not_protected.append(_outcome(snapshot.step, outcome))

    # --- commit --------------------------------------------------------------------------------------------------
    def _commit(self, step: int, written: dict[str, dict[int, RankRecord]]) -> None:
        """Put the manifest into every shared tier; runs on the commit thread, whose failures become an outcome."""
        snapshot = SnapshotId(self.incarnation, step)
        wanted = [spec.url for spec in tiers_for(step, (tier.spec for tier in self._tiers.values()))]
        try:
            for url in wanted:
                self._commit_to(self._tiers[url], snapshot, written.get(url, {}))
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
                self._end_drain()
                self._is_committing = False
                self._ledger.drained(step, is_durable=bool(wanted))
            log.info("checkpoint durable" if wanted else "checkpoint in the nodes' tiers", run=self.run, step=step)
        self._on_change()
        retain(self._tiers.values(), self.run, self._keeps())

    def _commit_to(self, tier: Tier, snapshot: SnapshotId, ranks: dict[int, RankRecord]) -> None:
        if left_out := sorted(set(range(self.roster.world_size)) - ranks.keys()):
            nodes = sorted({self.roster.entries[rank].node_id for rank in left_out})
            raise DrainFailed(
                f"{tier.spec.url}: not written by nodes {', '.join(nodes[:8])}",
                "give every daemon the same shared tiers",
            )
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
        commit(tier, manifest)

    def _adopt_drains_of(self, silent: list[str]) -> None:
        """Shards of nodes that are gone are drained by the first survivor of their group, which reconstructs them."""
        self._adoptions = {}
        step = None if self._is_committing else self._ledger.draining
        for node in silent if step is not None else ():
            left = set(self.roster.ranks_of(node)) - self._drained
            if not left or step is None:
                continue
            group = group_of(self._groups, node)
            survivor = next((n for n in group.members if n not in silent), None) if group else None
            is_protected = self._protection.parity_of == SnapshotId(self.incarnation, step)
            if survivor is None or not is_protected:
                why = "the step is not protected" if survivor else "nobody of its parity group is left"
                self._give_up(step, f"node {node} was not heard of for {SILENT_S:g} s, and {why}")
                return
            self._adoptions |= dict.fromkeys(left, survivor)

    def _end_drain(self) -> None:
        self._written, self._drained, self._adoptions = {}, set(), {}

    def _give_up(self, step: int, reason: str) -> None:
        self._end_drain()
        self._is_committing = False
        self._ledger.drain_failed(step, reason)


def _members(groups: tuple[Group, ...]) -> frozenset[str]:
    return frozenset(node for group in groups for node in group.members)


def _outcome(step: int, outcome: Outcome) -> types_pb2.StepOutcome:
    return types_pb2.StepOutcome(step=step, error=outcome.error, reason=outcome.reason)
