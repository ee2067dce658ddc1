"""PeerService: what other daemons ask of this one. Ids, never paths; every count is bounded before it is used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import grpc

from ckptd.errors import DaemonUnreachable, InvalidRequest
from ckptd.format.image import encode_group, encode_image
from ckptd.model import check_run_name
from ckptd.peers.probing import echo
from ckptd.peers.transport import encode_blocks
from ckptd.restore.inventory import MEMORY
from ckptd.serve.diagnosis.node_speed import measure_speed
from ckptd.serve.diagnosis.prober import Prober
from ckptd.serve.node import Node
from ckptd.serve.peer_messages import held_here, holder_to_pb, inventory_to_pb
from ckptd.serve.rpc import caller
from ckptd_api.convert import incarnation_from_pb, roster_from_pb, snapshot_from_pb
from ckptd_api.v1 import peers_pb2 as pb
from ckptd_api.v1 import peers_pb2_grpc

_MOST_RANKS: Final = 4096
_MOST_BATCH_BYTES: Final = 16 << 20


class PeerService(peers_pb2_grpc.PeerServiceServicer):
    """One method a call of the wire; errors become gRPC status in ``rpc.Boundary``."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._prober = Prober(node)

    def Inventory(self, request: pb.InventoryRequest, context: grpc.ServicerContext) -> pb.InventoryResponse:
        run, node = self._run(request.run), self._node
        record = node.records.get(run)
        return inventory_to_pb(
            held_here(node.arena, run, node.node_id, node.address),
            node.instance,
            record.owner if record else "",
            record.incarnations.values() if record else (),
            node.nodes_at_fault(run),
        )

    def DescribeImage(
        self, request: pb.DescribeImageRequest, context: grpc.ServicerContext
    ) -> pb.DescribeImageResponse:
        run, snapshot = self._run(request.run), snapshot_from_pb(request.snapshot)
        image = self._node.peering.shelf.image(run, snapshot, _ranks(request.ranks))
        return pb.DescribeImageResponse(image=encode_image(image))

    def DescribeGroup(
        self, request: pb.DescribeGroupRequest, context: grpc.ServicerContext
    ) -> pb.DescribeGroupResponse:
        group = self._node.peering.shelf.group(
            self._run(request.run), snapshot_from_pb(request.snapshot), request.group
        )
        return pb.DescribeGroupResponse(group=encode_group(group))

    def Pull(self, request: pb.PullRequest, context: grpc.ServicerContext) -> Iterator[bytes]:  # type: ignore[override]
        """Raw PullResponse messages, so that the payload is copied once (registered so in ``server``)."""
        run, snapshot, shelf = self._run(request.run), snapshot_from_pb(request.snapshot), self._node.peering.shelf
        first, blocks, batch = request.first_block, request.blocks, request.batch_blocks
        if batch < 1:
            raise InvalidRequest("batch_blocks must be at least 1")
        if request.HasField("image"):
            stream = shelf.read_image(run, snapshot, _ranks(request.image.ranks), first, blocks, batch)
        else:
            fragment = request.parity.fragment
            stream = shelf.read_parity(
                run, snapshot, request.parity.group, fragment.stripe, fragment.row, first, blocks, batch
            )
        served = self._node.metrics.bytes_total.labels(run, "served", MEMORY)
        for part in stream:
            if len(part.data) > _MOST_BATCH_BYTES:
                raise InvalidRequest(f"a batch may have {_MOST_BATCH_BYTES} bytes, not {len(part.data)}")
            served.inc(len(part.data))  # before: who has its last block may not come back for more
            yield encode_blocks(part)

    def Locate(self, request: pb.LocateRequest, context: grpc.ServicerContext) -> pb.LocateResponse:
        run, snapshot = self._run(request.run), snapshot_from_pb(request.snapshot)
        incarnation = incarnation_from_pb(request.incarnation)
        known = self._node.find_run(run, incarnation)
        if known is None:
            raise DaemonUnreachable(f"run {run} was not joined with this instance of the daemon")
        holders = self._node.peering.cluster.locate(run, incarnation, known.roster, snapshot)
        return pb.LocateResponse(holders=[holder_to_pb(holder, snapshot) for holder in holders])

    def RecordDecision(
        self, request: pb.RecordDecisionRequest, context: grpc.ServicerContext
    ) -> pb.RecordDecisionResponse:
        run, incarnation = self._run(request.run), incarnation_from_pb(request.incarnation)
        parent = snapshot_from_pb(request.parent) if request.HasField("parent") else None
        self._node.remember_decision(run, incarnation, roster_from_pb(request.roster), parent)
        return pb.RecordDecisionResponse()

    def Echo(self, request: pb.EchoRequest, context: grpc.ServicerContext) -> Iterator[pb.EchoResponse]:
        self._node.sessions.check_peer(caller())
        yield from echo(request.size_bytes)

    def MeasureLink(self, request: pb.MeasureLinkRequest, context: grpc.ServicerContext) -> pb.MeasureLinkResponse:
        run, incarnation = self._run(request.run), incarnation_from_pb(request.incarnation)
        return self._prober.measure_link(run, incarnation, request.node_id)

    def MeasureCompute(
        self, request: pb.MeasureComputeRequest, context: grpc.ServicerContext
    ) -> pb.MeasureComputeResponse:
        self._run(request.run)
        speed = measure_speed()
        return pb.MeasureComputeResponse(product_seconds=speed.product_s, copy_seconds=speed.copy_s)

    def _run(self, run: str) -> str:
        self._node.sessions.check_peer(caller())
        return check_run_name(run)


def _ranks(ranks: object) -> tuple[int, ...]:
    wanted = tuple(sorted(set(ranks)))  # type: ignore[call-overload]
    if not 0 < len(wanted) <= _MOST_RANKS:
        raise InvalidRequest(f"an image has 1 to {_MOST_RANKS} ranks, not {len(wanted)}")
    return wanted
