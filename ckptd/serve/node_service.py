"""NodeService: what a training process asks of its daemon. Translates, checks who asks, and calls the node."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

import grpc
import structlog

import ckptd
from ckptd.arena.slot import Slot
from ckptd.errors import (
    CkptdError,
    CoordinatorUnreachable,
    InstanceChanged,
    InvalidRequest,
    SlotNotReady,
    StepDead,
    StepRepeated,
    Torn,
)
from ckptd.failpoints import failpoint
from ckptd.format.blocks import SlotLayout
from ckptd.format.slot import SlotHeader, SlotState
from ckptd.model import Segment, SnapshotId, check_run_name
from ckptd.peers.pace import Pace, Wish
from ckptd.restore.candidates import find_step, order_candidates
from ckptd.restore.inventory import MEMORY, available, check_nothing_lost, explain_lost, incarnations
from ckptd.serve.bulk import receive
from ckptd.serve.node import Node
from ckptd.serve.node_run import NodeRun
from ckptd.serve.preparing import prepare_slots
from ckptd.serve.rpc import caller
from ckptd.serve.run_metrics import tier_label
from ckptd.serve.sessions import Identity
from ckptd.tiers.tier import Tier
from ckptd_api.convert import (
    incarnation_from_pb,
    roster_entry_from_pb,
    roster_from_pb,
    snapshot_from_pb,
    snapshot_to_pb,
)
from ckptd_api.v1 import coordinator_pb2, node_pb2_grpc, types_pb2
from ckptd_api.v1 import node_pb2 as pb

_HEARTBEAT_S: Final = 1.0
_READ_BYTES: Final = 2 * 1024 * 1024
_MOST_RANKS: Final = 1 << 20
_MOST_ERROR: Final = 500
log = structlog.get_logger()


class NodeService(node_pb2_grpc.NodeServiceServicer):
    """One method a call of the wire; errors become gRPC status in ``rpc.Boundary``."""

    def __init__(self, node: Node, tcp_identity: Identity | None) -> None:
        self._node = node
        self._tcp_identity = tcp_identity

    # --- session, membership ---------------------------------------------------------------------------------------
    def OpenSession(self, request: pb.OpenSessionRequest, context: grpc.ServicerContext) -> pb.OpenSessionResponse:
        """Over TCP: the client certificate's name stands for the uid; without TLS (loopback), the daemon's own uid."""
        names: Any = context.auth_context().get("x509_common_name", [])
        if names:
            identity = Identity(f"cert:{names[0].decode()}", 65534)
        elif self._tcp_identity and not context.peer().startswith("unix:"):
            identity = self._tcp_identity
        else:
            raise InvalidRequest("on a Unix socket the session comes from the fd socket beside it")
        return pb.OpenSessionResponse(token=self._node.sessions.open(identity), instance=self._node.instance)

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.DescribeResponse:
        node = self._node
        return pb.DescribeResponse(
            instance=node.instance,
            node_id=node.node_id,
            address=node.address,
            domains=dict(d.split("=", 1) for d in node.settings.domains),
            protect_max=node.settings.protect_max,
            slots=node.settings.slots,
            memory_bytes=node.settings.memory_bytes,
            tiers=[tier.spec.url for tier in node.tiers if tier.spec.scope == "shared"],
            version=ckptd.__version__,
        )

    def Survey(self, request: pb.SurveyRequest, context: grpc.ServicerContext) -> pb.SurveyResponse:
        run = check_run_name(request.run)
        self._check_if_known(run)
        _check_world_size(len(request.entries))
        entries = [roster_entry_from_pb(entry) for entry in request.entries]
        found = self._node.peering.cluster.survey(run, entries)
        known = incarnations(found.records, self._node.tiers, run)
        return pb.SurveyResponse(highest_ordinal=max((i.ordinal for i in known), default=0))

    def Join(self, request: pb.JoinRequest, context: grpc.ServicerContext) -> pb.JoinResponse:
        roster, incarnation = roster_from_pb(request.roster), incarnation_from_pb(request.incarnation)
        _check_world_size(roster.world_size)
        if request.rank >= roster.world_size:
            raise InvalidRequest(f"rank {request.rank} is not in a roster of {roster.world_size}")
        pace = Pace(_wish(request.every), _persist_wish(request.persist_every, self._node.tiers))
        run = self._node.join(caller(), request.run, incarnation, roster, request.rank, request.pid, pace)
        if request.estimated_bytes:
            decided = self._node.records[run.run].incarnations[run.incarnation].is_decided
            prepare_slots(run, request.rank, request.estimated_bytes, self._node.settings, is_decided=decided)
        self._node.diagnosis.watch_process(run, request.rank, caller().pid)
        return pb.JoinResponse(instance=self._node.instance, watermarks=run.watermarks)

    def Watch(self, request: pb.WatchRequest, context: grpc.ServicerContext) -> Iterator[pb.WatchResponse]:
        """Watermarks as they change, at least one a second. Its end without Leave is the death of the rank."""
        run = self._run(request)
        joined, own = run.ranks.get(request.rank), object()
        if joined is not None:
            joined.watch = own
        seen = -1
        context.add_callback(run.wake_watches)
        try:
            while context.is_active():
                with run.changed:
                    run.changed.wait_for(lambda seen=seen: run.version != seen, _HEARTBEAT_S)  # type: ignore[misc]
                    seen, marks = run.version, run.watermarks
                yield pb.WatchResponse(instance=self._node.instance, watermarks=marks)
        finally:
            is_last = joined is not None and joined.watch is own and run.ranks.get(request.rank) is joined
            # A process that is watched lives: its connection broke, and it will join again.
            if joined is not None and is_last and joined.state == "joined" and not joined.watched_pid:
                log.warning("rank died", run=run.run, rank=request.rank, pid=joined.pid)
                run.leave(request.rank, "dead")
                self._node.diagnosis.wake()

    def Leave(self, request: pb.LeaveRequest, context: grpc.ServicerContext) -> pb.LeaveResponse:
        run = self._run(request)
        error = request.error[:_MOST_ERROR]
        if error:
            log.warning("rank failed", run=run.run, rank=request.rank, error=error)
        run.leave(request.rank, "left", error)
        self._node.diagnosis.wake()
        self._node.settle(run)
        return pb.LeaveResponse()

    # --- save ------------------------------------------------------------------------------------------------------
    def Begin(self, request: pb.BeginRequest, context: grpc.ServicerContext) -> pb.BeginResponse:
        run = self._run(request)
        failpoint("begin.before")
        self._check_instance(request.instance)
        self._node.check_current(run.run, run.incarnation)
        if run.watermarks.HasField("staged") and request.step <= run.watermarks.staged:
            raise StepRepeated(f"step {request.step}: step {run.watermarks.staged} is staged already")
        _check_alive(run, request.step)
        if (problem := run.reporter.problem) is not None:
            raise CoordinatorUnreachable(f"step {request.step}: {problem.message}")
        if request.roster_version > run.roster.version:
            raise SlotNotReady(f"version {request.roster_version} of the roster is on its way here")
        if missing := [entry.rank for entry in run.roster.entries if not entry.node_id]:
            raise StepDead(f"step {request.step} is dead: rank {missing[0]} has no daemon")
        # What this incarnation starts from is settled by its first save, if no restore settled it before.
        if not self._node.records[run.run].incarnations[run.incarnation].is_decided:
            self._node.decide_by_saving(run.run, run.incarnation)
        segments = [Segment(s.dtype, s.size_bytes) for s in request.segments]
        layout = SlotLayout.plan(request.index_bytes, segments, run.roster.block_bytes)
        header = SlotHeader(
            run=run.run,
            rank=request.rank,
            world_size=run.roster.world_size,
            uid=caller().uid,
            snapshot=SnapshotId(run.incarnation, request.step),
            parent=self._node.parent_of(run.run, run.incarnation),
            roster_version=request.roster_version or run.roster.version,
            index_crc=0,
            is_persisted=request.is_persisted,
            sealed_at_s=0.0,
            layout=layout,
        )
        try:
            slot = self._node.arena.begin(header)
        except SlotNotReady:
            raise
        except CkptdError as error:
            run.report(run.dead(request.rank, request.step, type(error).__name__, str(error)))
            raise
        run.report(_progress(slot, coordinator_pb2.LEVEL_BEGUN))
        failpoint("begin.after")
        return pb.BeginResponse(slot=slot.id, generation=slot.generation, slot_bytes=slot.capacity_bytes)

    def Write(  # type: ignore[override]  # registered with bytes: see server._RawWrites
        self, request_iterator: Iterator[bytes], context: grpc.ServicerContext
    ) -> pb.WriteResponse:
        """Raw WriteRequest messages, so that the payload is copied once, from the message into the slot."""
        return pb.WriteResponse(written_bytes=receive(request_iterator, self._slot_to_write))

    def _slot_to_write(self, slot_id: str, generation: int) -> Slot:
        slot = self._node.arena.writing(slot_id, generation)
        self._check_owner(slot)
        return slot

    def Seal(self, request: pb.SealRequest, context: grpc.ServicerContext) -> pb.SealResponse:
        run = self._run(request)
        started = time.monotonic()
        slot = self._slot_to_write(request.slot, request.generation)
        _check_alive(run, request.step)
        header = slot.seal(request.index_crc)
        metrics = self._node.metrics
        metrics.seal_seconds.labels(run.run).observe(time.monotonic() - started)
        metrics.bytes_total.labels(run.run, "captured", MEMORY).inc(header.layout.payload_bytes)
        if 0 < request.capture_seconds < math.inf:
            metrics.capture_seconds.labels(run.run).observe(request.capture_seconds)
        failpoint("seal.before_report")
        run.report(_progress(slot, coordinator_pb2.LEVEL_STAGED))
        failpoint("seal.after_report")
        return pb.SealResponse()

    def Drop(self, request: pb.DropRequest, context: grpc.ServicerContext) -> pb.DropResponse:
        run = self._run(request)
        outcome = request.outcome
        if request.slot:
            slot = self._slot_to_write(request.slot, request.generation)
            if slot.state is SlotState.WRITING:  # sealed after all: then the recycle rule decides
                self._node.arena.free(slot)
        self._count_skips(run, request.skipped)
        run.report(run.dead(request.rank, outcome.step, outcome.error, outcome.reason))
        return pb.DropResponse()

    def ReportPace(self, request: pb.ReportPaceRequest, context: grpc.ServicerContext) -> pb.ReportPaceResponse:
        run = self._run(request)
        if not (math.isfinite(request.step_seconds) and math.isfinite(request.stall_seconds)):
            raise InvalidRequest("step and stall seconds must be finite")
        self._count_skips(run, request.skipped)
        run.report_pace(request.rank, request.step, request.step_seconds, request.stall_seconds)
        if request.stall_seconds >= 0:
            self._node.metrics.stall_seconds.labels(run.run).observe(request.stall_seconds)
        return pb.ReportPaceResponse()

    def ReportTimings(
        self, request: pb.ReportTimingsRequest, context: grpc.ServicerContext
    ) -> pb.ReportTimingsResponse:
        run = self._run(request)
        if request.rank not in run.ranks:
            raise InstanceChanged(f"rank {request.rank} was not joined with this instance of the daemon")
        is_known = self._node.diagnosis.take_timings(run, request)
        return pb.ReportTimingsResponse(is_missing_communicators=not is_known)

    # --- restore ---------------------------------------------------------------------------------------------------
    def ListCandidates(
        self, request: pb.ListCandidatesRequest, context: grpc.ServicerContext
    ) -> pb.ListCandidatesResponse:
        run = check_run_name(request.run)
        self._check_if_known(run)
        node, asking = self._node, incarnation_from_pb(request.incarnation)
        survey = node.peering.cluster.survey(run, roster_from_pb(request.roster).entries)
        found = available(survey.holders, node.tiers, run)
        everything = found
        if request.source:
            found = [a for a in found if request.source in a.sources]
        known = incarnations(survey.records, node.tiers, run)
        ordered = order_candidates(found, known, asking)
        if request.HasField("step"):
            ordered = find_step(found, ordered, request.step)
        elif not everything:
            check_nothing_lost(survey.holders, survey.lost)
        return pb.ListCandidatesResponse(
            candidates=[
                pb.Candidate(snapshot=snapshot_to_pb(a.snapshot), world_size=a.world_size, sources=a.sources)
                for a in ordered
            ],
            notes=explain_lost(survey.holders, survey.lost, ordered, everything),
        )

    def Fetch(self, request: pb.FetchRequest, context: grpc.ServicerContext) -> pb.FetchResponse:
        run = self._run(request)
        snapshot, started = snapshot_from_pb(request.snapshot), time.monotonic()
        failpoint("restore.before_fetch")
        lease, source = self._node.peering.fetcher.fetch(
            run.run,
            snapshot,
            request.rank,
            request.world_size,
            request.source,
            caller().uid,
            run.holder(request.rank),
            lambda: self._node.peering.cluster.locate(run.run, run.incarnation, run.roster, snapshot),
        )
        log.info("shard in memory", run=run.run, rank=request.rank, snapshot=str(snapshot), source=source)
        header = lease.slot.sealed_header
        place = "tier" if "://" in source else source
        metrics = self._node.metrics
        metrics.restore_seconds.labels(run.run, place).observe(time.monotonic() - started)
        tier = tier_label(source, self._node.tiers)
        metrics.bytes_total.labels(run.run, "restored", tier).inc(header.layout.payload_bytes)
        return pb.FetchResponse(
            slot=lease.slot.id,
            generation=lease.slot.generation,
            slot_bytes=lease.slot.capacity_bytes,
            lease=lease.id,
            index_bytes=header.layout.index_bytes,
            block_bytes=header.layout.block_bytes,
            segments=[types_pb2.Segment(dtype=s.dtype, size_bytes=s.size_bytes) for s in header.layout.segments],
            source=source,
        )

    def Decide(self, request: pb.DecideRequest, context: grpc.ServicerContext) -> pb.DecideResponse:
        run = self._run(request)
        parent = snapshot_from_pb(request.parent) if request.HasField("parent") else None
        self._node.decide(run.run, run.incarnation, parent)
        return pb.DecideResponse()

    def Read(self, request: pb.ReadRequest, context: grpc.ServicerContext) -> Iterator[pb.ReadResponse]:
        slot = self._node.arena.leased(request.lease)
        self._check_owner(slot)
        end = min(request.offset + request.size_bytes, len(slot.payload))
        for start in range(request.offset, end, _READ_BYTES):
            self._node.arena.leased(request.lease)
            yield pb.ReadResponse(data=bytes(slot.payload[start : min(start + _READ_BYTES, end)]))

    def Release(self, request: pb.ReleaseRequest, context: grpc.ServicerContext) -> pb.ReleaseResponse:
        self._check_owner(self._node.arena.leased(request.lease))
        self._node.arena.release(request.lease)
        return pb.ReleaseResponse()

    def _count_skips(self, run: NodeRun, skipped: Mapping[str, int]) -> None:
        for name, count in skipped.items():
            reason = name if name in CkptdError.registry else CkptdError.__name__  # labels are bounded, whoever asks
            self._node.metrics.skips_total.labels(run.run, reason).inc(count)
            if reason == Torn.__name__:
                self._node.metrics.torn_total.labels(run.run).inc(count)

    # --- checks ----------------------------------------------------------------------------------------------------
    def _run(
        self,
        request: pb.WatchRequest
        | pb.BeginRequest
        | pb.SealRequest
        | pb.DropRequest
        | pb.FetchRequest
        | pb.DecideRequest
        | pb.LeaveRequest
        | pb.ReportPaceRequest
        | pb.ReportTimingsRequest,
    ) -> NodeRun:
        return self._node.node_run(caller(), request.run, incarnation_from_pb(request.incarnation))

    def _check_instance(self, instance: int) -> None:
        if instance != self._node.instance:
            raise InstanceChanged("the daemon restarted: join again")

    def _check_if_known(self, run: str) -> None:
        record = self._node.records.get(run)
        if record is not None:
            self._node.sessions.check(caller(), record.owner, run)

    def _check_owner(self, slot: Slot) -> None:
        run, _ = self._node.arena.owner_of(slot)
        self._node.record_for(caller(), run)


def _check_world_size(ranks: int) -> None:
    if ranks > _MOST_RANKS:
        raise InvalidRequest(f"a run may have {_MOST_RANKS} ranks, not {ranks}")


def _check_alive(run: NodeRun, step: int) -> None:
    """StepDead with the reason when a rank could not take ``step``, or was late."""
    for outcome in run.watermarks.dead:
        if outcome.step == step:
            raise StepDead(f"step {step} is dead ({outcome.error}): {outcome.reason}")


def _progress(slot: Slot, level: coordinator_pb2.Level.ValueType) -> coordinator_pb2.Progress:
    header = slot.sealed_header
    return coordinator_pb2.Progress(
        rank=header.rank,
        step=header.snapshot.step,
        level=level,
        is_persisted=header.is_persisted,
        roster_version=header.roster_version,
    )


def _wish(interval: types_pb2.Interval) -> Wish:
    kind = interval.WhichOneof("value")
    if kind == "steps":
        return Wish("steps", interval.steps)
    if kind == "seconds":
        return Wish("seconds", interval.seconds)
    return Wish("auto")


def _persist_wish(interval: types_pb2.Interval, tiers: list[Tier]) -> Wish:
    """What the caller asked for, else what the tiers say: the interval that serves all of them."""
    if interval.WhichOneof("value"):
        return _wish(interval)
    specs = [tier.spec for tier in tiers]
    if seconds := [spec.every_s for spec in specs if spec.every_s]:
        return Wish("seconds", min(seconds))
    return Wish("steps", math.gcd(*(spec.every_steps or 0 for spec in specs)) if specs else 0)
