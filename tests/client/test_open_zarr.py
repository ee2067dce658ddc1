from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from ckptd.errors import Corrupt, InvalidRequest, UnknownRun, UnknownStep
from ckptd.format.blocks import SlotLayout, checksum_blocks
from ckptd.format.index import encode_index
from ckptd.format.manifest import Manifest, folder_name
from ckptd.model import DTYPE_CODE, DTYPES, Box, Incarnation, Segment, ShardIndex, SnapshotId
from ckptd.tiers import TierSpec, ZarrTier
from ckptd_client.zarr import open_zarr

BLOCK_BYTES = 64 * 1024
RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((300, 200)).astype(np.float32)
BF16 = RNG.integers(0, 2**16, (7, 5)).astype(np.uint16)
Part = tuple[str, str, tuple[int, ...], tuple[int, ...], np.ndarray]  # name, dtype, global shape, offset, values


def whole(name: str, dtype: str, values: np.ndarray) -> Part:
    return name, dtype, values.shape, (0,) * values.ndim, values


def write_rank(tier: ZarrTier, run: str, snapshot: SnapshotId, rank: int, parts: list[Part]):
    """One rank's shard: its boxes one after the other in the segment of their dtype, 64-byte aligned."""
    boxes: list[Box] = []
    segments: dict[str, bytearray] = {}
    for name, dtype, global_shape, offset, values in parts:
        segment = segments.setdefault(dtype, bytearray())
        segment += bytes(-len(segment) % 64)
        boxes.append(Box(name, dtype, global_shape, offset, values.shape, len(segment)))
        segment += np.ascontiguousarray(values).tobytes()
    index = encode_index(ShardIndex.from_boxes(boxes, [Segment(d, len(data)) for d, data in segments.items()]))
    layout = SlotLayout.plan(len(index), [Segment(d, len(data)) for d, data in segments.items()], BLOCK_BYTES)
    payload = memoryview(bytearray(layout.payload_bytes))
    payload[: len(index)] = index
    for data, offset in zip(segments.values(), layout.segment_offsets, strict=True):
        payload[offset : offset + len(data)] = data
    table = np.zeros(layout.blocks, np.uint32)
    checksum_blocks(payload, BLOCK_BYTES, 0, layout.blocks, table)
    return tier.write_rank(run, snapshot, rank, layout, payload, table)


def commit(
    url: str, ranks: list[list[Part]], step: int = 10, ordinal: int = 1, run: str = "gpt", put: bool = True
) -> None:
    tier = ZarrTier(TierSpec.parse(url))
    tier.open()
    snapshot = SnapshotId(Incarnation(ordinal, 0xABC), step)
    records = tuple(write_rank(tier, run, snapshot, rank, parts) for rank, parts in enumerate(ranks))
    if put:
        tier.commit(Manifest(run, snapshot, None, len(ranks), 1, BLOCK_BYTES, 1.7e9, records))


def two_ranks() -> list[list[Part]]:
    return [
        [
            ("w", "float32", (300, 200), (0, 0), WEIGHT[:170]),
            whole("norm", "float32", WEIGHT[0]),
            whole("bf16", "bfloat16", BF16),
            whole("step", "int64", np.array(7)),
            whole("none", "float32", np.zeros((0, 3), np.float32)),
        ],
        [("w", "float32", (300, 200), (170, 0), WEIGHT[170:]), whole("norm", "float32", WEIGHT[0])],
    ]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/tier"


@pytest.fixture
def tensors(url):
    commit(url, two_ranks())
    return open_zarr(url)


def test_every_tensor_is_an_array_by_its_name(tensors):
    assert set(tensors) == {"w", "norm", "bf16", "step", "none"}
    assert len(tensors) == 5
    assert tensors["w"].shape == (300, 200)
    assert tensors["w"].dtype == np.float32
    assert [box.offset for box in tensors["w"].boxes] == [(0, 0), (170, 0)]
    assert len(tensors["norm"].boxes) == 1
    assert np.array_equal(np.asarray(tensors["w"]), WEIGHT)
    assert np.array_equal(tensors["norm"][...], WEIGHT[0])
    assert tensors["none"][...].shape == (0, 3)
    with pytest.raises(KeyError):
        tensors["nope"]


def test_dtypes_that_numpy_lacks_come_as_bit_patterns(tensors):
    assert tensors["bf16"].stored_dtype == "bfloat16"
    assert tensors["bf16"].dtype == np.uint16
    assert np.array_equal(tensors["bf16"][...], BF16)


def test_zero_dimensional_tensors_read_like_those_of_numpy(tensors):
    assert tensors["step"][()] == 7
    assert isinstance(tensors["step"][()], np.int64)
    assert tensors["step"][...].shape == ()
    assert int(np.asarray(tensors["step"])) == 7


KEYS = [
    0,
    -1,
    169,
    slice(None),
    slice(160, 180),
    slice(180, 160, -1),
    slice(None, None, -7),
    slice(5, 5),
    slice(-3, None),
    ...,
    None,
]


@pytest.mark.parametrize(("first", "second"), list(itertools.product(KEYS, KEYS)))
def test_basic_indexing_is_that_of_numpy(tensors, first, second):
    try:
        expected = WEIGHT[first, second]
    except IndexError:
        with pytest.raises(IndexError):
            tensors["w"][first, second]
        return
    found = tensors["w"][first, second]
    assert type(found) is type(expected)
    assert found.shape == expected.shape
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("key", [(0, 0, 0), 300, -301, "x", 1.5, [1, 2], True, np.array([True])])
def test_indices_that_basic_indexing_lacks_are_index_errors(tensors, key):
    with pytest.raises(IndexError):
        tensors["w"][key]


def test_only_boxes_that_overlap_the_request_are_read(url, tensors):
    for path in Path(url.removeprefix("file://")).glob("gpt/*/rank-00001/float32/c/*"):
        path.unlink()
    assert np.array_equal(tensors["w"][:170, 3], WEIGHT[:170, 3])


def test_a_flipped_byte_is_found_when_it_is_read(url, tensors):
    (path,) = Path(url.removeprefix("file://")).glob("gpt/*/rank-00001/float32/c/0")
    data = bytearray(path.read_bytes())
    data[70_000] ^= 1
    path.write_bytes(data)
    assert np.array_equal(tensors["w"][170:180], WEIGHT[170:180])
    with pytest.raises(Corrupt, match=r"float32 from byte .*block"):
        tensors["w"][...]


def test_a_damaged_index_is_found_when_it_is_opened(url):
    commit(url, two_ranks())
    (path,) = Path(url.removeprefix("file://")).glob("gpt/*/rank-00001/index")
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    with pytest.raises(Corrupt, match="rank-00001/index"):
        open_zarr(url)


def test_a_part_that_no_rank_holds_is_told(url):
    commit(url, [[("w", "float32", (300, 200), (0, 0), WEIGHT[:170])]])
    tensor = open_zarr(url)["w"]
    assert np.array_equal(tensor[:170], WEIGHT[:170])
    with pytest.raises(Corrupt, match="no rank of the checkpoint holds"):
        tensor[160:180]


def test_overlapping_parts_are_put_together(url):
    commit(url, [[("w", "float32", (300, 200), (at, 0), WEIGHT[at : at + 120])] for at in (0, 90, 180)])
    assert np.array_equal(open_zarr(url)["w"][...], WEIGHT)


def test_every_dtype_reads_back(url):
    parts = []
    for dtype in DTYPES:
        stored = np.dtype(dtype.stored)
        values = RNG.integers(0, 2, (5, 3)).astype(stored)
        parts.append(whole(dtype.name, dtype.name, values))
    commit(url, [parts])
    tensors = open_zarr(url)
    for name, _, _, _, values in parts:
        assert tensors[name].dtype == DTYPES[DTYPE_CODE[name]].stored
        assert np.array_equal(tensors[name][...], values)


def test_the_newest_committed_step_of_the_newest_incarnation_is_opened(url):
    for step, ordinal in ((10, 1), (30, 1), (20, 2)):
        commit(url, two_ranks(), step, ordinal)
    commit(url, two_ranks(), 40, 2, put=False)
    assert open_zarr(url).manifest.snapshot.step == 20
    assert open_zarr(url, step=30).manifest.snapshot.incarnation.ordinal == 1
    path = url.removeprefix("file://")
    assert open_zarr(f"{url}/gpt", step=10).folder == Path(path) / "gpt" / folder_name(
        SnapshotId(Incarnation(1, 0xABC), 10)
    )
    assert open_zarr(path, run="gpt").manifest.snapshot.step == 20
    with pytest.raises(UnknownStep, match="committed steps: 10, 20, 30"):
        open_zarr(url, step=40)


def test_unknown_runs_and_urls_are_told(url):
    with pytest.raises(UnknownRun):
        open_zarr(url)
    commit(url, two_ranks())
    commit(url, two_ranks(), run="other")
    with pytest.raises(UnknownRun, match=r"run=.*gpt.*other"):
        open_zarr(url)
    with pytest.raises(UnknownRun, match="no run 'nope'"):
        open_zarr(url, run="nope")
    with pytest.raises(InvalidRequest):
        open_zarr(url, run="../x")
    with pytest.raises(InvalidRequest, match="not a path on this machine"):
        open_zarr("s3://bucket/tier")


def test_compressed_arrays_read_the_same(url):
    commit(f"{url},codec=zstd", two_ranks())
    assert np.array_equal(open_zarr(url)["w"][...], WEIGHT)
