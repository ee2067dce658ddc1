"""Blocks, the checksum unit, and the layout of a slot: pure arithmetic shared by the client and the daemon.

A slot is ``[header page][index][segment]...[CRC table]``. The index and every segment start on a block boundary and
are zero-extended to one, so a block belongs to exactly one of them. The CRC is CRC-32C (RFC 3720, appendix B.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from ckptd.errors import Corrupt
from ckptd.model import Segment

HEADER_BYTES: Final = 4096
BOX_ALIGN_BYTES: Final = 64
MIN_BLOCK_BYTES: Final = 64 * 1024
MAX_BLOCK_BYTES: Final = 4 * 1024 * 1024
CRC_BYTES: Final = 4
PADDING_SHARE: Final = 0.005

Buffer = memoryview


def align(size_bytes: int, unit: int) -> int:
    """``size_bytes`` rounded up to a multiple of ``unit``."""
    return -(-size_bytes // unit) * unit


def block_bytes_for(smallest_shard_bytes: int, segments: int = 4) -> int:
    """The block of an incarnation: the largest power of two whose expected padding is at most 0.5 % of the smallest
    shard (half a block for the index and for each of ``segments`` segments), else 64 KiB."""
    block = MAX_BLOCK_BYTES
    while block > MIN_BLOCK_BYTES and (segments + 1) * block / 2 > PADDING_SHARE * smallest_shard_bytes:
        block //= 2
    return block


@dataclass(frozen=True)
class SlotLayout:
    """Where the parts of a slot lie. Offsets are bytes from the start of the payload (the slot less its header page).

    Attributes:
        block_bytes: the checksum unit.
        index_bytes: length of the index, unpadded.
        segments: the segments, in payload order.
        segment_offsets: payload offset of each segment.
        payload_bytes: index and segments with their padding; a whole number of blocks.
    """

    block_bytes: int
    index_bytes: int
    segments: tuple[Segment, ...]
    segment_offsets: tuple[int, ...]
    payload_bytes: int

    @classmethod
    def plan(cls, index_bytes: int, segments: Sequence[Segment], block_bytes: int) -> SlotLayout:
        offsets, end = [], align(index_bytes, block_bytes)
        for segment in segments:
            offsets.append(end)
            end += align(segment.size_bytes, block_bytes)
        return cls(block_bytes, index_bytes, tuple(segments), tuple(offsets), end)

    @property
    def blocks(self) -> int:
        return self.payload_bytes // self.block_bytes

    @property
    def slot_bytes(self) -> int:
        """Bytes of the whole slot: header page, payload and CRC table."""
        return HEADER_BYTES + self.payload_bytes + self.blocks * CRC_BYTES

    def parts(self) -> list[tuple[str, int, int]]:
        """(name, payload offset, used bytes) of the index and of every segment, in payload order."""
        named = [("index", 0, self.index_bytes)]
        for segment, offset in zip(self.segments, self.segment_offsets, strict=True):
            named.append((segment.dtype, offset, segment.size_bytes))
        return named

    def blocks_of(self, offset: int, size_bytes: int) -> slice:
        """The blocks that cover ``size_bytes`` from payload ``offset`` (a block boundary)."""
        first = offset // self.block_bytes
        return slice(first, first + -(-size_bytes // self.block_bytes))


def checksum_blocks(payload: Buffer, block_bytes: int, first: int, last: int, table: npt.NDArray[np.uint32]) -> None:
    """Put the CRC of blocks ``first`` to ``last - 1`` of ``payload`` into ``table``; releases the GIL in each block."""
    for block in range(first, last):
        table[block] = crc32c(payload[block * block_bytes : (block + 1) * block_bytes])


def find_corrupt_block(
    data: Buffer, block_bytes: int, table: npt.NDArray[np.uint32], first: int = 0, last: int | None = None
) -> int | None:
    """The first block of ``data`` in ``first .. last - 1`` whose CRC is not that of ``table``, or None.

    ``data`` may end within its last block; what is missing counts as zeros.
    """
    for block in range(first, len(table) if last is None else last):
        part = data[block * block_bytes : (block + 1) * block_bytes]
        crc = crc32c(part)
        if len(part) < block_bytes:
            crc = crc32c(bytes(block_bytes - len(part)), crc)
        if crc != int(table[block]):
            return block
    return None


def check_blocks(data: Buffer, block_bytes: int, table: npt.NDArray[np.uint32], what: str) -> None:
    """Corrupt, naming ``what`` and the block, unless every block of ``data`` matches ``table``."""
    block = find_corrupt_block(data, block_bytes, table)
    if block is not None:
        raise Corrupt(f"{what}: block {block} (bytes {block * block_bytes}+) does not match its CRC-32C")


def digest(table: npt.NDArray[np.uint32]) -> int:
    """One number for a list of block CRCs: the CRC-32C of their little-endian bytes."""
    return int(crc32c(np.ascontiguousarray(table, dtype="<u4").tobytes()))
