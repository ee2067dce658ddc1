"""What exists, as rows for operators: checkpoints in memory and in the tiers."""

from __future__ import annotations

from collections.abc import Iterable

from ckptd.errors import CkptdError, NotPermitted
from ckptd.format.index import decode_index
from ckptd.model import ShardIndex, SnapshotId
from ckptd.restore.inventory import MEMORY
from ckptd.serve.node import Node
from ckptd.serve.sessions import Identity
from ckptd.tiers.tier import Tier
from ckptd_api.convert import snapshot_from_pb, snapshot_to_pb
from ckptd_api.v1 import operator_pb2 as pb


class Catalog:
    """Reads arena and tiers; nothing is cached."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def runs(self, identity: Identity) -> list[str]:
        """The runs ``identity`` may see, by name."""
        found = set()
        for run in {*self._node.records, *(run for tier in self._node.tiers for run in tier.runs())}:
            record = self._node.records.get(run)
            try:
                if record:
                    self._node.sessions.check(identity, record.owner, run)
            except NotPermitted:
                continue
            found.add(run)
        return sorted(found)

    def rows(self, run: str) -> list[pb.CheckpointRow]:
        """One row a copy, newest first; memory before tiers."""
        return sorted(
            (*self._memory_rows(run), *(row for tier in self._node.tiers for row in tier_rows(tier, run))),
            key=lambda row: (-row.snapshot.incarnation.ordinal, -row.snapshot.step, row.source != MEMORY, row.source),
        )

    def _memory_rows(self, run: str) -> Iterable[pb.CheckpointRow]:
        by_snapshot: dict[SnapshotId, pb.CheckpointRow] = {}
        ranks: dict[SnapshotId, set[int]] = {}
        for slot in self._node.arena.sealed(run):
            header = slot.header
            if header is None:
                continue
            row = by_snapshot.setdefault(
                header.snapshot,
                pb.CheckpointRow(
                    run=run,
                    snapshot=snapshot_to_pb(header.snapshot),
                    source=MEMORY,
                    world_size=header.world_size,
                    parent=snapshot_to_pb(header.parent) if header.parent else None,
                ),
            )
            ranks.setdefault(header.snapshot, set()).add(header.rank)
            row.size_bytes += sum(s.size_bytes for s in header.layout.segments)
            row.created_at_s = max(row.created_at_s, header.sealed_at_s)
        for snapshot, row in by_snapshot.items():
            row.state = self._state(run, snapshot, is_complete=len(ranks[snapshot]) == row.world_size)
        return by_snapshot.values()

    def _state(self, run: str, snapshot: SnapshotId, *, is_complete: bool) -> str:
        """What the coordinator says of a snapshot, of which a node of several holds only a part."""
        of_run = [r for r in self._node.node_runs() if r.run == run]
        if snapshot in (r.parity_id() for r in of_run):
            return "protected"
        is_staged = is_complete or snapshot in (r.staged_id() for r in of_run)
        return "staged" if is_staged else "partial"

    def tensors(self, copy: pb.CheckpointRow) -> list[pb.TensorRow]:
        """The named tensors of a copy, with the ranks that hold boxes of each."""
        rows: dict[str, pb.TensorRow] = {}
        for rank, index in self._indexes(copy):
            for box in index.boxes:
                row = rows.setdefault(
                    box.name, pb.TensorRow(name=box.name, dtype=box.dtype, global_shape=box.global_shape)
                )
                if rank not in row.ranks:
                    row.ranks.append(rank)
        return [rows[name] for name in sorted(rows)]

    def _indexes(self, copy: pb.CheckpointRow) -> Iterable[tuple[int, ShardIndex]]:
        snapshot = snapshot_from_pb(copy.snapshot)
        if copy.source == MEMORY:
            for slot in self._node.arena.sealed(copy.run):
                if slot.header and slot.header.snapshot == snapshot:
                    yield slot.header.rank, decode_index(bytes(slot.index), slot.id)
            return
        tier = next(t for t in self._node.tiers if t.spec.url == copy.source)
        if copy.state != "durable":
            return
        manifest = tier.manifest(copy.run, snapshot)
        for record in manifest.ranks:
            data, _ = tier.read_index(copy.run, snapshot, record, manifest.block_bytes)
            yield record.rank, decode_index(data, f"{copy.source} rank {record.rank}")


def tier_rows(tier: Tier, run: str) -> Iterable[pb.CheckpointRow]:
    """A row for every checkpoint of ``run`` in ``tier``; broken manifests are rows too, so that they can be seen."""
    for stored in tier.snapshots(run):
        row = pb.CheckpointRow(run=run, snapshot=snapshot_to_pb(stored.snapshot), source=tier.spec.url)
        row.state = "durable" if stored.is_committed else "uncommitted"
        if stored.is_committed:
            try:
                manifest = tier.manifest(run, stored.snapshot)
            except CkptdError:
                row.state = "corrupt"
            else:
                row.world_size, row.size_bytes = manifest.world_size, manifest.size_bytes
                row.created_at_s = manifest.created_at_s
                if manifest.parent:
                    row.parent.CopyFrom(snapshot_to_pb(manifest.parent))
        yield row
