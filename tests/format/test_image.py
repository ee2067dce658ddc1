"""Images and group records: equal records are equal bytes, and nothing inconsistent can be decoded."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.errors import Corrupt, FormatTooNew, InvalidRequest
from ckptd.format.blocks import SlotLayout
from ckptd.format.image import (
    Extent,
    GroupRecord,
    ImageRecord,
    ShardRecord,
    decode_group,
    decode_image,
    encode_group,
    encode_image,
    table_blocks_of,
)
from ckptd.format.slot import SlotHeader
from ckptd.model import DTYPES, Geometry, Incarnation, Segment, SnapshotId

RUN = "gpt-small"
SNAPSHOT = SnapshotId(Incarnation(2, 0xC0FFEE), 1200)
BLOCK = 64


def shard(rank: int, floats: int = 100, block_bytes: int = BLOCK, index_bytes: int = 70) -> ShardRecord:
    layout = SlotLayout.plan(index_bytes, [Segment("float32", 4 * floats)], block_bytes)
    return ShardRecord(SlotHeader(RUN, rank, 64, 1000, SNAPSHOT, None, 1, 0xABC, False, 0.5, layout), 0xDEF)


def group(*images: tuple[int, ...], m: int = 1, floats: int = 100) -> GroupRecord:
    records = tuple(ImageRecord(tuple(shard(rank, floats) for rank in ranks)) for ranks in images)
    return GroupRecord(RUN, SNAPSHOT, Geometry(len(images) - m, m), BLOCK, records)


# --- any record ---------------------------------------------------------------------------------------------------
u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
snapshots = st.builds(SnapshotId, st.builds(Incarnation, u64, u64), u64)
sources = st.tuples(
    st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", fullmatch=True),
    snapshots,
    st.sampled_from([64, 4096, 1 << 16, 1 << 22]),
)
segment_lists = st.lists(
    st.builds(Segment, st.sampled_from([dtype.name for dtype in DTYPES]), st.integers(0, 1 << 24)),
    max_size=4,
    unique_by=lambda segment: segment.dtype,
)


@st.composite
def images(draw, source, ranks):
    run, snapshot, block_bytes = source
    shards = []
    for rank in sorted(ranks):
        layout = SlotLayout.plan(draw(st.integers(0, 5000)), draw(segment_lists), block_bytes)
        header = SlotHeader(
            run=run,
            rank=rank,
            world_size=1000,
            uid=draw(u32),
            snapshot=snapshot,
            parent=draw(st.none() | snapshots),
            roster_version=draw(u64),
            index_crc=draw(u32),
            is_persisted=draw(st.booleans()),
            sealed_at_s=draw(st.floats(allow_nan=False, allow_infinity=False)),
            layout=layout,
        )
        shards.append(ShardRecord(header, draw(u32)))
    return ImageRecord(tuple(shards))


rank_sets = st.sets(st.integers(0, 999), max_size=4)
any_image = st.tuples(sources, rank_sets).flatmap(lambda drawn: images(*drawn))


@st.composite
def groups(draw):
    source = draw(sources)
    m, ranks = draw(st.integers(1, 3)), draw(st.lists(rank_sets, min_size=4, max_size=6))
    taken: set[int] = set()
    members = []
    for wanted in ranks:
        members.append(draw(images(source, wanted - taken)))
        taken |= wanted
    run, snapshot, block_bytes = source
    return GroupRecord(run, snapshot, Geometry(len(members) - m, m), block_bytes, tuple(members))


@given(any_image)
def test_an_image_record_is_decoded_to_what_was_encoded(image: ImageRecord) -> None:
    assert decode_image(encode_image(image), "test") == image


@given(groups())
def test_a_group_record_is_decoded_to_what_was_encoded_and_keeps_its_key(record: GroupRecord) -> None:
    again = decode_group(encode_group(record), "test")
    assert again == record
    assert again.key == record.key
    assert again.image_blocks == tuple(image.blocks for image in record.images)


@given(groups(), st.data())
def test_damaged_records_are_refused_or_are_exactly_what_they_say(record: GroupRecord, data: st.DataObject) -> None:
    damaged = bytearray(encode_group(record))
    at = data.draw(st.integers(0, len(damaged) - 1))
    damaged[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    try:
        decoded = decode_group(bytes(damaged), "test")
    except (Corrupt, FormatTooNew):
        return
    assert encode_group(decoded) == damaged


@given(st.binary() | st.text().map(str.encode))
def test_what_is_not_a_record_is_corrupt(data: bytes) -> None:
    with pytest.raises(Corrupt, match="somewhere: image record"):
        decode_image(data, "somewhere")


def test_json_that_is_nested_without_end_is_corrupt() -> None:
    with pytest.raises(Corrupt):
        decode_group(b"[" * 1_000_000, "test")


# --- where blocks lie ---------------------------------------------------------------------------------------------
@given(any_image, st.data())
def test_extents_are_the_blocks_of_payloads_and_tables_in_turn(image: ImageRecord, data: st.DataObject) -> None:
    first, blocks = data.draw(st.integers(0, image.blocks + 2)), data.draw(st.integers(0, 2 * image.blocks + 2))
    if image.blocks > 100_000:
        blocks = min(blocks, 1000)
    starts, at = [], 0
    for position, each in enumerate(image.shards):
        for is_table, length in ((False, each.payload_blocks), (True, each.table_blocks)):
            starts.append((at, position, is_table, length))
            at += length
    assert at == image.blocks
    expected = []
    for start, position, is_table, length in starts:
        low, high = max(first, start), min(first + blocks, start + length)
        if low < high:
            expected.append(Extent(position, is_table, low - start, high - low))
    assert image.extents(first, blocks) == expected


def test_a_table_fills_whole_blocks() -> None:
    assert [table_blocks_of(blocks, 64) for blocks in (0, 1, 16, 17)] == [0, 1, 1, 2]
    assert shard(0).payload_blocks == 2 + 7
    assert shard(0).blocks == 10


def test_the_span_of_a_rank_is_where_its_payload_and_table_lie() -> None:
    image = ImageRecord((shard(2), shard(5, floats=1000)))
    assert image.span_of(2) == (0, 10)
    assert image.span_of(5) == (10, image.blocks - 10)
    assert image.extents(*image.span_of(5))[0] == Extent(1, False, 0, 65)
    with pytest.raises(InvalidRequest, match="rank 3 is not in this image"):
        image.span_of(3)


def test_an_image_without_shards_has_no_blocks() -> None:
    empty = ImageRecord(())
    assert (empty.ranks, empty.blocks, empty.extents(0, 5)) == ((), 0, [])
    assert decode_image(encode_image(empty), "test") == empty


# --- the bytes ----------------------------------------------------------------------------------------------------
def test_the_bytes_of_a_group_record_stay_what_they_are() -> None:
    record = group((0,), (), m=1)
    assert encode_group(record) == (
        b'{"format":1,"geometry":"1+1","images":[[{"index":{"bytes":70,"crc32c":2748},"is_persisted":false,'
        b'"parent":null,"payload_bytes":576,"rank":0,"roster_version":1,"sealed_at_s":0.5,"segments":[["float32",400]],'
        b'"table_digest":3567,"uid":1000,"world_size":64}],[]],'
        b'"of":{"block_bytes":64,"run":"gpt-small","snapshot":{"incarnation":"2-0000000000c0ffee","step":1200}}}'
    )
    assert record.key == 0xD32FFBC27E11884D


def test_the_key_tells_groups_apart_by_anything_in_them() -> None:
    records = [
        group((0,), (1,), (2,)),
        group((0,), (2,), (1,)),
        group((0,), (1,), (2,), m=2),
        group((0,), (1,), (2,), floats=101),
        group((0,), (1,), ()),
    ]
    assert len({record.key for record in records}) == len(records)


# --- what cannot be -----------------------------------------------------------------------------------------------
def changed(path: str, value: object) -> bytes:
    """A group's record with one value changed, in canonical form."""
    body = json.loads(encode_group(group((0, 1), (2,), ())))
    *above, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    inner = body
    for part in above:
        inner = inner[part]
    inner[last] = value
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


FIRST = "images.0.0"
ONE = json.loads(encode_group(group((0,), ())))["images"][0][0]
DEFECTS = {
    "version_of_the_past": ("format", 0),
    "version_that_is_a_text": ("format", "1"),
    "no_geometry": ("geometry", None),
    "geometry_of_other_size": ("geometry", "3+1"),
    "geometry_written_otherwise": ("geometry", "02+1"),
    "geometry_without_parity": ("geometry", "3+0"),
    "too_many_images": ("images", [[]] * 256),
    "images_that_are_no_list": ("images.0", {"a": 1}),
    "too_many_shards": ("images.0", [ONE] * 4097),
    "rank_twice_in_an_image": ("images.0.1.rank", 0),
    "ranks_that_descend": ("images.0.0.rank", 5),
    "rank_in_two_images": ("images.1.0.rank", 1),
    "rank_beyond_the_world": (f"{FIRST}.rank", 64),
    "rank_that_is_a_flag": (f"{FIRST}.rank", False),
    "another_world_size": (f"{FIRST}.world_size", 65),
    "world_size_that_is_a_fraction": (f"{FIRST}.world_size", 64.0),
    "negative_uid": (f"{FIRST}.uid", -1),
    "uid_of_33_bits": (f"{FIRST}.uid", 1 << 32),
    "parent_without_step": (f"{FIRST}.parent", {"incarnation": "1-0000000000000001"}),
    "parent_of_65_bits": (f"{FIRST}.parent", {"incarnation": "1-0000000000000001", "step": 1 << 64}),
    "index_that_is_missing": (f"{FIRST}.index", {}),
    "index_of_other_size": (f"{FIRST}.index.bytes", 7000),
    "index_of_no_size": (f"{FIRST}.index.bytes", -1),
    "payload_of_other_size": (f"{FIRST}.payload_bytes", 640),
    "segment_of_unknown_dtype": (f"{FIRST}.segments", [["float33", 400]]),
    "segment_twice": (f"{FIRST}.segments", [["float32", 200], ["float32", 200]]),
    "segment_of_a_petabyte": (f"{FIRST}.segments", [["float32", 1 << 50]]),
    "too_many_segments": (f"{FIRST}.segments", [["float32", 0]] * 21),
    "flag_that_is_a_number": (f"{FIRST}.is_persisted", 0),
    "time_that_is_no_number": (f"{FIRST}.sealed_at_s", float("nan")),
    "time_that_is_a_text": (f"{FIRST}.sealed_at_s", "now"),
    "time_without_fraction": (f"{FIRST}.sealed_at_s", 1),
    "digest_of_33_bits": (f"{FIRST}.table_digest", 1 << 32),
    "field_of_unknown_meaning": (f"{FIRST}.colour", "red"),
    "run_that_is_a_path": ("of.run", "../etc"),
    "run_that_is_a_number": ("of.run", 7),
    "no_snapshot": ("of.snapshot", None),
    "incarnation_written_otherwise": ("of.snapshot.incarnation", "2-c0ffee"),
    "negative_step": ("of.snapshot.step", -1),
    "blocks_of_no_size": ("of.block_bytes", 0),
    "blocks_of_odd_size": ("of.block_bytes", 100),
    "blocks_beyond_4_MiB": ("of.block_bytes", 1 << 23),
    "no_source": ("of", None),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_record_with_a_defect_is_corrupt(defect: str) -> None:
    with pytest.raises(Corrupt, match="somewhere: group record"):
        decode_group(changed(*DEFECTS[defect]), "somewhere")


def test_a_record_in_another_form_is_corrupt() -> None:
    data = encode_group(group((0,), (1,)))
    for other in (data + b"\n", json.dumps(json.loads(data)).encode(), data.replace(b'"uid"', b'"ui\\u0064"')):
        assert json.loads(other) == json.loads(data)
        with pytest.raises(Corrupt, match="not in canonical form"):
            decode_group(other, "test")
    with pytest.raises(Corrupt, match="not in canonical form"):
        decode_image(encode_image(ImageRecord((shard(0),))) + b" ", "test")


def test_an_image_without_a_source_has_no_shards() -> None:
    body = json.loads(encode_image(ImageRecord((shard(0),))))
    for value in ({**body, "of": None}, {**body, "shards": []}):
        with pytest.raises(Corrupt):
            decode_image(json.dumps(value, sort_keys=True, separators=(",", ":")).encode(), "test")


def test_records_of_a_later_version_are_refused_with_the_version_that_reads_them() -> None:
    with pytest.raises(FormatTooNew, match="image format 2 is newer"):
        decode_group(changed("format", 2), "test")
    with pytest.raises(FormatTooNew, match="image format 7 is newer"):
        decode_image(b'{"format":7,"shards":"what it knows"}', "test")


def test_a_shard_record_takes_no_generation() -> None:
    with pytest.raises(InvalidRequest, match="generation 3 cannot be"):
        ShardRecord(replace(shard(0).header, generation=3), 0)


def test_a_shard_record_takes_only_the_layout_of_its_segments() -> None:
    header = shard(0).header
    with pytest.raises(InvalidRequest, match="layout is not that of"):
        ShardRecord(replace(header, layout=replace(header.layout, payload_bytes=640)), 0)


def test_images_are_of_one_snapshot_and_ascend() -> None:
    with pytest.raises(InvalidRequest, match="do not ascend"):
        ImageRecord((shard(1), shard(0)))
    with pytest.raises(InvalidRequest, match="not all of one run"):
        ImageRecord((shard(0), shard(1, block_bytes=128)))
    other = ShardRecord(replace(shard(1).header, snapshot=SNAPSHOT._replace(step=1)), 0)
    with pytest.raises(InvalidRequest, match="not all of one run"):
        ImageRecord((shard(0), other))
    with pytest.raises(InvalidRequest, match="at most 4096"):
        ImageRecord((shard(0),) * 4097)


def test_a_group_takes_only_images_of_its_snapshot_and_as_many_as_its_geometry() -> None:
    one, two = ImageRecord((shard(0),)), ImageRecord((shard(1),))
    with pytest.raises(InvalidRequest, match="not of step 7"):
        GroupRecord(RUN, SNAPSHOT._replace(step=7), Geometry(1, 1), BLOCK, (one, two))
    with pytest.raises(InvalidRequest, match=r"2 images cannot be 2\+1"):
        GroupRecord(RUN, SNAPSHOT, Geometry(2, 1), BLOCK, (one, two))
    with pytest.raises(InvalidRequest, match="in two images"):
        GroupRecord(RUN, SNAPSHOT, Geometry(1, 1), BLOCK, (one, one))
