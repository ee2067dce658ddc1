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
from ckptd.erasure.groups import explain
from ckptd.errors import Corrupt, DaemonUnreachable, InstanceChanged, InvalidRequest, UnknownRun
from ckptd.files import write_atomic
from ckptd.metrics import Metrics
from ckptd.model import Incarnation, Roster, SnapshotId, check_run_name
from ckptd.peers.corruption import PARITY, SLOTS
from ckptd.peers.pace import Pace, Wish
from ckptd.restore.inventory import record_in_tiers
from ckptd.serve.commits import NodeCommits, manifest_of_node
from ckptd.serve.coordinator import Coordinator
from ckptd.serve.diagnosis.diagnosis import Diagnosis
from ckptd.serve.drainer import Drainer
from ckptd.serve.node_run import NodeRun
from ckptd.serve.peering import Peering, check_addresses
from ckptd.serve.run_marks import marks_of
from ckptd.serve.scrubber import Scrubber
from ckptd.serve.sessions import Identity, Sessions
from ckptd.tiers.tier import Tier
from ckptd_api.convert import incarnation_from_pb
from ckptd_api.v1 import coordinator_pb2 as pb

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
        self.arena.marks_of = self.marks_of
        self.arena.is_ended = self.is_ended
        self.node_id = ""
        self.drainer = Drainer(self.tiers, self.metrics)
        self.peering = Peering(settings, self.arena, self.tiers, self.metrics, self)
        self.scrubber = Scrubber(self)
        self.diagnosis = Diagnosis(self)
        self.records: dict[str, RunRecord] = {}
        self._runs: dict[tuple[str, Incarnation], NodeRun] = {}
        self._coordinators: dict[tuple[str, Incarnation], Coordinator] = {}
        self._lock = threading.RLock()

    @property
    def address(self) -> str:
        """HOST:PORT at which peers reach this daemon; "" when they cannot."""
        return self.peering.cluster.address

    # --- life ----------------------------------------------------------------------------------------------------
    def open(self) -> None:
        """Adopt what is in the arena and take up the runs it belongs to; drains that were interrupted go on."""
        self.arena.open()
        self.node_id = self.peering.cluster.node_id = self._read_node_id()
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
        """Wait for drains, commits and protection; False when some are left to the next start."""
        until = time.monotonic() + deadline_s
        is_done = self.drainer.wait_idle(deadline_s)
        for run in self.node_runs():
            is_done &= run.wait_settled(max(0.0, until - time.monotonic()))
        return is_done

    def close(self) -> None:
        """Stop the threads; what is sealed stays for the next daemon."""
        self.scrubber.close()
        self.diagnosis.close()
        self.peering.close()
        self.drainer.close()
        for run in self.node_runs():
            run.close()
        for coordinator in self.coordinators():
            coordinator.close()
        self.arena.close()

    def _read_node_id(self) -> str:
        path = self.settings.arena / "node_id"
        if not path.exists():
            write_atomic(path, secrets.token_hex(8).encode(), sync=False)
        return path.read_text()

    def on_corrupt(self, run: str, place: str, problem: str) -> None:
        log.error("corrupt copy set aside", run=run, place=place, problem=problem)
        self.metrics.corrupt_total.labels(run, place if place in (SLOTS, PARITY) else "tier").inc()

    def on_repaired(self, run: str) -> None:
        self.metrics.repaired_total.labels(run, "slot").inc()

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
        check_addresses(roster)
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
            coordinator = self._coordinators.get((run, incarnation))
        if coordinator is not None:
            coordinator.set_pace(pace)
        node_run.join(rank, pid)
        node_run.report_held()
        node_run.reporter.hear()
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
            if roster.coordinator.node_id == self.node_id:
                self._coordinate(run, incarnation, roster)
            if key in self._runs:
                self._renew(key, roster)
                return self._runs[key]
            if note := explain(roster):
                log.warning("less protection than was asked for", run=run, reason=note)
            self.metrics.begin_run(run)
            node_run = NodeRun(
                run,
                incarnation,
                roster,
                self.node_id,
                self.instance,
                self.arena,
                self.drainer,
                NodeCommits(
                    lambda: set(node_run.roster.ranks_of(self.node_id)),
                    lambda snapshot, records: manifest_of_node(
                        run, snapshot, self.parent_of(run, incarnation), node_run.roster, records
                    ),
                    lambda: self.draining_of(run),
                ),
                self.metrics,
                self._report,
                self.peering.protecting.follow,
                self.peering.adopt,
            )
            self._runs[key] = node_run
            return node_run

    def _coordinate(self, run: str, incarnation: Incarnation, roster: Roster) -> None:
        """Take the coordinator of the incarnation up, or give it a later roster."""
        key = (run, incarnation)
        if key in self._coordinators:
            self._coordinators[key].renew(roster)
            return
        coordinator = self._coordinators[key] = Coordinator(
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
        known = self.records[run].incarnations[incarnation]
        if known.is_decided and known.parent:
            coordinator.restored(known.parent)

    def _renew(self, key: tuple[str, Incarnation], roster: Roster) -> None:
        if roster.version > self._runs[key].roster.version:
            record = self.records[key[0]]
            self._remember(record, replace(record.incarnations[key[1]], roster=roster))
            self._runs[key].renew(roster)

    def _report(self, roster: Roster, request: pb.ReportRequest) -> pb.ReportResponse:
        """Carry a report to the coordinator: here, or in another daemon."""
        coordinator = roster.coordinator
        if coordinator.node_id == self.node_id:
            return self._take_report(request)
        if not coordinator.address:
            raise DaemonUnreachable("rank 0 has no daemon, so nobody coordinates")
        peer = self.peering.channels.peer(coordinator.address)
        answer: pb.ReportResponse = peer.call(peer.coordinator.Report, request)
        return answer

    def _take_report(self, request: pb.ReportRequest) -> pb.ReportResponse:
        incarnation = incarnation_from_pb(request.incarnation)
        coordinator = self._coordinators.get((request.run, incarnation))
        if coordinator is None:
            raise DaemonUnreachable(f"this daemon does not coordinate incarnation {incarnation} of run {request.run}")
        marks = coordinator.report(request)
        here = self._runs.get((request.run, incarnation))
        if here is not None and request.node_id != self.node_id and marks != here.watermarks:
            here.report()  # what another node's report has changed is news to this one's ranks
        return pb.ReportResponse(watermarks=marks, instance=self.instance)

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

    def coordinate(self, identity: Identity, request: pb.ReportRequest) -> pb.ReportResponse:
        """A report of another daemon's ranks to the coordinator here."""
        self.sessions.check_peer(identity)
        return self._take_report(request)

    def find_run(self, run: str, incarnation: Incarnation) -> NodeRun | None:
        """The incarnation as taken up here."""
        return self._runs.get((run, incarnation))

    def nodes_at_fault(self, run: str) -> frozenset[str]:
        return self.diagnosis.nodes_at_fault(run)

    def records_of(self, run: str) -> RunRecord | None:
        return self.records.get(run)

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
            if record is None or known is None:
                return
            is_overtaken = known is not record.newest and not node_run.has_members
            # The coordinator stays while any node has something to drain, ranks of the present start while they do.
            is_over = is_overtaken or (node_run.has_ended and (coordinator is None or coordinator.is_idle))
            if node_run.is_draining or (coordinator and coordinator.is_draining) or not is_over:
                return
            if not known.is_ended:
                self._remember(record, replace(known, is_ended=True))
            elif not is_overtaken:
                return
            if is_overtaken:
                self._drop(key)
            else:
                node_run.close()
            if self.is_ended(node_run.run) or not any(run == node_run.run for run, _ in self._runs):
                self.metrics.forget_run(node_run.run)

    def is_over(self, run: str, incarnation: Incarnation) -> bool:
        """It has ended, and nothing newer has begun: there is nothing to look after."""
        newest = record.newest if (record := self.records.get(run)) else None
        return newest is not None and newest.incarnation == incarnation and newest.is_ended

    def forget(self, run: str) -> None:
        """Drop a run's slots and record from memory: its checkpoints in the tiers stay."""
        with self._lock:
            for key in [k for k in self._runs if k[0] == run]:
                self._drop(key)
            self.arena.remove_run(run)
            self.records.pop(run, None)
            delete_record(self.settings.arena, run)
        self.metrics.forget_run(run)

    def _drop(self, key: tuple[str, Incarnation]) -> None:
        if coordinator := self._coordinators.pop(key, None):
            coordinator.close()
        self._runs.pop(key).close()

    # --- decisions -----------------------------------------------------------------------------------------------
    def decide(self, run: str, incarnation: Incarnation, parent: SnapshotId | None) -> None:
        """Record what the incarnation restored (None: nothing), once: with every daemon of the run, then in the tiers.
        RestoreUndecided when a daemon cannot be told."""
        known = self.records[run].incarnations[incarnation]
        if known.is_decided and known.parent == parent:
            return
        roster = self._runs[run, incarnation].roster
        self.peering.cluster.record_decision(run, incarnation, roster, parent)
        self._record_in_tiers(run, self.remember_decision(run, incarnation, roster, parent))
        self.peering.cluster.tell_left_out(run, incarnation, roster, parent)
        coordinator = self._coordinators.get((run, incarnation))
        if coordinator and parent:
            coordinator.restored(parent)

    def decide_by_saving(self, run: str, incarnation: Incarnation) -> None:
        """A first save without a restore before it: the incarnation starts from nothing. Each node finds that out by
        itself, so none waits for another."""
        node_run = self._runs[run, incarnation]
        decided = self.remember_decision(run, incarnation, node_run.roster, None)
        if node_run.is_coordinated_here:
            self._record_in_tiers(run, decided)
            self.peering.cluster.tell_left_out(run, incarnation, node_run.roster, None)

    def _record_in_tiers(self, run: str, decided: IncarnationRecord) -> None:
        for problem in record_in_tiers(self.tiers, run, decided):
            log.warning("decision is not in the tier", run=run, problem=problem)

    def remember_decision(
        self, run: str, incarnation: Incarnation, roster: Roster, parent: SnapshotId | None
    ) -> IncarnationRecord:
        """Record the decision on this node. A run not known here yet belongs to whoever joins it first."""
        with self._lock:
            record = self.records.get(run)
            if record is None:
                raise InstanceChanged(f"run {run} was not joined with this instance of the daemon")
            new = IncarnationRecord(incarnation, roster.world_size, roster=roster)
            decided = replace(record.incarnations.get(incarnation, new), is_decided=True, parent=parent)
            self._remember(record, decided)
        if node_run := self._runs.get((run, incarnation)):
            node_run.prepare_slots(self.settings.slots)
        return decided

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

    def marks_of(self, run: str) -> RunMarks:
        record = self.records.get(run)
        newest = record.newest if record else None
        return marks_of(record, self._runs.get((run, newest.incarnation)) if newest else None, self.arena)
