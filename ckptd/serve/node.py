"""The daemon itself: owns arena, tiers, runs and coordinators, and knows how they act on one another."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import structlog

from ckptd.arena.arena import Arena
from ckptd.arena.records import IncarnationRecord, RunRecord, delete_record, load_records, save_record
from ckptd.arena.recycle import RunMarks
from ckptd.config import Settings
from ckptd.errors import Corrupt, DaemonUnreachable, InstanceChanged, InvalidRequest, NotPermitted, UnknownRun
from ckptd.files import write_atomic
from ckptd.metrics import Metrics
from ckptd.model import Incarnation, Roster, SnapshotId, check_run_name
from ckptd.peers.pace import Pace, Wish
from ckptd.restore.fetch import Fetcher
from ckptd.restore.inventory import MEMORY, record_in_tiers
from ckptd.serve.coordinator import Coordinator
from ckptd.serve.drainer import Drainer
from ckptd.serve.node_run import NodeRun
from ckptd.serve.sessions import Identity, Sessions
from ckptd.tiers.tier import Tier
from ckptd_api.v1 import coordinator_pb2 as pb
from ckptd_api.v1 import types_pb2

_MOST_INCARNATIONS: Final = 64
log = structlog.get_logger()


class Node:
    """Everything of a daemon but its sockets. Safe to call from any thread."""

    def __init__(self, settings: Settings, tiers: Sequence[Tier]) -> None:
        self.settings = settings
        self.instance = secrets.randbits(63) | 1
        self.metrics = Metrics()
        self.sessions = Sessions(settings.allow_group)
        self.tiers = list(tiers)
        self.arena = Arena(settings.arena, settings.memory_bytes, settings.slots)
        self.arena.marks_of = self._marks_of
        self.arena.is_ended = self.is_ended
        self.drainer = Drainer(self.tiers, self.metrics)
        self.fetcher = Fetcher(self.arena, self.tiers, self._on_corrupt)
        self.node_id = ""
        self.records: dict[str, RunRecord] = {}
        self._runs: dict[tuple[str, Incarnation], NodeRun] = {}
        self._coordinators: dict[tuple[str, Incarnation], Coordinator] = {}
        self._lock = threading.RLock()

    # --- life ----------------------------------------------------------------------------------------------------
    def open(self) -> None:
        """Adopt what is in the arena and take up the runs it belongs to; drains that were interrupted go on."""
        self.arena.open()
        self.node_id = self._read_node_id()
        for record in load_records(self.settings.arena):
            if isinstance(record, Corrupt):
                self.arena.problems.append(record.message)
                continue
            self.records[record.run] = record
            held = {slot.sealed_header.snapshot.incarnation for slot in self.arena.sealed(record.run)}
            for known in record.incarnations.values():
                # Older incarnations too: one of them may have been killed in the middle of a drain.
                if known.roster and not known.is_ended and (known is record.newest or known.incarnation in held):
                    self._take_up(record.run, known.incarnation, known.roster).report_held()

    def finish_drains(self, deadline_s: float) -> bool:
        """Wait for drains and commits; False when some are left to the next start."""
        until = time.monotonic() + deadline_s
        is_done = self.drainer.wait_idle(deadline_s)
        for run in self.node_runs():
            is_done &= run.wait_drained(max(0.0, until - time.monotonic()))
        return is_done

    def close(self) -> None:
        """Stop the threads; what is sealed stays for the next daemon."""
        self.drainer.close()
        for coordinator in self.coordinators():
            coordinator.close()
        self.arena.close()

    def _read_node_id(self) -> str:
        path = self.settings.arena / "node_id"
        if not path.exists():
            write_atomic(path, secrets.token_hex(8).encode(), sync=False)
        return path.read_text()

    def _on_corrupt(self, run: str, place: str, problem: str) -> None:
        log.error("corrupt copy set aside", run=run, place=place, problem=problem)
        self.metrics.corrupt_total.labels(run, MEMORY if place == MEMORY else "tier").inc()

    # --- runs ----------------------------------------------------------------------------------------------------
    def node_runs(self) -> list[NodeRun]:
        with self._lock:
            return list(self._runs.values())

    def record_for(self, identity: Identity, run: str) -> RunRecord:
        """The record of a run that ``identity`` may use; UnknownRun, NotPermitted."""
        record = self.records.get(check_run_name(run))
        if record is None:
            raise UnknownRun(f"run {run!r} is not known to this daemon")
        self.sessions.check(identity, record.owner, run)
        return record

    def is_ended(self, run: str) -> bool:
        """Every rank called close() in the newest incarnation; its drains may still be under way."""
        record = self.records.get(run)
        return bool(record and record.newest and record.newest.is_ended)

    def join(
        self, identity: Identity, run: str, incarnation: Incarnation, roster: Roster, rank: int, pid: int, pace: Pace
    ) -> NodeRun:
        """A rank of this node joins; the first to do so takes up the incarnation here."""
        check_run_name(run)
        if roster.coordinator.node_id != self.node_id:
            raise InvalidRequest(
                f"rank 0 of run {run} is on another node",
                "runs of more than one node are not supported yet: start every rank beside this daemon",
            )
        if roster.entries[rank].node_id != self.node_id:
            raise InstanceChanged(f"the roster places rank {rank} on node {roster.entries[rank].node_id}")
        with self._lock:
            record = self.records.setdefault(run, RunRecord(run, identity.name))
            self.sessions.check(identity, record.owner, run)
            self.check_current(run, incarnation)
            if incarnation not in record.incarnations:
                self._remember(record, IncarnationRecord(incarnation, roster.world_size, roster=roster))
                self.arena.drop_writing_before(run, incarnation)
            node_run = self._take_up(run, incarnation, roster)
        self._coordinators[run, incarnation].set_pace(pace)
        node_run.join(rank, pid)
        node_run.report_held()
        return node_run

    def check_current(self, run: str, incarnation: Incarnation) -> None:
        """InvalidRequest for a job that a newer incarnation of its run has replaced."""
        newest = self.records[run].newest
        if newest and newest.incarnation > incarnation:
            raise InvalidRequest(
                f"run {run} has gone on to incarnation {newest.incarnation}", "this job is stale: end it"
            )

    def _take_up(self, run: str, incarnation: Incarnation, roster: Roster) -> NodeRun:
        key = (run, incarnation)
        with self._lock:
            if key in self._runs:
                return self._runs[key]
            coordinator = Coordinator(
                run,
                incarnation,
                roster,
                lambda: self.parent_of(run, incarnation),
                self.tiers,
                Pace(Wish("steps", 0), Wish("steps", 0)),
                self.settings.stage_deadline_s,
                lambda: self._runs[key].report(),
                lambda: self.draining_of(run),
            )
            node_run = NodeRun(
                run,
                incarnation,
                roster,
                self.node_id,
                self.instance,
                self.arena,
                self.drainer,
                self.metrics,
                coordinator.report,
            )
            self._coordinators[key] = coordinator
            self._runs[key] = node_run
            return node_run

    def node_run(self, identity: Identity, run: str, incarnation: Incarnation) -> NodeRun:
        """The run as joined here; InstanceChanged when this instance does not know it (join again)."""
        self.record_for_join(identity, run)
        found = self._runs.get((run, incarnation))
        if found is None:
            raise InstanceChanged(f"run {run} was not joined with this instance of the daemon")
        return found

    def record_for_join(self, identity: Identity, run: str) -> None:
        record = self.records.get(run)
        if record is None:
            raise InstanceChanged(f"run {run} was not joined with this instance of the daemon")
        self.sessions.check(identity, record.owner, run)

    def coordinate(self, identity: Identity, request: pb.ReportRequest) -> types_pb2.Watermarks:
        """A report of another daemon's ranks to the coordinator here."""
        if identity.uid != 0 and identity.uid != self.arena.folder.stat().st_uid:
            raise NotPermitted("only daemons report progress")
        incarnation = Incarnation(request.incarnation.ordinal, request.incarnation.id)
        coordinator = self._coordinators.get((request.run, incarnation))
        if coordinator is None:
            raise DaemonUnreachable(f"this daemon does not coordinate run {request.run}")
        return coordinator.report(request)

    def coordinators(self) -> list[Coordinator]:
        with self._lock:
            return list(self._coordinators.values())

    def settle(self, node_run: NodeRun) -> None:
        """Mark the incarnation ended once every rank left and its drains are over: its slots go when memory is short.

        An older incarnation is ended, and forgotten, once it has nobody and nothing to drain: a newer one took over.
        """
        key = (node_run.run, node_run.incarnation)
        with self._lock:
            record, coordinator = self.records.get(node_run.run), self._coordinators.get(key)
            known = record.incarnations.get(node_run.incarnation) if record else None
            if record is None or coordinator is None or known is None:
                return
            is_overtaken = known is not record.newest and not node_run.has_members
            if node_run.is_draining or not ((node_run.has_ended and coordinator.is_idle) or is_overtaken):
                return
            if not known.is_ended:
                self._remember(record, replace(known, is_ended=True))
            if is_overtaken:
                self._coordinators.pop(key).close()
                self._runs.pop(key)

    def forget(self, run: str) -> None:
        """Drop a run's slots and record from memory: its checkpoints in the tiers stay."""
        with self._lock:
            for key in [k for k in self._runs if k[0] == run]:
                self._coordinators.pop(key).close()
                self._runs.pop(key)
            self.arena.remove_run(run)
            self.records.pop(run, None)
            delete_record(self.settings.arena, run)
        self.metrics.forget_run(run)

    # --- decisions -----------------------------------------------------------------------------------------------
    def decide(self, run: str, incarnation: Incarnation, parent: SnapshotId | None) -> None:
        """Record, in memory and in the tiers, what the incarnation restored (None: nothing), once."""
        with self._lock:
            record = self.records[run]
            known = record.incarnations[incarnation]
            if known.is_decided and known.parent == parent:
                return
            decided = replace(known, is_decided=True, parent=parent)
            self._remember(record, decided)
        for problem in record_in_tiers(self.tiers, run, decided):
            log.warning("decision is not in the tier", run=run, problem=problem)

    def parent_of(self, run: str, incarnation: Incarnation) -> SnapshotId | None:
        return self.records[run].incarnations[incarnation].parent

    def draining_of(self, run: str) -> set[SnapshotId]:
        """Snapshots that are on their way to a tier, or leased to a restore: retention leaves them alone."""
        draining = {s for node_run in self.node_runs() if node_run.run == run for s in node_run.draining_ids()}
        leased = {s.header.snapshot for s in self.arena.slots_of(run) if s.leases and s.header}
        return draining | leased

    def _remember(self, record: RunRecord, known: IncarnationRecord) -> None:
        record.incarnations[known.incarnation] = known
        while len(record.incarnations) > _MOST_INCARNATIONS:
            del record.incarnations[min(record.incarnations)]
        save_record(self.settings.arena, record)

    def _marks_of(self, run: str) -> RunMarks:
        record = self.records.get(run)
        newest = record.newest if record else None
        if newest is None:
            return RunMarks()
        node_run = self._runs.get((run, newest.incarnation))
        return RunMarks(
            current=newest.incarnation,
            is_decided=newest.is_decided,
            restored=newest.parent,
            staged=node_run.staged_id() if node_run else None,
            dead=node_run.dead_ids() if node_run else (),
        )


def open_tiers(settings: Settings) -> list[Tier]:
    """The tiers of the settings, opened; InvalidRequest or TierFailed with a hint."""
    from ckptd.tiers.spec import TierSpec
    from ckptd.tiers.zarr_tier import ZarrTier

    tiers: list[Tier] = []
    for text in settings.tiers:
        tier = ZarrTier(TierSpec.parse(text))
        tier.open()
        tiers.append(tier)
    return tiers
