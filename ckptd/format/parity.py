"""A parity file: which fragment of which group it holds, where its parts lie, and whether it is sealed.

``[header page][group record][fragment][CRC table]``: the page is 4096 bytes, little endian, with the state word where a
slot has it; the record is zero-extended to a multiple of 4096; the table has one CRC per block of the fragment. Pure.
The page's CRC covers its fields and the digest of the table, the fields have the CRC of the record: with the blocks'
CRCs every byte that means something is covered.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from crc32c import crc32c

from ckptd.errors import Corrupt, FormatTooNew, InvalidRequest
from ckptd.format.blocks import CRC_BYTES, HEADER_BYTES, Buffer, align
from ckptd.format.image import GroupRecord, decode_group, encode_group

MAGIC: Final = b"CKPTPRTY"
VERSION: Final = 1
_FIXED = struct.Struct("<8sI128sQQQIIIQQI")
_CRC = struct.Struct("<II")  # of the fields, of the table
_MOST_PIECE_BYTES: Final = 1 << 48


@dataclass(frozen=True)
class ParityHeader:
    """Parity row ``row`` of stripe ``stripe`` of a group: ``piece_blocks`` blocks. Offsets are bytes in the file.

    Raises:
        InvalidRequest: the group has no such row or stripe.
    """

    group: GroupRecord
    stripe: int
    row: int
    piece_blocks: int

    def __post_init__(self) -> None:
        geometry = self.group.geometry
        if not (0 <= self.row < geometry.m and 0 <= self.stripe < sum(geometry)):
            raise InvalidRequest(f"stripe {self.stripe}, row {self.row} cannot be in a group of {geometry}")
        if not 0 <= self.fragment_bytes < _MOST_PIECE_BYTES:
            raise InvalidRequest(f"a fragment of {self.piece_blocks} blocks cannot be")

    @cached_property
    def record(self) -> bytes:
        """The group's record as it stands in the file, unpadded."""
        return encode_group(self.group)

    @property
    def fragment_bytes(self) -> int:
        return self.piece_blocks * self.group.block_bytes

    @property
    def fragment_offset(self) -> int:
        return HEADER_BYTES + align(len(self.record), HEADER_BYTES)

    @property
    def table_offset(self) -> int:
        return self.fragment_offset + self.fragment_bytes


def file_bytes(header: ParityHeader) -> int:
    """Bytes of the whole file: header page, record, fragment and CRC table."""
    return header.table_offset + header.piece_blocks * CRC_BYTES


def encode_header(header: ParityHeader, table_digest: int) -> bytes:
    """The packed fields of the page with their CRC; the group's record goes to ``HEADER_BYTES``."""
    group = header.group
    fields = _FIXED.pack(
        MAGIC,
        VERSION,
        group.run.encode(),
        group.snapshot.incarnation.ordinal,
        group.snapshot.incarnation.id,
        group.snapshot.step,
        header.stripe,
        header.row,
        group.block_bytes,
        header.piece_blocks,
        len(header.record),
        crc32c(header.record),
    )
    return fields + _CRC.pack(crc32c(fields + table_digest.to_bytes(4, "little")), table_digest)


def decode_header(file: Buffer, what: str) -> tuple[ParityHeader, int]:
    """The header and the digest of the CRC table, from the whole file; Corrupt or FormatTooNew, naming ``what``."""
    _check_magic(file, what)
    fields_crc, table_digest = _CRC.unpack_from(file, _FIXED.size)
    if crc32c(bytes(file[: _FIXED.size]) + table_digest.to_bytes(4, "little")) != fields_crc:
        raise Corrupt(f"{what}: header does not match its CRC-32C")
    _, _, run, ordinal, ident, step, stripe, row, block_bytes, piece_blocks, *rest = _FIXED.unpack_from(file)
    length, record_crc = rest
    record = bytes(file[HEADER_BYTES : HEADER_BYTES + length])
    if len(record) < length:
        raise Corrupt(f"{what}: group record: {len(record)} of {length} bytes are there")
    if crc32c(record) != record_crc:
        raise Corrupt(f"{what}: group record does not match its CRC-32C")
    group = decode_group(record, what)
    named = (group.run.encode(), *group.snapshot.incarnation, group.snapshot.step, group.block_bytes)
    if named != (run.rstrip(b"\0"), ordinal, ident, step, block_bytes):
        raise Corrupt(f"{what}: header and group record name different snapshots")
    try:
        header = ParityHeader(group, stripe, row, piece_blocks)
    except InvalidRequest as error:
        raise Corrupt(f"{what}: header: {error.message}") from error
    if file_bytes(header) > len(file):
        raise Corrupt(f"{what}: header: larger than its file")
    return header, table_digest


def _check_magic(file: Buffer, what: str) -> None:
    if len(file) < HEADER_BYTES:
        raise Corrupt(f"{what}: header: {len(file)} of {HEADER_BYTES} bytes are there")
    if bytes(file[:8]) != MAGIC:
        raise Corrupt(f"{what}: header: not parity (wrong magic)")
    version = int.from_bytes(file[8:12], "little")
    if version > VERSION:
        raise FormatTooNew(
            f"{what}: parity format {version} is newer than this ckptd reads ({VERSION})",
            f"use a ckptd that reads parity format {version}",
        )
