"""The head of a parity file: every bit of it that means something is covered."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from ckptd.errors import Corrupt, FormatTooNew, InvalidRequest
from ckptd.format.blocks import HEADER_BYTES, SlotLayout
from ckptd.format.image import GroupRecord, ImageRecord, ShardRecord
from ckptd.format.parity import ParityHeader, decode_header, encode_header, file_bytes
from ckptd.format.slot import STATE_OFFSET, SlotHeader, SlotState, read_state, write_state
from ckptd.model import Geometry, Incarnation, Segment, SnapshotId

BLOCK = 1 << 16
DIGEST = 0xABCD
FIELDS = 204


def group(members: int = 3, m: int = 1, step: int = 7) -> GroupRecord:
    snapshot = SnapshotId(Incarnation(1, 1), step)
    layout = SlotLayout.plan(100, [Segment("float32", 5000)], BLOCK)
    images = tuple(
        ImageRecord((ShardRecord(SlotHeader("r", rank, 99, 0, snapshot, None, 1, 0, False, 0.0, layout), rank),))
        for rank in range(members)
    )
    return GroupRecord("r", snapshot, Geometry(members - m, m), BLOCK, images)


def file_of(header: ParityHeader, digest: int = DIGEST) -> bytearray:
    file = bytearray(file_bytes(header))
    encoded = encode_header(header, digest)
    file[: len(encoded)] = encoded
    file[HEADER_BYTES : HEADER_BYTES + len(header.record)] = header.record
    return file


@given(st.integers(2, 30), st.data())
def test_a_header_is_decoded_to_what_was_encoded(members: int, data: st.DataObject) -> None:
    m = data.draw(st.integers(1, members - 1))
    row, stripe = data.draw(st.integers(0, m - 1)), data.draw(st.integers(0, members - 1))
    header = ParityHeader(group(members, m), stripe, row, data.draw(st.integers(0, 4)))
    digest = data.draw(st.integers(0, 2**32 - 1))
    assert decode_header(memoryview(file_of(header, digest)), "test") == (header, digest)


def test_the_parts_follow_each_other_from_page_to_page() -> None:
    header = ParityHeader(group(members=30), 0, 0, 5)
    assert len(header.record) > 4096
    assert header.fragment_offset % 4096 == 0
    assert 0 <= header.fragment_offset - HEADER_BYTES - len(header.record) < 4096
    assert header.table_offset == header.fragment_offset + 5 * BLOCK
    assert file_bytes(header) == header.table_offset + 5 * 4


def test_the_fields_leave_the_state_word_alone() -> None:
    header = ParityHeader(group(), 2, 0, 1)
    file = memoryview(file_of(header))
    assert len(encode_header(header, DIGEST)) == FIELDS < STATE_OFFSET
    write_state(file, SlotState.SEALED)
    assert decode_header(file, "test") == (header, DIGEST)
    assert read_state(file) is SlotState.SEALED


def test_any_flipped_bit_of_the_fields_is_found() -> None:
    file = file_of(ParityHeader(group(), 2, 0, 1))
    for at in range(FIELDS):
        for bit in range(8):
            file[at] ^= 1 << bit
            with pytest.raises((Corrupt, FormatTooNew), match="somewhere"):
                decode_header(memoryview(file), "somewhere")
            file[at] ^= 1 << bit
    decode_header(memoryview(file), "somewhere")


def test_any_flipped_bit_of_the_record_is_found() -> None:
    header = ParityHeader(group(), 2, 0, 1)
    file = file_of(header)
    for at in range(HEADER_BYTES, HEADER_BYTES + len(header.record)):
        file[at] ^= 1 << at % 8
        with pytest.raises(Corrupt, match="somewhere: group record does not match"):
            decode_header(memoryview(file), "somewhere")
        file[at] ^= 1 << at % 8


def test_a_file_that_ends_early_is_corrupt_wherever_it_ends() -> None:
    header = ParityHeader(group(), 2, 0, 1)
    file = memoryview(file_of(header))
    record_end = HEADER_BYTES + len(header.record)
    for end, message in (
        (0, "header: 0 of 4096"),
        (4095, "header: 4095 of 4096"),
        (4096, "group record: 0 of"),
        (record_end - 1, "group record"),
        (record_end, "larger than its file"),
        (header.fragment_offset + 1, "larger than its file"),
        (len(file) - 1, "larger than its file"),
    ):
        with pytest.raises(Corrupt, match=message):
            decode_header(file[:end], "test")


def sealed_again(file: bytearray) -> bytearray:
    """With the CRC of the fields made right for what they are now."""
    file[196:200] = crc32c(bytes(file[:196]) + DIGEST.to_bytes(4, "little")).to_bytes(4, "little")
    return file


@pytest.mark.parametrize(
    ("offset", "kind", "value", "message"),
    [
        (12, "1s", b"x", "different snapshots"),
        (140, "Q", 2, "different snapshots"),
        (148, "Q", 2, "different snapshots"),
        (156, "Q", 8, "different snapshots"),
        (164, "I", 3, r"stripe 3, row 0 cannot be in a group of 2\+1"),
        (168, "I", 1, r"stripe 2, row 1 cannot be in a group of 2\+1"),
        (172, "I", 1 << 17, "different snapshots"),
        (176, "Q", 2, "larger than its file"),
        (176, "Q", 1 << 60, "fragment of .* blocks cannot be"),
        (184, "Q", 1 << 60, "group record: .* bytes are there"),
    ],
)
def test_fields_that_contradict_each_other_are_corrupt(offset: int, kind: str, value: object, message: str) -> None:
    file = file_of(ParityHeader(group(), 2, 0, 1))
    struct.pack_into(f"<{kind}", file, offset, value)
    with pytest.raises(Corrupt, match=message):
        decode_header(memoryview(sealed_again(file)), "test")


def test_a_record_of_another_version_is_refused_as_its_own_format_says() -> None:
    header = ParityHeader(group(), 2, 0, 1)
    file = file_of(header)
    newer = header.record.replace(b'"format":1', b'"format":2')
    file[HEADER_BYTES : HEADER_BYTES + len(newer)] = newer
    file[192:196] = crc32c(newer).to_bytes(4, "little")
    with pytest.raises(FormatTooNew, match="image format 2"):
        decode_header(memoryview(sealed_again(file)), "test")


def test_a_later_version_is_refused_with_the_version_that_reads_it() -> None:
    file = file_of(ParityHeader(group(), 2, 0, 1))
    file[8:12] = (2).to_bytes(4, "little")
    with pytest.raises(FormatTooNew, match="parity format 2 is newer than this ckptd reads"):
        decode_header(memoryview(file), "test")


def test_a_group_has_only_its_own_rows_and_stripes() -> None:
    header = ParityHeader(group(5, 2), 4, 1, 1)
    for wrong in ({"row": 2}, {"row": -1}, {"stripe": 5}, {"stripe": -1}, {"piece_blocks": -1}):
        with pytest.raises(InvalidRequest, match="cannot be"):
            replace(header, **wrong)
