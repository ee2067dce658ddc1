"""The tier alone, without a daemon: write_rank and commit, and read_rank, against the limits of the same disk.

In interleaved rounds it times (1) a drain: ``write_rank`` and ``commit``; (2) one flat file of the same bytes, written
and synced: the limit; (3) ``torch.distributed.checkpoint.save`` of the same state (``sync_files`` is its default);
(4) ``read_rank``, every block checked, against (5) a bare read of the same arrays through zarrs. Ratios are of medians
over the rounds; above 1 the drain is the faster one. ``extra_mib`` is how far the process grew beyond the state while
it drained and read.

    python -m bench.tier [--size-mib 1024] [--rounds 5] [--dir /tmp] [--codec none] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import zarr
import zarr.buffer.cpu

from ckptd.format.blocks import SlotLayout, block_bytes_for, checksum_blocks
from ckptd.format.manifest import Manifest, folder_name
from ckptd.model import Incarnation, Segment, SnapshotId
from ckptd.tiers import TierSpec, ZarrTier

RUN, MIB = "bench", 1 << 20


class State:
    """One rank's shard of float32 in memory, as a sealed slot holds it."""

    def __init__(self, size_bytes: int, index_bytes: int = 64 * 1024) -> None:
        block = block_bytes_for(size_bytes)
        self.layout = SlotLayout.plan(index_bytes, [Segment("float32", size_bytes)], block)
        values = np.zeros(self.layout.payload_bytes, dtype=np.uint8)
        rng = np.random.default_rng(0)
        values[self.layout.segment_offsets[0] :].view(np.float32)[: size_bytes // 4] = rng.random(
            size_bytes // 4, dtype=np.float32
        )
        self.payload = memoryview(values)
        self.table = np.zeros(self.layout.blocks, dtype=np.uint32)
        checksum_blocks(self.payload, block, 0, self.layout.blocks, self.table)

    @property
    def segment(self) -> memoryview:
        offset = self.layout.segment_offsets[0]
        return self.payload[offset : offset + self.layout.segments[0].size_bytes]


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def write_flat(path: Path, data: memoryview) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        done = 0
        while done < len(data):
            done += os.write(fd, data[done : done + 64 * MIB])
        os.fsync(fd)
    finally:
        os.close(fd)


def drain(tier: ZarrTier, state: State, snapshot: SnapshotId) -> Manifest:
    record = tier.write_rank(RUN, snapshot, 0, state.layout, state.payload, state.table)
    manifest = Manifest(RUN, snapshot, None, 1, 1, state.layout.block_bytes, time.time(), (record,))
    tier.commit(manifest)
    return manifest


def save_with_dcp(path: Path, data: memoryview) -> Callable[[], object]:
    import torch
    import torch.distributed.checkpoint as dcp

    whole = torch.frombuffer(data, dtype=torch.float32)
    state = {f"layer{place}": part for place, part in enumerate(whole.chunk(16))}
    return lambda: dcp.save(state, checkpoint_id=str(path), no_dist=True)


def read_bare(folder: Path, target: memoryview) -> None:
    """The same arrays through zarrs into the same kind of buffer, nothing checked."""
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True}):
        array = zarr.open_array(str(folder), mode="r")
    out = zarr.buffer.cpu.NDBuffer.from_numpy_array(np.frombuffer(target, dtype=np.float32))
    array.get_basic_selection(slice(None), out=out)


class Growth:
    """How far resident memory rose above where it stood at the start (MiB); the kernel keeps the high-water mark."""

    def __enter__(self) -> Growth:
        Path("/proc/self/clear_refs").write_text("5")
        self._base = _status_mib("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.mib = _status_mib("VmHWM") - self._base


def _status_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def measure(args: argparse.Namespace) -> dict[str, object]:
    state = State(args.size_mib * MIB)
    size = len(state.segment)
    times: dict[str, list[float]] = {"drain": [], "flat": [], "dcp": [], "read": [], "bare_read": []}
    growth = 0.0
    root = Path(tempfile.mkdtemp(prefix="ckptd-bench-", dir=args.dir))
    target = memoryview(np.ones(state.layout.payload_bytes, dtype=np.uint8))
    segment = target[state.layout.segment_offsets[0] :][:size]
    try:
        tier = ZarrTier(TierSpec.parse(f"file://{root}/tier,codec={args.codec}"))
        tier.open()
        for turn in range(args.rounds + 1):  # the first warms imports and the disk up
            snapshot = SnapshotId(Incarnation(1, 1), turn + 1)
            with Growth() as watched:
                took = {"drain": timed(partial(drain, tier, state, snapshot))}
                took["read"] = timed(partial(tier.read_rank, tier.manifest(RUN, snapshot), 0, target))
            folder = tier.spec.path / RUN / folder_name(snapshot) / "rank-00000" / "float32"
            took["bare_read"] = timed(partial(read_bare, folder, segment))
            tier.delete(RUN, snapshot)
            took["flat"] = timed(partial(write_flat, root / "flat", state.segment))
            (root / "flat").unlink()
            if not args.no_dcp:
                took["dcp"] = timed(save_with_dcp(root / "dcp", state.segment))
                shutil.rmtree(root / "dcp")
            growth = max(growth, watched.mib)
            if turn:
                for name, seconds in took.items():
                    times[name].append(seconds)
    finally:
        shutil.rmtree(root)
    median = {name: statistics.median(values) for name, values in times.items() if values}
    result: dict[str, object] = {f"{name}_s": round(value, 3) for name, value in median.items()}
    result["drain_gb_s"] = round(size / median["drain"] / 1e9, 2)
    result["drain_to_flat"] = round(median["flat"] / median["drain"], 2)
    if "dcp" in median:
        result["drain_to_dcp"] = round(median["dcp"] / median["drain"], 2)
    result["read_to_bare_read"] = round(median["bare_read"] / median["read"], 2)
    result["extra_mib"] = round(growth)
    return {"size_mib": args.size_mib, "rounds": args.rounds, "codec": args.codec, **result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", default=tempfile.gettempdir(), help="a folder on the disk to measure")
    parser.add_argument("--codec", default="none", choices=["none", "zstd", "blosc"])
    parser.add_argument("--no-dcp", action="store_true", help="without torch")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = measure(args)
    if args.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:20} {value}")


if __name__ == "__main__":
    main()
