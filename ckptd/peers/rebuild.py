"""A shard that is not in this node's memory: from a peer's slot, or made again from k fragments of every stripe.

Layer: ``peers``. Bytes go straight into the new slot: a batch is pulled and decoded into place. Whether they are those
that were sealed is told by the shard's CRC table, which is part of the image and is itself checked against the digest
in the record of the image or of the group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import structlog

from ckptd.erasure.code import Code
from ckptd.erasure.holdings import Holder, ParityHeld, groups_of, holder_of_fragment, holder_of_image
from ckptd.erasure.stripes import Stripes
from ckptd.errors import CkptdError, Corrupt, RestoreFailed, UnknownStep
from ckptd.failpoints import failpoint
from ckptd.format.blocks import digest
from ckptd.format.image import GroupRecord, ImageRecord, ShardRecord
from ckptd.format.slot import SlotHeader
from ckptd.memory import Bytes
from ckptd.model import SnapshotId
from ckptd.peers.corruption import PARITY, SLOTS, Corruption, OnCorrupt
from ckptd.peers.gather import Source, SourceFailed, gather, name_of, source_from
from ckptd.peers.rate import TokenBucket
from ckptd.peers.side_by_side import side_by_side
from ckptd.peers.transport import Piece, Transport, batch_blocks

PEER: Final = "peer"
RECONSTRUCTION: Final = "reconstruction"
log = structlog.get_logger()

DescribeImage = Callable[[Holder, str, SnapshotId, Sequence[int]], ImageRecord]
DescribeGroup = Callable[[Holder, str, SnapshotId, int], GroupRecord]


class Target(Protocol):
    """Where a shard goes: see ``ckptd.restore.fetch``, whose contract this is."""

    def begin(self, header: SlotHeader) -> Bytes: ...

    def progressed(self, written_bytes: int) -> None: ...

    def seal(self, table: npt.NDArray[np.uint32]) -> None: ...


class _Filler:
    """Puts the image blocks of one shard where they belong: payload into the target, the CRC table aside."""

    def __init__(self, shard: ShardRecord, target: Target) -> None:
        self._shard = shard
        self._image = ImageRecord((shard,))
        self._target = target
        self._payload = target.begin(shard.header)
        self._table = np.zeros(shard.table_blocks * shard.header.layout.block_bytes, np.uint8)
        self._size = shard.header.layout.block_bytes

    def place(self, first: int, blocks: int) -> Bytes | None:
        """The payload memory of these image blocks, when they are payload only: they can be decoded in place."""
        if first + blocks > self._shard.payload_blocks:
            return None
        return self._payload[first * self._size : (first + blocks) * self._size]

    def put(self, first: int, blocks: int, data: Bytes) -> None:
        at = 0
        for extent in self._image.extents(first, blocks):
            into = self._table if extent.is_table else self._payload
            size = extent.blocks * self._size
            np.copyto(into[extent.first_block * self._size :][:size], data[at : at + size])
            at += size

    def progressed(self, blocks: int) -> None:
        self._target.progressed(min(blocks, self._shard.payload_blocks) * self._size)

    def finish(self) -> None:
        table = self._table.view("<u4")[: self._shard.payload_blocks]
        if digest(table) != self._shard.table_digest:
            raise Corrupt(f"rank {self._shard.header.rank}: the CRC table does not match its digest")
        self._target.seal(table)


class Rebuilder:
    """``transport_to`` gives the way to a holder: its own arena needs no socket. ``on_corrupt(run, place, problem)``
    hears of every copy that does not match its checksums; place is SLOTS or PARITY."""

    def __init__(
        self,
        transport_to: Callable[[Holder], Transport],
        describe_image: DescribeImage,
        describe_group: DescribeGroup,
        on_corrupt: OnCorrupt,
    ) -> None:
        self._transport_to = transport_to
        self._describe_image = describe_image
        self._describe_group = describe_group
        self._on_corrupt = on_corrupt
        self._unlimited = TokenBucket(0)  # a job waits for a restore

    def rebuild(self, run: str, snapshot: SnapshotId, rank: int, holders: Sequence[Holder], target: Target) -> str:
        """Fill ``target`` with ``rank``'s shard and seal it. Returns the source, ``PEER`` or ``RECONSTRUCTION``. Nodes
        at fault are asked only when those that are not do not suffice: a slow link would hold up the whole job.

        Raises:
            UnknownStep: no peer holds anything of it.
            RestoreFailed: something is held, but none of it will do; the message says what was wrong with each.
        """
        corruption = Corruption(run, self._on_corrupt)
        sound = [holder for holder in holders if not holder.is_at_fault]
        if len(sound) < len(holders):
            try:
                return self._rebuild_from(sound, run, snapshot, rank, target, corruption)
            except CkptdError as error:
                log.info("nodes at fault are asked", run=run, rank=rank, reason=error.message)
        return self._rebuild_from(holders, run, snapshot, rank, target, corruption)

    def _rebuild_from(
        self,
        holders: Sequence[Holder],
        run: str,
        snapshot: SnapshotId,
        rank: int,
        target: Target,
        corruption: Corruption,
    ) -> str:
        problems: list[str] = []
        for holder in (h for h in holders if rank in h.ranks.get(snapshot, ())):
            try:
                self._copy(run, snapshot, rank, holder, target)
                return PEER
            except CkptdError as error:
                corruption.look(error, SLOTS, name_of(holder))
                problems.append(f"{name_of(holder)}: {error.message}")
        groups = [g for g in groups_of(holders, snapshot).values() if any(rank in ranks for ranks in g.images)]
        for group in sorted(groups, key=lambda g: -len(g.fragments)):
            try:
                self._reconstruct(run, snapshot, rank, group, holders, target, corruption)
                return RECONSTRUCTION
            except CkptdError as error:
                corruption.look(error, PARITY, f"group {group.geometry}")
                problems.append(f"group {group.geometry}: {error.message}")
        if not problems:
            raise UnknownStep(f"no peer holds rank {rank} of {snapshot}")
        raise RestoreFailed(f"rank {rank} of {snapshot} cannot be had from peers: {'; '.join(problems)}")

    # --- from a peer's slot ----------------------------------------------------------------------------------------
    def _copy(self, run: str, snapshot: SnapshotId, rank: int, holder: Holder, target: Target) -> None:
        image = self._describe_image(holder, run, snapshot, (rank,))
        if image.ranks != (rank,) or image.shards[0].header.snapshot != snapshot:
            raise Corrupt(f"{name_of(holder)} described another shard than was asked for")
        filler = _Filler(image.shards[0], target)
        source = self._source(holder, Piece(run, snapshot, (rank,)), 0, image.blocks)
        size = image.shards[0].header.layout.block_bytes
        batch = batch_blocks(size)
        for at, count, (data,) in gather([source], 0, image.blocks, batch, size, self._unlimited):
            if data is not None:
                filler.put(at, count, data)
            filler.progressed(at + count)
        filler.finish()

    # --- from fragments --------------------------------------------------------------------------------------------
    def _reconstruct(
        self,
        run: str,
        snapshot: SnapshotId,
        rank: int,
        group: ParityHeld,
        holders: Sequence[Holder],
        target: Target,
        corruption: Corruption,
    ) -> None:
        record = self._record(run, snapshot, group, holders)
        position = next(i for i, image in enumerate(record.images) if rank in image.ranks)
        image = record.images[position]
        shard = next(s for s in image.shards if s.header.rank == rank)
        filler = _Filler(shard, target)
        size, code = record.block_bytes, Code(record.geometry)
        stripes = Stripes.plan(record.geometry, record.image_blocks)
        start, blocks = image.span_of(rank)
        failed: dict[Source, str] = {}

        def fill(piece: int, first: int, count: int) -> Iterator[int]:
            """One piece of the image; yields how many of its blocks are there."""
            stripe = stripes.stripe_of(position, piece)
            wanted = stripes.column_of(stripe, position)
            choose = partial(self._choose, run, record, stripes, stripe, position, holders, failed)
            for at, n, fragments in self._fragments(choose, first, count, size, failed, corruption):
                failpoint("rebuild.batch")
                here = piece * stripes.piece_blocks + at - start
                place = filler.place(here, n)
                decoded = np.empty(n * size, np.uint8) if place is None else place
                code.reconstruct(fragments, {wanted: decoded})
                if place is None:
                    filler.put(here, n, decoded)
                yield at + n - first

        extents = list(stripes.extents(start, blocks))
        side_by_side([partial(fill, *extent) for extent in extents], [n for *_, n in extents], filler.progressed)
        filler.finish()

    def _fragments(
        self,
        choose: Callable[[int], dict[int, Source | None]],
        first: int,
        count: int,
        size: int,
        failed: dict[Source, str],
        corruption: Corruption,
    ) -> Iterator[tuple[int, int, dict[int, Bytes | None]]]:
        """(first block, number of blocks, k fragments by index) of a stripe, batch by batch. A source that fails goes
        into ``failed``, and another of those left serves from there on."""
        done, end, batch = first, first + count, batch_blocks(size)
        while done < end:
            chosen = choose(done)
            try:
                for at, n, columns in gather(list(chosen.values()), done, end - done, batch, size, self._unlimited):
                    yield at, n, dict(zip(chosen, columns, strict=True))
                    done = at + n
            except SourceFailed as error:
                if error.source is None:
                    raise
                log.warning("source set aside", source=error.source.name, reason=error.message)
                corruption.look(error, SLOTS if error.source.piece.ranks else PARITY, error.source.name)
                failed[error.source] = error.message

    def _record(self, run: str, snapshot: SnapshotId, group: ParityHeld, holders: Sequence[Holder]) -> GroupRecord:
        """The record of ``group``, from any daemon that holds parity of it."""
        problem = CkptdError("no daemon holds its record")
        for holder in (h for h in holders if any(p.group == group.group for p in h.parity)):
            try:
                record = self._describe_group(holder, run, snapshot, group.group)
                if record.key != group.group or record.snapshot != snapshot:
                    raise Corrupt(f"{name_of(holder)} described another group than was asked for")
                return record
            except CkptdError as error:
                problem = error
        raise RestoreFailed(problem.message, problem.hint)

    def _choose(
        self,
        run: str,
        record: GroupRecord,
        stripes: Stripes,
        stripe: int,
        lost: int,
        holders: Sequence[Holder],
        failed: Mapping[Source, str],
        first: int,
    ) -> dict[int, Source | None]:
        """k fragments of ``stripe`` by index, without that of the member at ``lost`` and without what ``failed``: zeros
        first, they cost nothing, then data, then parity."""
        found: dict[int, Source | None] = {}
        data: dict[int, Source | None] = {}
        for column, (position, piece) in enumerate(stripes.data_of(stripe)):
            image = record.images[position]
            begin, there = piece * stripes.piece_blocks, stripes.blocks_there(image.blocks, piece)
            if position == lost:
                continue
            if there <= first:
                found[column] = None
            elif holder := holder_of_image(holders, record.snapshot, image.ranks):
                data[column] = self._source(holder, Piece(run, record.snapshot, image.ranks), begin, there)
        found |= {column: source for column, source in data.items() if source not in failed}
        for row in range(record.geometry.m):
            if holder := holder_of_fragment(holders, record.key, stripe, row):
                piece_of = Piece(run, record.snapshot, (), record.key, stripe, row)
                source = self._source(holder, piece_of, 0, stripes.piece_blocks)
                if source not in failed:
                    found[record.geometry.k + row] = source
        if len(found) < record.geometry.k:
            left = f"stripe {stripe} of {record.geometry}: {len(found)} of {record.geometry.k} fragments are left"
            raise RestoreFailed("; ".join([left, *failed.values()]))
        return dict(list(found.items())[: record.geometry.k])

    def _source(self, holder: Holder, piece: Piece, first: int, blocks: int) -> Source:
        return source_from(self._transport_to(holder), holder, piece, first, blocks)
