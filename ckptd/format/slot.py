"""The header page of a slot: what it holds, how far it is written, whether it is sealed.

The page is 4096 bytes, little endian. The fields of ``SlotHeader`` are packed at offset 0 with a CRC over them and over
the table of block CRCs; the two mutable words have their own places: the state at 3072 and the written-up-to mark at
3136 (a cache line each). The client writes the mark; the daemon writes all else and flips WRITING to SEALED, last.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from crc32c import crc32c

from ckptd.errors import Corrupt, FormatTooNew
from ckptd.format.blocks import HEADER_BYTES, Buffer, SlotLayout
from ckptd.model import DTYPE_CODE, DTYPES, Incarnation, Segment, SnapshotId

MAGIC: Final = b"CKPTSLOT"
VERSION: Final = 1
STATE_OFFSET: Final = 3072
MARK_OFFSET: Final = 3136
_FIXED = struct.Struct("<8sII128sIIIQQQQQQQIIQQBdI")
_SEGMENT = struct.Struct("<BQ")
_CRC = struct.Struct("<II")  # of the fields, of the table


class SlotState(IntEnum):
    """Values far apart, so that no single flipped bit turns one state into another."""

    FREE = 0x45455246  # "FREE"
    WRITING = 0x54495257  # "WRIT"
    SEALED = 0x4C414553  # "SEAL"


@dataclass(frozen=True, slots=True)
class SlotHeader:
    """What a slot holds. ``parent`` is the snapshot this incarnation was restored from, or None; ``generation`` counts
    the uses of the file, so that a late writer cannot be taken for the present one."""

    run: str
    rank: int
    world_size: int
    uid: int
    snapshot: SnapshotId
    parent: SnapshotId | None
    roster_version: int
    index_crc: int
    is_persisted: bool
    sealed_at_s: float
    layout: SlotLayout
    generation: int = 0


def read_state(page: Buffer) -> SlotState | None:
    """The state word, or None when it is none of the known ones."""
    value = int.from_bytes(page[STATE_OFFSET : STATE_OFFSET + 4], "little")
    return SlotState(value) if value in SlotState._value2member_map_ else None


def write_state(page: Buffer, state: SlotState) -> None:
    page[STATE_OFFSET : STATE_OFFSET + 4] = int(state).to_bytes(4, "little")


def read_mark(page: Buffer) -> int:
    """Payload bytes written so far, from the payload's start without a gap."""
    return int(page[MARK_OFFSET : MARK_OFFSET + 8].cast("Q")[0])


def write_mark(page: Buffer, written_bytes: int) -> None:
    """Publish how far the payload is written. One aligned 8-byte store, so a reader never sees half of it."""
    page[MARK_OFFSET : MARK_OFFSET + 8].cast("Q")[0] = written_bytes


def encode_header(header: SlotHeader, table_digest: int) -> bytes:
    """The packed fields with their CRC; at most ``STATE_OFFSET`` bytes."""
    none = SnapshotId(Incarnation(0, 0), 0)
    parent = header.parent or none
    layout = header.layout
    fields = _FIXED.pack(
        MAGIC,
        VERSION,
        len(layout.segments),
        header.run.encode(),
        header.rank,
        header.world_size,
        header.uid,
        header.snapshot.incarnation.ordinal,
        header.snapshot.incarnation.id,
        header.snapshot.step,
        parent.incarnation.ordinal,
        parent.incarnation.id,
        parent.step,
        layout.index_bytes,
        header.index_crc,
        layout.block_bytes,
        header.roster_version,
        layout.payload_bytes,
        (1 if header.is_persisted else 0) | (2 if header.parent is not None else 0),
        header.sealed_at_s,
        header.generation,
    )
    fields += b"".join(_SEGMENT.pack(DTYPE_CODE[s.dtype], s.size_bytes) for s in layout.segments)
    return fields + _CRC.pack(crc32c(fields + table_digest.to_bytes(4, "little")), table_digest)


def check_magic(page: Buffer, what: str) -> None:
    """Corrupt unless the page is a slot's; FormatTooNew when a later version wrote it."""
    if bytes(page[:8]) != MAGIC:
        raise Corrupt(f"{what}: header: not a slot (wrong magic)")
    version = int.from_bytes(page[8:12], "little")
    if version > VERSION:
        raise FormatTooNew(
            f"{what}: slot format {version} is newer than this ckptd reads ({VERSION})",
            f"use a ckptd that reads slot format {version}",
        )


def decode_header(page: Buffer, what: str) -> tuple[SlotHeader, int]:
    """The header and the digest of the CRC table; Corrupt when the fields do not match their CRC."""
    check_magic(page, what)
    packed = _FIXED.unpack_from(page)
    count = packed[2]
    end = _FIXED.size + count * _SEGMENT.size
    if count > len(DTYPES) or end + _CRC.size > HEADER_BYTES:
        raise Corrupt(f"{what}: header: {count} segments cannot be")
    fields_crc, table_digest = _CRC.unpack_from(page, end)
    if crc32c(bytes(page[:end]) + table_digest.to_bytes(4, "little")) != fields_crc:
        raise Corrupt(f"{what}: header does not match its CRC-32C")
    segments = _segments(page, count)
    (_, _, _, run, rank, world_size, uid, ordinal, ident, step, p_ordinal, p_id, p_step) = packed[:13]
    index_bytes, index_crc, block_bytes, roster_version, payload_bytes, flags, sealed_at_s, generation = packed[13:]
    layout = SlotLayout.plan(index_bytes, segments, block_bytes)
    if layout.payload_bytes != payload_bytes:
        raise Corrupt(f"{what}: header: payload of {payload_bytes} bytes does not match its segments")
    header = SlotHeader(
        run=run.rstrip(b"\0").decode(),
        rank=rank,
        world_size=world_size,
        uid=uid,
        snapshot=SnapshotId(Incarnation(ordinal, ident), step),
        parent=SnapshotId(Incarnation(p_ordinal, p_id), p_step) if flags & 2 else None,
        roster_version=roster_version,
        index_crc=index_crc,
        is_persisted=bool(flags & 1),
        sealed_at_s=sealed_at_s,
        layout=layout,
        generation=generation,
    )
    return header, table_digest


def _segments(page: Buffer, count: int) -> Sequence[Segment]:
    segments = []
    for position in range(count):
        code, size_bytes = _SEGMENT.unpack_from(page, _FIXED.size + position * _SEGMENT.size)
        segments.append(Segment(DTYPES[code].name, size_bytes))
    return segments
