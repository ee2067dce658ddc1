"""Shards for the tests of tiers, and a child process that drains some: ``python tier_shards.py URL [MODE]``.

The golden checkpoints of a format version were written with MODE ``golden`` and are never written again.
"""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ckptd.errors import CkptdError
from ckptd.format.blocks import SlotLayout, checksum_blocks
from ckptd.format.manifest import Manifest, RankRecord
from ckptd.model import DTYPES, Incarnation, Segment, SnapshotId
from ckptd.tiers import TierSpec, ZarrTier

RUN = "gpt-small"
SNAPSHOT = SnapshotId(Incarnation(1, 0xC0FFEE), 1200)
BLOCK_BYTES = 64 * 1024


@dataclass
class Shard:
    layout: SlotLayout
    payload: memoryview
    table: np.ndarray


def make_shard(
    sizes: dict[str, int],
    seed: int = 0,
    block_bytes: int = BLOCK_BYTES,
    index_bytes: int = 1000,
    random_bytes: int | None = None,
) -> Shard:
    """A sealed shard: ``sizes`` gives the bytes of each segment by dtype, the first ``random_bytes`` of which are
    random (all by default) and the rest zeros."""
    layout = SlotLayout.plan(index_bytes, [Segment(name, size) for name, size in sizes.items()], block_bytes)
    rng = np.random.default_rng(seed)
    payload = memoryview(bytearray(layout.payload_bytes))
    for _, offset, size in layout.parts():
        filled = size if random_bytes is None else min(size, random_bytes)
        payload[offset : offset + filled] = rng.bytes(filled)
    table = np.zeros(layout.blocks, dtype=np.uint32)
    checksum_blocks(payload, block_bytes, 0, layout.blocks, table)
    return Shard(layout, payload, table)


def small_shard(seed: int = 0) -> Shard:
    return make_shard({"float32": 300_000, "bfloat16": 70_002, "int64": 0}, seed)


def golden_shard() -> Shard:
    """The shard of the golden checkpoints: bytes that depend on no library's random numbers."""
    shard = make_shard(
        {"float32": 2048, "bfloat16": 514, "float8_e4m3fn": 3, "int64": 0}, block_bytes=1024, index_bytes=50
    )
    for _, offset, size in shard.layout.parts():
        shard.payload[offset : offset + size] = bytes((31 * at + 7) % 251 for at in range(size))
    checksum_blocks(shard.payload, 1024, 0, shard.layout.blocks, shard.table)
    return shard


def manifest_of(
    records: list[RankRecord], world_size: int | None = None, snapshot: SnapshotId = SNAPSHOT, block: int = BLOCK_BYTES
) -> Manifest:
    return Manifest(RUN, snapshot, None, world_size or len(records), 1, block, 1.7e9, tuple(records))


def write(tier: ZarrTier, shards: list[Shard], snapshot: SnapshotId = SNAPSHOT) -> Manifest:
    """Every rank written, nothing committed."""
    records = [
        tier.write_rank(RUN, snapshot, rank, shard.layout, shard.payload, shard.table)
        for rank, shard in enumerate(shards)
    ]
    return manifest_of(records, snapshot=snapshot, block=shards[0].layout.block_bytes)


def drain(tier: ZarrTier, shards: list[Shard], snapshot: SnapshotId = SNAPSHOT) -> Manifest:
    manifest = write(tier, shards, snapshot)
    tier.commit(manifest)
    return manifest


def read_back(tier: ZarrTier, manifest: Manifest, rank: int = 0) -> tuple[SlotLayout, bytes, np.ndarray]:
    """A rank read into a buffer full of rubbish, so that missing zeroes show."""
    payload = memoryview(bytearray(b"\xa5" * tier.layout_of(manifest, rank).payload_bytes))
    layout, table = tier.read_rank(manifest, rank, payload)
    return layout, bytes(payload), table


def every_dtype(size_bytes: int = 4096) -> dict[str, int]:
    return {dtype.name: size_bytes + 16 * place for place, dtype in enumerate(DTYPES)}


def main(url: str, mode: str = "drain") -> int:
    """What the daemon does with one shard, to be killed anywhere; exit code 9 and the message for an error."""
    if mode.startswith("limit="):
        limit = int(mode.removeprefix("limit="))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    tier = ZarrTier(TierSpec.parse(url))
    try:
        tier.open()
        if mode == "golden":
            drain(tier, [golden_shard()])
        elif mode == "delete":
            tier.delete(RUN, SNAPSHOT)
        else:
            drain(tier, [small_shard(0), small_shard(1)])
    except CkptdError as error:
        print(type(error).__name__, error)
        return 9
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    sys.exit(main(*sys.argv[1:]))
