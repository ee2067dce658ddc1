"""Restore from daemon memory, checksums included, against a plain memcpy, and against dcp.load from page cache."""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time

import torch
import torch.distributed.checkpoint as dcp

from bench.rig import MIB, Memcpy, daemon, report, state_bytes, timed, trained, warm_up
from ckptd_client import Checkpointer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size-mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    model, optimizer = trained(arguments.size_mib * MIB)
    size = state_bytes(model, optimizer)
    memcpy = Memcpy(size)
    restored, copies = [], []
    with daemon("6GiB") as (address, _, _):
        with Checkpointer({"m": model, "o": optimizer}, "restore", address, every=10**9) as c:
            warm_up(c)
            last = c.save(5000)
            last.wait("staged", 60)
        for _ in range(arguments.rounds):
            with Checkpointer({"m": model, "o": optimizer}, "restore", address, every=10**9) as c:
                copies.append(memcpy.seconds())
                started = time.perf_counter()
                result = c.restore(step=5000)  # by number: resuming from it again and again would be distrusted
                restored.append(time.perf_counter() - started)
                assert result is not None
                assert result.step == 5000
    folder = tempfile.mkdtemp(prefix="dcp-bench-")
    state = {"m": model.state_dict(), "o": optimizer.state_dict()}
    dcp.save(state, checkpoint_id=folder)
    loaded = timed(lambda: dcp.load(state, checkpoint_id=folder), 3)
    shutil.rmtree(folder)
    copy, ours = statistics.median(copies), statistics.median(restored)
    report(
        "restore",
        {
            "bytes": size,
            "memcpy_s": copy,
            "restore_s": ours,
            "ratio_to_memcpy": copy / ours,
            "dcp_load_s": loaded,
            "times_faster_than_dcp_load": loaded / ours,
        },
    )


if __name__ == "__main__":
    main()
