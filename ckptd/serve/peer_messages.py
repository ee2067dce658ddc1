"""Between the messages of PeerService and the values of the arena, of ``ckptd.erasure`` and of records."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from ckptd.arena.arena import Arena
from ckptd.arena.records import IncarnationRecord
from ckptd.erasure.holdings import Holder, ParityHeld
from ckptd.model import Geometry, SnapshotId
from ckptd_api.convert import (
    incarnation_from_pb,
    incarnation_to_pb,
    roster_from_pb,
    roster_to_pb,
    snapshot_from_pb,
    snapshot_to_pb,
)
from ckptd_api.v1 import peers_pb2 as pb


def held_here(arena: Arena, run: str, node_id: str, address: str) -> Holder:
    """What this daemon holds of ``run``, all sealed."""
    ranks: dict[SnapshotId, set[int]] = {}
    sizes: dict[SnapshotId, int] = {}
    for header in filter(None, (slot.header for slot in arena.sealed(run))):
        ranks.setdefault(header.snapshot, set()).add(header.rank)
        sizes[header.snapshot] = header.world_size
    parity: dict[int, ParityHeld] = {}
    for held in (file.header for file in arena.parity.sealed(run)):
        if held is None:
            continue  # given back meanwhile
        known = parity.get(held.group.key)
        fragments = (known.fragments if known else frozenset()) | {(held.stripe, held.row)}
        images = known.images if known else tuple(image.ranks for image in held.group.images)
        parity[held.group.key] = ParityHeld(held.group.snapshot, held.group.key, held.group.geometry, images, fragments)
    return Holder(node_id, address, {s: frozenset(r) for s, r in ranks.items()}, sizes, tuple(parity.values()))


def inventory_to_pb(
    holder: Holder, instance: int, owner: str, records: Iterable[IncarnationRecord], at_fault: Collection[str]
) -> pb.InventoryResponse:
    return pb.InventoryResponse(
        node_id=holder.node_id,
        instance=instance,
        owner=owner,
        shards=[
            pb.HeldShard(snapshot=snapshot_to_pb(s), rank=rank, world_size=holder.world_sizes[s])
            for s, ranks in holder.ranks.items()
            for rank in sorted(ranks)
        ],
        parity=[parity_to_pb(parity) for parity in holder.parity],
        incarnations=[record_to_pb(record) for record in records],
        at_fault=sorted(at_fault),
    )


def holder_from_inventory(message: pb.InventoryResponse, address: str) -> Holder:
    ranks: dict[SnapshotId, set[int]] = {}
    sizes: dict[SnapshotId, int] = {}
    for shard in message.shards:
        snapshot = snapshot_from_pb(shard.snapshot)
        ranks.setdefault(snapshot, set()).add(shard.rank)
        sizes[snapshot] = shard.world_size
    parity = tuple(parity_from_pb(p) for p in message.parity)
    return Holder(message.node_id, address, {s: frozenset(r) for s, r in ranks.items()}, sizes, parity)


def holder_to_pb(holder: Holder, snapshot: SnapshotId) -> pb.Holder:
    """What ``holder`` has of one snapshot."""
    return pb.Holder(
        node_id=holder.node_id,
        address=holder.address,
        ranks=sorted(holder.ranks.get(snapshot, ())),
        parity=[parity_to_pb(p) for p in holder.parity if p.snapshot == snapshot],
        is_at_fault=holder.is_at_fault,
    )


def holder_from_pb(message: pb.Holder, snapshot: SnapshotId) -> Holder:
    ranks = {snapshot: frozenset(message.ranks)} if message.ranks else {}
    parity = tuple(parity_from_pb(p) for p in message.parity)
    return Holder(message.node_id, message.address, ranks, {}, parity, message.is_at_fault)


def parity_to_pb(parity: ParityHeld) -> pb.HeldParity:
    return pb.HeldParity(
        snapshot=snapshot_to_pb(parity.snapshot),
        group=parity.group,
        k=parity.geometry.k,
        m=parity.geometry.m,
        fragments=[pb.Fragment(stripe=stripe, row=row) for stripe, row in sorted(parity.fragments)],
        images=[pb.ImageRanks(ranks=ranks) for ranks in parity.images],
    )


def parity_from_pb(message: pb.HeldParity) -> ParityHeld:
    return ParityHeld(
        snapshot_from_pb(message.snapshot),
        message.group,
        Geometry(message.k, message.m),
        tuple(tuple(image.ranks) for image in message.images),
        frozenset((fragment.stripe, fragment.row) for fragment in message.fragments),
    )


def record_to_pb(record: IncarnationRecord) -> pb.IncarnationRecord:
    return pb.IncarnationRecord(
        incarnation=incarnation_to_pb(record.incarnation),
        world_size=record.world_size,
        is_decided=record.is_decided,
        parent=snapshot_to_pb(record.parent) if record.parent else None,
        is_ended=record.is_ended,
        roster=roster_to_pb(record.roster) if record.roster else None,
    )


def record_from_pb(message: pb.IncarnationRecord) -> IncarnationRecord:
    return IncarnationRecord(
        incarnation_from_pb(message.incarnation),
        message.world_size,
        message.is_decided,
        snapshot_from_pb(message.parent) if message.HasField("parent") else None,
        message.is_ended,
        roster_from_pb(message.roster) if message.HasField("roster") else None,
    )
