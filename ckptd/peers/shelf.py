"""What this node can give to its peers: records of images and groups, and their blocks, read from the arena.

Layer: ``peers``; no sockets. Invariants: what is read is leased while it is read, so it is never recycled in the
middle; every block comes with the CRC it was sealed with, so whoever receives it can tell whether it is whole.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from ckptd.arena.arena import Arena, Lease
from ckptd.arena.parity import ParityFile
from ckptd.arena.slot import Slot
from ckptd.errors import InvalidRequest, UnknownStep
from ckptd.failpoints import failpoint
from ckptd.format.blocks import digest
from ckptd.format.image import GroupRecord, ImageRecord, ShardRecord
from ckptd.model import SnapshotId


class Blocks(NamedTuple):
    """Some blocks in order: the CRC-32C of each as it was sealed (uint32), and their bytes."""

    crcs: npt.NDArray[np.uint32]
    data: memoryview


class Shelf:
    """See the module."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena

    # --- records -------------------------------------------------------------------------------------------------
    def image(self, run: str, snapshot: SnapshotId, ranks: Collection[int]) -> ImageRecord:
        """The record of the image that ``ranks``' shards make; UnknownStep when one of them is not held here."""
        with self._leased(run, snapshot, ranks) as leases:
            return ImageRecord(tuple(_record(lease.slot) for lease in leases))

    def group(self, run: str, snapshot: SnapshotId, key: int) -> GroupRecord:
        """The record of a group of which parity is held here; UnknownStep."""
        for file in self._arena.parity.sealed(run):
            if file.header and file.header.group.key == key and file.header.group.snapshot == snapshot:
                return file.header.group
        raise UnknownStep(f"no parity of group {key:016x} of {snapshot} is held here")

    # --- bytes ---------------------------------------------------------------------------------------------------
    def read_image(
        self, run: str, snapshot: SnapshotId, ranks: Collection[int], first: int, blocks: int, batch: int
    ) -> Generator[Blocks, None, None]:
        """``blocks`` blocks of the image from ``first`` on, ``batch`` at a time; InvalidRequest beyond its end."""
        with self._leased(run, snapshot, ranks) as leases:
            slots = [lease.slot for lease in leases]
            image = ImageRecord(tuple(_record(slot) for slot in slots))
            _check_range(first, blocks, image.blocks)
            for at in range(first, first + blocks, batch):
                failpoint("pull.batch")
                for lease in leases:
                    self._arena.leased(lease.id)
                parts = [
                    _table_blocks(slots[e.shard], e.first_block, e.blocks)
                    if e.is_table
                    else _payload_blocks(slots[e.shard], e.first_block, e.blocks)
                    for e in image.extents(at, min(batch, first + blocks - at))
                ]
                yield parts[0] if len(parts) == 1 else _joined(parts)

    def read_parity(
        self, run: str, snapshot: SnapshotId, key: int, stripe: int, row: int, first: int, blocks: int, batch: int
    ) -> Generator[Blocks, None, None]:
        """The same of a parity fragment held here; UnknownStep when it is not."""
        file = self._arena.parity.find(run, snapshot, key, stripe, row)
        if file is None or file.header is None:
            raise UnknownStep(f"row {row} of stripe {stripe} of group {key:016x} of {snapshot} is not held here")
        self._arena.parity.lease(file)
        try:
            header = file.header
            if header is None or header.group.key != key:
                raise UnknownStep(f"parity of {snapshot} was recycled meanwhile")
            _check_range(first, blocks, header.piece_blocks)
            for at in range(first, first + blocks, batch):
                failpoint("pull.batch")
                yield _parity_blocks(file, at, min(batch, first + blocks - at), header.group.block_bytes)
        finally:
            self._arena.parity.release(file)

    # --- inside --------------------------------------------------------------------------------------------------
    @contextmanager
    def _leased(self, run: str, snapshot: SnapshotId, ranks: Collection[int]) -> Iterator[list[Lease]]:
        leases: list[Lease] = []
        try:
            with self._arena.lock:  # nothing may be recycled between finding it and leasing it
                for rank in sorted(ranks):
                    slot = self._arena.find_sealed(run, snapshot, rank)
                    if slot is None:
                        raise UnknownStep(f"rank {rank} of {snapshot} of run {run} is not in memory here")
                    leases.append(self._arena.lease(slot, f"peer/{run}"))
            yield leases
        finally:
            for lease in leases:
                self._arena.release(lease.id)


def _record(slot: Slot) -> ShardRecord:
    return ShardRecord(replace(slot.sealed_header, generation=0), digest(slot.table))


def _check_range(first: int, blocks: int, end: int) -> None:
    if first < 0 or blocks < 0 or first + blocks > end:
        raise InvalidRequest(f"blocks {first} to {first + blocks} were asked for, there are {end}")


def _payload_blocks(slot: Slot, first: int, blocks: int) -> Blocks:
    size = slot.sealed_header.layout.block_bytes
    return Blocks(slot.table[first : first + blocks], slot.payload[first * size : (first + blocks) * size])


def _table_blocks(slot: Slot, first: int, blocks: int) -> Blocks:
    """Blocks of the CRC table as the image has it: zero-extended to whole blocks, each with a CRC made here."""
    size = slot.sealed_header.layout.block_bytes
    data = slot.table.tobytes()[first * size : (first + blocks) * size].ljust(blocks * size, b"\0")
    crcs = [crc32c(data[i * size : (i + 1) * size]) for i in range(blocks)]
    return Blocks(np.array(crcs, np.uint32), memoryview(data))


def _parity_blocks(file: ParityFile, first: int, blocks: int, size: int) -> Blocks:
    return Blocks(file.table[first : first + blocks], file.fragment.data[first * size : (first + blocks) * size])


def _joined(parts: Sequence[Blocks]) -> Blocks:
    return Blocks(np.concatenate([p.crcs for p in parts]), memoryview(b"".join(p.data for p in parts)))
