"""What a snapshot costs the training loop: save() plus the following fence, for 1 GiB of CPU state, plan warm.

Against the time ``dcp.async_save`` of the same state blocks (its copy into CPU staging), in the same run; once with a
step longer than the copy, once with a step of 10 ms, where the limit is max(0, copy - step) of a plain memcpy.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time

import torch.distributed.checkpoint as dcp

from bench.rig import Memcpy, OneRank, daemon, report, warm_up
from ckptd_client import Checkpointer


def lost_s(checkpointer: Checkpointer, step: int, step_s: float, wait: bool = True) -> float:
    """Seconds that save() and the fence before the next optimizer step took, the step itself a sleep of ``step_s``."""
    started = time.perf_counter()
    snapshot = checkpointer.save(step)
    saved = time.perf_counter() - started
    time.sleep(max(0.0, step_s - saved))
    fence_started = time.perf_counter()
    checkpointer.fence()
    fenced = time.perf_counter() - fence_started
    if wait:
        snapshot.wait("staged", 30)
    return saved + fenced


def dcp_async_s(state: dict[str, object], rounds: int) -> float:
    taken = []
    for number in range(rounds):
        folder = tempfile.mkdtemp(prefix="dcp-bench-")
        started = time.perf_counter()
        future = dcp.async_save(state, checkpoint_id=f"{folder}/{number}")
        taken.append(time.perf_counter() - started)
        future.result()
        shutil.rmtree(folder)
    return statistics.median(taken)


def main() -> None:
    rank = OneRank.from_arguments(__doc__)
    memcpy = Memcpy(rank.size_bytes)
    with daemon("6GiB") as (address, _, _), rank.checkpointer("stall", address) as c:
        warm_up(c)
        long = [lost_s(c, 1000 + n, 0.5) for n in range(rank.rounds)]
        copies, short = [], []
        for n in range(rank.rounds):
            copies.append(memcpy.seconds())
            short.append(lost_s(c, 2000 + n, 0.010))
    blocked = dcp_async_s(rank.state_dict(), 3)
    copy = statistics.median(copies)
    report(
        "stall",
        {
            "bytes": rank.size_bytes,
            "lost_ms": statistics.median(long) * 1e3,
            "dcp_async_save_blocked_ms": blocked * 1e3,
            "times_shorter": blocked / statistics.median(long),
            "memcpy_ms": copy * 1e3,
            "lost_at_10ms_step_ms": statistics.median(short) * 1e3,
            "limit_at_10ms_step_ms": max(0.0, copy - 0.010) * 1e3,
            "ratio_at_10ms_step": statistics.median(short) / max(1e-9, copy - 0.010),
        },
    )


if __name__ == "__main__":
    main()
