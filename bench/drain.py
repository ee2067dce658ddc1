"""From staged to durable, through the daemon, against write + fsync of one flat file of the same bytes and against
``dcp.save`` of the same state (which does not fsync its folder), on the same disk, in interleaved rounds."""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from bench.rig import MIB, daemon, report, state_bytes, trained, warm_up
from bench.tier import write_flat
from ckptd_client import Checkpointer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size-mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    model, optimizer = trained(arguments.size_mib * MIB)
    size = state_bytes(model, optimizer)
    state = {"m": model.state_dict(), "o": optimizer.state_dict()}
    flat = memoryview(bytearray(size))
    drained, flats, saved = [], [], []
    scratch = Path(tempfile.mkdtemp(prefix="ckptd-bench-"))
    with daemon("6GiB", "--tier", "file://{folder}/tier,keep=1") as (address, _, _):
        with Checkpointer({"m": model, "o": optimizer}, "drain", address, every=10**9) as c:
            warm_up(c)
            for number in range(arguments.rounds + 1):
                snapshot = c.save(1000 + number, persist=True)
                snapshot.wait("staged", 60)
                started = time.perf_counter()
                snapshot.wait("durable", 120)
                drained.append(time.perf_counter() - started)
                time.sleep(0.5)  # the checkpoint before it is deleted meanwhile
                started = time.perf_counter()
                write_flat(scratch / "flat", flat)
                flats.append(time.perf_counter() - started)
                (scratch / "flat").unlink()
                started = time.perf_counter()
                dcp.save(state, checkpoint_id=scratch / "dcp")
                saved.append(time.perf_counter() - started)
                shutil.rmtree(scratch / "dcp")
    shutil.rmtree(scratch)
    ours = statistics.median(drained[1:])
    report(
        "drain",
        {
            "bytes": size,
            "drain_s": ours,
            "flat_s": statistics.median(flats[1:]),
            "dcp_save_s": statistics.median(saved[1:]),
            "drain_vs_flat": statistics.median(flats[1:]) / ours,
            "drain_vs_dcp": statistics.median(saved[1:]) / ours,
        },
    )


if __name__ == "__main__":
    main()
