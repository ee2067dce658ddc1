"""OperatorService: the verbs of the CLI."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Final

import grpc

import ckptd
from ckptd.arena.parity import ParityFile
from ckptd.erasure.groups import explain
from ckptd.errors import CkptdError, UnknownRun, UnknownStep
from ckptd.model import check_run_name
from ckptd.serve.catalog import Catalog
from ckptd.serve.diagnosis.pictures import find_pictures, only_run
from ckptd.serve.diagnosis.prober import Prober
from ckptd.serve.housekeeping import finish_actions, prune_actions
from ckptd.serve.node import Node
from ckptd.serve.node_run import NodeRun
from ckptd.serve.rpc import caller
from ckptd.serve.verification import verify
from ckptd_api.convert import incarnation_to_pb, snapshot_to_pb
from ckptd_api.v1 import operator_pb2 as pb
from ckptd_api.v1 import operator_pb2_grpc
from ckptd_api.v1.faults_pb2 import FaultRow, RunCoverage

_LOOK_S: Final = 1.0
_SILENCE_S: Final = 30.0


class OperatorService(operator_pb2_grpc.OperatorServiceServicer):
    """Answers about every run the caller may see."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._catalog = Catalog(node)
        self._prober = Prober(node)

    def GetStatus(self, request: pb.GetStatusRequest, context: grpc.ServicerContext) -> pb.GetStatusResponse:
        node = self._node
        problems = list(node.arena.problems)
        tiers = []
        for tier in node.tiers:
            status = pb.TierStatus(url=tier.spec.url, scope=tier.spec.scope, is_healthy=True)
            try:
                tier.probe()
            except CkptdError as error:
                status.is_healthy, status.problem = False, str(error)
            tiers.append(status)
        slots = []
        for slot in node.arena.slots():
            run, rank = node.arena.owner_of(slot)
            snapshot = snapshot_to_pb(slot.header.snapshot) if slot.header else None
            slots.append(
                pb.SlotStatus(
                    slot=slot.id,
                    run=run,
                    rank=rank,
                    state=slot.state.name.lower(),
                    snapshot=snapshot,
                    slot_bytes=slot.capacity_bytes,
                    leases=len(slot.leases),
                )
            )
        return pb.GetStatusResponse(
            version=ckptd.__version__,
            instance=node.instance,
            node_id=node.node_id,
            address=node.address,
            memory_bytes=node.settings.memory_bytes,
            used_bytes=node.arena.used_bytes,
            slots=sorted(slots, key=lambda s: s.slot),
            runs=[self._run_status(run) for run in node.node_runs()],
            tiers=tiers,
            problems=problems,
            pid=os.getpid(),
            arena=str(node.settings.arena),
            parity=[_parity(file) for file in node.arena.parity.files()],
        )

    def _run_status(self, run: NodeRun) -> pb.RunStatus:
        record = self._node.records[run.run]
        parent = record.incarnations[run.incarnation].parent
        alive = run.has_members
        ended = record.incarnations[run.incarnation].is_ended
        state = "draining" if run.is_draining and not alive else "ended" if ended else "active" if alive else "idle"
        return pb.RunStatus(
            run=run.run,
            incarnation=incarnation_to_pb(run.incarnation),
            world_size=run.roster.world_size,
            owner=record.owner,
            is_coordinator=run.is_coordinated_here,
            groups=[
                pb.GroupStatus(k=group.geometry.k, m=group.geometry.m, node_ids=group.members) for group in run.groups
            ],
            protection_note=explain(run.roster) or "",
            roster_version=run.roster.version,
            watermarks=run.watermarks,
            ranks=[pb.RankStatus(rank=r, pid=s.pid, state=s.state) for r, s in sorted(run.ranks.items())],
            state=state,
            parent=snapshot_to_pb(parent) if parent else None,
            faults=self._node.diagnosis.sentences(run.run, run.incarnation),
        )

    def ListCheckpoints(
        self, request: pb.ListCheckpointsRequest, context: grpc.ServicerContext
    ) -> pb.ListCheckpointsResponse:
        if request.run:
            self._check(request.run)
            return pb.ListCheckpointsResponse(rows=self._catalog.rows(request.run))
        rows: list[pb.CheckpointRow] = []
        for run in self._catalog.runs(caller()):
            of_run = self._catalog.rows(run)
            sources = dict.fromkeys(row.source for row in of_run)
            rows += [next(row for row in of_run if row.source == source) for source in sources]
        return pb.ListCheckpointsResponse(rows=rows)

    def ShowCheckpoint(
        self, request: pb.ShowCheckpointRequest, context: grpc.ServicerContext
    ) -> pb.ShowCheckpointResponse:
        self._check(request.run)
        copies = [row for row in self._catalog.rows(request.run) if row.snapshot.step == request.step]
        if not copies:
            raise UnknownStep(f"run {request.run} has no step {request.step}")
        return pb.ShowCheckpointResponse(copies=copies, tensors=self._catalog.tensors(copies[0]))

    def Verify(self, request: pb.VerifyRequest, context: grpc.ServicerContext) -> Iterator[pb.VerifyResponse]:
        self._check(request.run)
        rows = self._catalog.rows(request.run)
        if request.HasField("step"):
            rows = [row for row in rows if row.snapshot.step == request.step]
            if not rows:
                raise UnknownStep(f"run {request.run} has no step {request.step}")
        yield from verify(self._node, rows)

    def Prune(self, request: pb.PruneRequest, context: grpc.ServicerContext) -> pb.PruneResponse:
        self._check(request.run)
        actions = finish_actions if request.is_finish else prune_actions
        return pb.PruneResponse(actions=actions(self._node, request.run, request.is_applied))

    def ListFaults(self, request: pb.ListFaultsRequest, context: grpc.ServicerContext) -> pb.ListFaultsResponse:
        faults, coverage = self._faults(request.run, has_resolved=request.has_resolved)
        return pb.ListFaultsResponse(faults=faults, coverage=coverage)

    def WatchFaults(
        self, request: pb.WatchFaultsRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.WatchFaultsResponse]:
        told: pb.WatchFaultsResponse | None = None
        told_s = 0.0
        while context.is_active():
            faults, coverage = self._faults(request.run, has_resolved=True)
            answer = pb.WatchFaultsResponse(faults=faults, coverage=coverage)
            if answer != told or time.monotonic() - told_s > _SILENCE_S:
                told, told_s = answer, time.monotonic()
                yield answer
            with self._node.diagnosis.changed:
                self._node.diagnosis.changed.wait(_LOOK_S)

    def Probe(self, request: pb.ProbeRequest, context: grpc.ServicerContext) -> Iterator[pb.ProbeResponse]:
        self._check(request.run)
        yield from self._prober.probe(request.run, request.nodes, has_compute=request.has_compute)

    def GetPictures(self, request: pb.GetPicturesRequest, context: grpc.ServicerContext) -> pb.GetPicturesResponse:
        if request.run:
            self._check(request.run)
        run = request.run or only_run(self._node, self._catalog.runs(caller()))
        return find_pictures(self._node, run, is_recording=request.is_recording)

    def _faults(self, run: str, *, has_resolved: bool) -> tuple[list[FaultRow], list[RunCoverage]]:
        """Of ``run``, or of every run that the caller may see."""
        if run:
            self._check(run)
        runs = [run] if run else self._catalog.runs(caller())
        told = [found for name in runs for found in self._node.diagnosis.faults(name)]
        rows = [row for found in told for row in found.faults if has_resolved or not row.resolved_s]
        return rows, [found.coverage for found in told]

    def _check(self, run: str) -> None:
        """UnknownRun unless the run is in memory or in a tier; NotPermitted unless the caller may see it."""
        check_run_name(run)
        record = self._node.records.get(run)
        if record is not None:
            self._node.sessions.check(caller(), record.owner, run)
        elif run not in self._catalog.runs(caller()):
            raise UnknownRun(f"run {run!r} is not known to this daemon or its tiers")


def _parity(file: ParityFile) -> pb.ParityStatus:
    status = pb.ParityStatus(run=file.run, state=file.state.name.lower(), size_bytes=file.capacity_bytes)
    if held := file.header:
        status.snapshot.CopyFrom(snapshot_to_pb(held.group.snapshot))
        status.geometry, status.stripe, status.row = str(held.group.geometry), held.stripe, held.row
    return status
