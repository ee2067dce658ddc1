"""A flipped bit, a lost file or a future format anywhere is found, and the line names where."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from crc32c import crc32c
from tier_shards import BLOCK_BYTES, RUN, SNAPSHOT, drain, make_shard, read_back, small_shard, write

from ckptd.errors import CommitConflict, Corrupt, DrainFailed, FormatTooNew, TierFailed, TierNotShared
from ckptd.format.manifest import MANIFEST_NAME, RankRecord, folder_name
from ckptd.model import Incarnation, SnapshotId
from ckptd.tiers import TierSpec, ZarrTier
from ckptd.tiers.arrays import CHUNK_BYTES

STEP = folder_name(SNAPSHOT)


def folder(tier: ZarrTier) -> Path:
    return tier.spec.path / RUN / STEP


def flip(path: Path, byte: int, bit: int = 3) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


def reason_of(tier: ZarrTier) -> str:
    """What a restore says of rank 0, from the manifest on."""
    with pytest.raises((Corrupt, FormatTooNew)) as caught:
        read_back(tier, tier.manifest(RUN, SNAPSHOT))
    return str(caught.value)


def test_a_flipped_bit_in_a_chunk_names_array_and_block(tier: ZarrTier) -> None:
    drain(tier, [small_shard()])
    flip(folder(tier) / "rank-00000/float32/c/0", 3 * BLOCK_BYTES + 17)
    line = f"{tier.spec.url} {RUN}/{STEP}/rank-00000/float32: block 3 does not match its CRC-32C"
    assert tier.verify(RUN, SNAPSHOT) == [line]
    assert line in reason_of(tier)


def test_flips_in_several_chunks_are_all_named_up_to_a_bound(tier: ZarrTier) -> None:
    drain(tier, [make_shard({"uint8": 3 * CHUNK_BYTES})])
    chunk_blocks = CHUNK_BYTES // BLOCK_BYTES
    for block in range(chunk_blocks, chunk_blocks + 10):
        flip(folder(tier) / "rank-00000/uint8/c/1", (block - chunk_blocks) * BLOCK_BYTES)
    lines = tier.verify(RUN, SNAPSHOT)
    assert len(lines) == 9
    assert f"block {chunk_blocks} " in lines[0]
    assert lines[-1].endswith("2 more blocks do not match")


@pytest.mark.parametrize(
    ("byte", "reason"),
    [
        (10, "index: index bytes do not match their CRC-32C"),
        (1000, "index: block 0"),
        (1000 + 4 * 2, "index: block CRCs of float32 do not match their digest"),
        (-1, "index: block CRCs of bfloat16 do not match their digest"),
    ],
)
def test_a_flipped_bit_in_the_index_or_its_table_is_named(tier: ZarrTier, byte: int, reason: str) -> None:
    manifest = write(tier, [small_shard()])
    shutil.copytree(folder(tier), tier.spec.path / "copy")
    flip(folder(tier) / "rank-00000/index", byte)
    with pytest.raises(Corrupt, match="rank-00000/index"):
        tier.commit(manifest)
    shutil.rmtree(folder(tier))
    shutil.move(tier.spec.path / "copy", folder(tier))
    tier.commit(manifest)
    flip(folder(tier) / "rank-00000/index", byte)
    assert reason in reason_of(tier)
    (line,) = tier.verify(RUN, SNAPSHOT)
    assert reason in line


@pytest.mark.parametrize("name", ["manifest.json", "rank-00000/float32/zarr.json", "rank-00000/zarr.json", "zarr.json"])
def test_every_flipped_bit_in_a_json_file_is_found_and_named(tier: ZarrTier, name: str) -> None:
    drain(tier, [make_shard({"float32": 1024})])
    path = folder(tier) / name
    whole = path.read_bytes()
    for place in range(0, len(whole) * 8, 29):
        flip(path, place // 8, place % 8)
        lines = tier.verify(RUN, SNAPSHOT)
        is_same = _loads(path.read_bytes()) == json.loads(whole)  # 1E9 for 1e9: the same document
        assert is_same or any(name.rpartition("/")[0] in line for line in lines), path.read_bytes()
        path.write_bytes(whole)
    assert tier.verify(RUN, SNAPSHOT) == []


def _loads(data: bytes) -> object:
    try:
        return json.loads(data)
    except ValueError:
        return None


def test_a_flipped_bit_in_the_metadata_of_an_array_stops_a_restore(tier: ZarrTier) -> None:
    drain(tier, [small_shard()])
    path = folder(tier) / "rank-00000/float32/zarr.json"
    path.write_bytes(path.read_bytes().replace(b"75000", b"75001"))
    assert "rank-00000/float32: zarr.json does not match its CRC-32C" in reason_of(tier)


@pytest.mark.parametrize("codec", ["zstd", "blosc"])
def test_a_compressed_chunk_that_is_cut_short_is_named(url: str, codec: str) -> None:
    tier = ZarrTier(TierSpec.parse(f"{url},codec={codec}"))
    tier.open()
    drain(tier, [make_shard({"uint8": 2 * CHUNK_BYTES})])
    chunk = folder(tier) / "rank-00000/uint8/c/1"
    chunk.write_bytes(chunk.read_bytes()[:1000])
    assert "uint8: chunk 1 cannot be decoded" in reason_of(tier)
    (line,) = tier.verify(RUN, SNAPSHOT)
    assert "rank-00000/uint8: chunk 1 cannot be decoded" in line


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: (f / "rank-00000/float32/c/0").unlink(), "rank-00000/float32: chunk 0 is not there"),
        (lambda f: (f / "rank-00000/float32/c/0").write_bytes(b"x"), "rank-00000/float32: chunk 0 has 1 bytes"),
        (lambda f: shutil.rmtree(f / "rank-00000/bfloat16"), "rank-00000/bfloat16: zarr.json is not there"),
        (lambda f: (f / "rank-00000/index").write_bytes(b"x"), "rank-00000/index: has 1 bytes"),
    ],
)
def test_what_was_planned_and_is_not_whole_is_never_committed(
    tier: ZarrTier, damage: Callable[[Path], object], reason: str
) -> None:
    manifest = write(tier, [small_shard()])
    damage(folder(tier))
    assert reason in tier.missing(manifest)[0]
    with pytest.raises(Corrupt, match=reason):
        tier.commit(manifest)
    assert not tier.snapshots(RUN)[0].is_committed
    assert write(tier, [small_shard()]) == manifest
    tier.commit(manifest)
    assert tier.verify(RUN, SNAPSHOT) == []
    damage(folder(tier))
    assert reason in tier.verify(RUN, SNAPSHOT)[0]


def test_a_rank_that_is_not_to_be_seen_means_the_tier_is_not_shared(tier: ZarrTier, tmp_path: Path) -> None:
    manifest = write(tier, [small_shard(0), small_shard(1)])
    elsewhere = ZarrTier(TierSpec.parse(f"file://{tmp_path}/other-disk"))
    elsewhere.open()
    write(elsewhere, [small_shard(0)])
    with pytest.raises(TierNotShared, match="ranks 1 were written but are not to be seen"):
        elsewhere.commit(manifest)
    assert elsewhere.snapshots(RUN)[0].is_committed is False


def test_a_manifest_that_leaves_out_a_rank_is_refused_by_a_shared_tier_only(url: str) -> None:
    for scope in ("shared", "node"):
        tier = ZarrTier(TierSpec.parse(f"{url},scope={scope}"))
        tier.open()
        whole = write(tier, [small_shard(0), small_shard(1)])
        part = type(whole)(**{name: getattr(whole, name) for name in whole.__slots__} | {"ranks": whole.ranks[1:]})
        if scope == "shared":
            assert tier.missing(part) == ["rank 0 is not in the manifest"]
            with pytest.raises(DrainFailed, match="ranks 0 are not in the manifest"):
                tier.commit(part)
        else:
            tier.commit(part)


def test_a_record_of_other_bytes_is_not_committed(tier: ZarrTier) -> None:
    manifest = write(tier, [small_shard(0)])
    record = manifest.ranks[0]
    wrong = RankRecord(0, record.index_bytes, record.index_crc ^ 1, record.arrays)
    with pytest.raises(Corrupt, match="rank-00000/index"):
        tier.commit(type(manifest)(**{n: getattr(manifest, n) for n in manifest.__slots__} | {"ranks": (wrong,)}))


def test_a_second_commit_loses_and_leaves_the_first_as_it_is(tier: ZarrTier) -> None:
    manifest = drain(tier, [small_shard()])
    before = (folder(tier) / MANIFEST_NAME).read_bytes()
    with pytest.raises(CommitConflict):
        tier.commit(manifest)
    assert (folder(tier) / MANIFEST_NAME).read_bytes() == before
    assert not list(folder(tier).glob(".tmp-*"))


def test_a_manifest_of_another_snapshot_is_refused(tier: ZarrTier) -> None:
    other = SnapshotId(Incarnation(1, 0xC0FFEE), 1300)
    drain(tier, [small_shard()])
    drain(tier, [small_shard()], other)
    shutil.copy(tier.spec.path / RUN / folder_name(other) / MANIFEST_NAME, folder(tier) / MANIFEST_NAME)
    with pytest.raises(Corrupt, match="step 1300"):
        tier.manifest(RUN, SNAPSHOT)
    assert "step 1300" in tier.verify(RUN, SNAPSHOT)[0]


def test_a_format_from_the_future_is_refused_with_the_version_that_reads_it(tier: ZarrTier) -> None:
    drain(tier, [small_shard()])
    path = folder(tier) / MANIFEST_NAME
    body = json.loads(path.read_bytes())
    del body["crc32c"]
    body["format"] = 2
    crc = crc32c(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())
    path.write_text(json.dumps({**body, "crc32c": crc}))
    with pytest.raises(FormatTooNew, match="reads manifest format 2"):
        tier.manifest(RUN, SNAPSHOT)
    assert "newer than this ckptd reads" in tier.verify(RUN, SNAPSHOT)[0]


def test_a_corrupt_index_in_memory_is_not_written(tier: ZarrTier) -> None:
    shard = small_shard()
    shard.payload[5] ^= 1
    with pytest.raises(Corrupt, match="rank-00000/index: block 0"):
        write(tier, [shard])
    assert tier.snapshots(RUN) == []


def test_corrupt_bytes_of_a_slot_reach_the_tier_but_never_a_model(tier: ZarrTier) -> None:
    shard = small_shard()
    shard.payload[shard.layout.segment_offsets[0] + 5] ^= 1
    drain(tier, [shard])
    assert "float32: block 0 " in reason_of(tier)


def test_a_read_that_fails_on_the_device_is_no_corruption(tier: ZarrTier, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = drain(tier, [small_shard()])

    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(TierFailed, match="Input/output error"):
        tier.read_index(RUN, SNAPSHOT, manifest.ranks[0], BLOCK_BYTES)
