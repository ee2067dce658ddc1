"""What is written comes back, bit for bit, through our reader and through anybody else's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numcodecs
import numpy as np
import pytest
import zarr
from tier_shards import BLOCK_BYTES, RUN, SNAPSHOT, drain, every_dtype, make_shard, read_back, small_shard, write

from ckptd.errors import CommitConflict, InvalidRequest, TierFailed, UnknownStep
from ckptd.format.blocks import checksum_blocks
from ckptd.format.manifest import folder_name
from ckptd.model import DTYPES, Incarnation, SnapshotId
from ckptd.tiers import StoredSnapshot, TierSpec, ZarrTier
from ckptd.tiers.arrays import CHUNK_BYTES, chunk_bytes_for

PLAIN = {"codec_pipeline.path": "zarr.core.codec_pipeline.BatchedCodecPipeline"}


def checkpoint(tier: ZarrTier) -> Path:
    return tier.spec.path / RUN / folder_name(SNAPSHOT)


@pytest.mark.parametrize("codec", ["none", "zstd", "blosc"])
def test_every_dtype_comes_back_bit_for_bit(url: str, codec: str) -> None:
    tier = ZarrTier(TierSpec.parse(f"{url},codec={codec}"))
    tier.open()
    shard = make_shard({**every_dtype(), "float16": 0})
    manifest = drain(tier, [shard])
    layout, payload, table = read_back(tier, manifest)
    assert layout == shard.layout
    assert payload == bytes(shard.payload)
    assert (table == shard.table).all()
    assert tier.verify(RUN, SNAPSHOT) == []


def test_a_segment_of_many_chunks_comes_back(tier: ZarrTier) -> None:
    shard = make_shard({"float32": 5 * CHUNK_BYTES + 4 * 12345, "uint8": 3}, block_bytes=1 << 20)
    seen: list[int] = []
    manifest = drain(tier, [shard])
    payload = memoryview(bytearray(shard.layout.payload_bytes))
    tier.read_rank(manifest, 0, payload, seen.append)
    assert payload == shard.payload
    assert sum(seen) == manifest.size_bytes
    assert tier.verify(RUN, SNAPSHOT) == []


def test_all_zero_chunks_are_written_like_any_other(tier: ZarrTier) -> None:
    zeros = make_shard({"float32": 3 * CHUNK_BYTES})
    zeros.payload[:] = bytes(len(zeros.payload))
    checksum_blocks(zeros.payload, BLOCK_BYTES, 0, zeros.layout.blocks, zeros.table)
    manifest = drain(tier, [zeros])
    assert sorted(p.name for p in (checkpoint(tier) / "rank-00000/float32/c").iterdir()) == ["0", "1", "2"]
    (checkpoint(tier) / "rank-00000/float32/c/1").unlink()
    assert tier.missing(manifest) == [
        f"{tier.spec.url} {RUN}/{folder_name(SNAPSHOT)}/rank-00000/float32: chunk 1 is not there"
    ]


@pytest.mark.parametrize("size_bytes", [0, 4, 65536, CHUNK_BYTES, CHUNK_BYTES + 4, 10 * CHUNK_BYTES - 4, 1 << 30])
@pytest.mark.parametrize("block_bytes", [1 << 16, 1 << 22])
def test_chunks_are_whole_blocks_and_waste_little(size_bytes: int, block_bytes: int) -> None:
    chunk = chunk_bytes_for(size_bytes, block_bytes)
    assert chunk <= CHUNK_BYTES
    chunks = -(-size_bytes // max(1, chunk))
    assert chunks <= 1 or chunk % block_bytes == 0
    assert chunks * chunk - size_bytes < max(1, chunk)
    assert size_bytes != 1 << 30 or chunk == CHUNK_BYTES


@pytest.mark.filterwarnings("ignore:Object at:UserWarning")  # zarr notices manifest.json and index
@pytest.mark.parametrize("codec", ["none", "zstd", "blosc"])
def test_plain_zarr_opens_a_checkpoint_and_its_arrays(url: str, codec: str) -> None:
    tier = ZarrTier(TierSpec.parse(f"{url},codec={codec}"))
    tier.open()
    shard = make_shard(every_dtype())
    drain(tier, [shard, small_shard(1)])
    with zarr.config.set(PLAIN):
        group = zarr.open_group(str(checkpoint(tier)), mode="r")
        assert sorted(group.group_keys()) == ["rank-00000", "rank-00001"]
        for dtype, (_, offset, size) in zip(DTYPES, shard.layout.parts()[1:], strict=True):
            array = group[f"rank-00000/{dtype.name}"]
            assert isinstance(array, zarr.Array)
            assert array.dtype == np.dtype(dtype.stored)
            assert array.attrs["ckptd"]["dtype"] == dtype.name
            assert array[:].tobytes() == bytes(shard.payload[offset : offset + size])


@pytest.mark.parametrize("codec", ["zstd", "blosc"])
def test_numcodecs_decodes_a_compressed_chunk_to_the_same_bytes(url: str, codec: str) -> None:
    tier = ZarrTier(TierSpec.parse(f"{url},codec={codec}"))
    tier.open()
    shard = make_shard({"float32": 400_000})
    drain(tier, [shard])
    reference = numcodecs.Zstd() if codec == "zstd" else numcodecs.Blosc()
    chunk = (checkpoint(tier) / "rank-00000/float32/c/0").read_bytes()
    offset = shard.layout.segment_offsets[0]
    assert bytes(reference.decode(chunk)) == bytes(shard.payload[offset : offset + 400_000])


def test_an_uncompressed_chunk_is_the_bytes_of_the_segment(tier: ZarrTier) -> None:
    shard = make_shard({"bfloat16": 2 * CHUNK_BYTES})
    drain(tier, [shard])
    offset, folder = shard.layout.segment_offsets[0], checkpoint(tier) / "rank-00000/bfloat16"
    for chunk in range(2):
        start = offset + chunk * CHUNK_BYTES
        assert (folder / "c" / str(chunk)).read_bytes() == bytes(shard.payload[start : start + CHUNK_BYTES])
    document = json.loads((folder / "zarr.json").read_bytes())
    assert document["data_type"] == "uint16"
    assert document["shape"] == [CHUNK_BYTES]
    assert [codec["name"] for codec in document["codecs"]] == ["bytes"]


def test_an_index_comes_back_with_its_table(tier: ZarrTier) -> None:
    shard = small_shard()
    manifest = drain(tier, [shard])
    index, table = tier.read_index(RUN, SNAPSHOT, manifest.ranks[0], manifest.block_bytes)
    assert index == bytes(shard.payload[: shard.layout.index_bytes])
    assert (table == shard.table).all()


def test_writing_a_rank_again_gives_the_same_record_and_touches_nothing(tier: ZarrTier) -> None:
    shard = small_shard()
    first = write(tier, [shard])
    chunk = checkpoint(tier) / "rank-00000/float32/c/0"
    before = chunk.stat().st_mtime_ns, chunk.stat().st_ino
    assert write(tier, [shard]) == first
    tier.commit(first)
    assert write(tier, [shard]) == first
    assert (chunk.stat().st_mtime_ns, chunk.stat().st_ino) == before


def test_other_bytes_never_replace_those_of_a_committed_checkpoint(tier: ZarrTier) -> None:
    manifest = drain(tier, [small_shard(0)])
    with pytest.raises(CommitConflict, match="committed already"):
        write(tier, [small_shard(1)])
    assert read_back(tier, manifest)[1] == bytes(small_shard(0).payload)


def test_what_is_stored_is_listed_and_what_is_not_is_unknown(tier: ZarrTier) -> None:
    assert tier.runs() == []
    assert tier.snapshots(RUN) == []
    older, newer = SnapshotId(Incarnation(1, 7), 900), SnapshotId(Incarnation(2, 1), 30)
    drain(tier, [small_shard()], newer)
    write(tier, [small_shard()], older)
    (tier.spec.path / "lost-and-found").mkdir()
    (tier.spec.path / RUN / "step-1.x").mkdir()
    assert tier.runs() == [RUN]
    assert tier.snapshots(RUN) == [StoredSnapshot(older, False), StoredSnapshot(newer, True)]
    assert tier.manifest(RUN, newer).snapshot == newer
    with pytest.raises(UnknownStep):
        tier.manifest(RUN, older)
    with pytest.raises(UnknownStep):
        tier.layout_of(tier.manifest(RUN, newer), 5)


def test_a_tier_that_is_gone_is_a_failure_and_not_an_empty_tier(tier: ZarrTier) -> None:
    shutil.rmtree(tier.spec.path)
    for question in (tier.probe, tier.runs, lambda: tier.snapshots(RUN), lambda: tier.manifest(RUN, SNAPSHOT)):
        with pytest.raises(TierFailed, match="is the file system mounted"):
            question()
    with pytest.raises(TierFailed):
        tier.incarnations(RUN)


def test_a_tier_on_a_file_is_refused_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in ("file", "file/below"):
        with pytest.raises(TierFailed, match="a tier is a folder"):
            ZarrTier(TierSpec.parse(f"file://{tmp_path}/{path}")).open()


def test_a_run_name_cannot_leave_the_tier(tier: ZarrTier) -> None:
    for run in ("../other", "/etc", ".", "a/b"):
        for call in (tier.snapshots, tier.incarnations, lambda run: tier.delete(run, SNAPSHOT)):
            with pytest.raises(InvalidRequest):
                call(run)


def test_records_of_incarnations_are_kept_and_never_replaced(tier: ZarrTier) -> None:
    assert tier.incarnations(RUN) == {}
    tier.record_incarnation(RUN, "1-00000000000000ab", b'{"parent": null}')
    tier.record_incarnation(RUN, "1-00000000000000ab", b'{"parent": null}')
    with pytest.raises(CommitConflict):
        tier.record_incarnation(RUN, "1-00000000000000ab", b'{"parent": 1}')
    assert tier.incarnations(RUN) == {"1-00000000000000ab": b'{"parent": null}'}
    assert tier.runs() == [RUN]
    assert tier.snapshots(RUN) == []


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's high-water mark of memory")
@pytest.mark.parametrize("codec", ["none", "blosc"])
def test_draining_reading_and_verifying_copy_no_segment(url: str, codec: str) -> None:
    tier = ZarrTier(TierSpec.parse(f"{url},codec={codec}"))
    tier.open()
    shard = make_shard({"float32": 16 * CHUNK_BYTES}, block_bytes=1 << 20, random_bytes=1 << 20)
    target = memoryview(bytearray(b"\x01" * shard.layout.payload_bytes))
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmRSS")
    manifest = drain(tier, [shard])
    tier.read_rank(manifest, 0, target)
    assert tier.verify(RUN, SNAPSHOT) == []
    assert resident_bytes("VmHWM") - before < 160 << 20
    assert target == shard.payload


def resident_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
