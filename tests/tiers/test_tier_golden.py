"""Checkpoints of every format version that was ever written are read for ever (``golden/vN/CODEC``)."""

from __future__ import annotations

from pathlib import Path

import pytest
import zarr
from tier_shards import RUN, SNAPSHOT, golden_shard, read_back

from ckptd.format.manifest import VERSION, folder_name
from ckptd.tiers import TierSpec, ZarrTier

GOLDEN = Path(__file__).parent / "golden"
CHECKPOINTS = sorted(path.relative_to(GOLDEN).as_posix() for path in GOLDEN.glob("v*/*"))


def test_the_format_of_today_has_golden_checkpoints_of_every_codec() -> None:
    assert {f"v{VERSION}/{codec}" for codec in ("none", "zstd", "blosc")} <= set(CHECKPOINTS)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_golden_checkpoint_is_whole_and_restores(name: str) -> None:
    tier, shard = ZarrTier(TierSpec.parse(f"file://{GOLDEN}/{name}")), golden_shard()
    assert tier.verify(RUN, SNAPSHOT) == []
    layout, payload, table = read_back(tier, tier.manifest(RUN, SNAPSHOT))
    assert layout == shard.layout
    assert payload == bytes(shard.payload)
    assert (table == shard.table).all()


@pytest.mark.filterwarnings("ignore:Object at:UserWarning")
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_plain_zarr_reads_a_golden_checkpoint(name: str) -> None:
    shard = golden_shard()
    with zarr.config.set({"codec_pipeline.path": "zarr.core.codec_pipeline.BatchedCodecPipeline"}):
        group = zarr.open_group(str(GOLDEN / name / RUN / folder_name(SNAPSHOT)), mode="r")
        for dtype, offset, size in shard.layout.parts()[1:]:
            array = group[f"rank-00000/{dtype}"]
            assert isinstance(array, zarr.Array)
            assert array[:].tobytes() == bytes(shard.payload[offset : offset + size])


@pytest.mark.parametrize("codec", ["none", "zstd", "blosc"])
def test_the_code_of_today_writes_the_same_files(tmp_path: Path, codec: str) -> None:
    tier = ZarrTier(TierSpec.parse(f"file://{tmp_path},codec={codec}"))
    shard = golden_shard()
    tier.write_rank(RUN, SNAPSHOT, 0, shard.layout, shard.payload, shard.table)
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    golden = GOLDEN / f"v{VERSION}" / codec
    assert written == {p.relative_to(golden).as_posix() for p in golden.rglob("*") if p.is_file()} - {
        f"{RUN}/{folder_name(SNAPSHOT)}/manifest.json"
    }
    assert all((tmp_path / name).read_bytes() == (golden / name).read_bytes() for name in written if "/c/" in name)
