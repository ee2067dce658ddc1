"""A training loop with a snapshot every step against the same loop without, ranks = cores, on one node.

The state of each rank is 2 % of a step's time at the memcpy rate measured in this run; the step is matrix products that
keep the core busy. With and without alternate in blocks, so that a noisy neighbour meets both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

from bench.rig import Memcpy, daemon, report

_SIZE = 256 << 20


def rank_main(arguments: argparse.Namespace) -> None:
    """One rank: alternating blocks of steps; prints its step times."""
    import torch

    from bench.rig import state_bytes, trained, warm_up
    from ckptd_client import Checkpointer

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    model, optimizer = trained(arguments.state_bytes)
    for parameter in model.parameters():
        parameter.grad = None  # the optimizer's own time would hide what is measured
    x = torch.randn(512, 512)

    def compute(products: int) -> None:
        for _ in range(products):
            torch.mm(x, x)

    compute(50)
    started = time.perf_counter()
    compute(200)
    products = int(arguments.step_s / ((time.perf_counter() - started) / 200))
    taken: dict[bool, list[float]] = {True: [], False: []}
    staged = 0
    with Checkpointer({"m": model, "o": optimizer}, "loop", every=1) as checkpointer:
        warm_up(checkpointer)
        step = 1000
        for block in range(2 * arguments.blocks):
            is_on = block % 2 == 1
            torch.distributed.barrier()
            snapshots = []
            started = time.perf_counter()
            for _ in range(arguments.steps):
                compute(products)
                optimizer.step()
                step += 1
                if is_on:
                    snapshots.append(checkpointer.save(step))
            taken[is_on].append((time.perf_counter() - started) / arguments.steps)
            staged += sum(s.staged.exception(30) is None for s in snapshots)
    size = state_bytes(model, optimizer)
    print(json.dumps({"on": taken[True], "off": taken[False], "staged": staged, "bytes": size}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step-s", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--state-bytes", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.state_bytes:
        rank_main(arguments)
        return
    memcpy = Memcpy(_SIZE)
    rate = _SIZE / statistics.median(memcpy.seconds() for _ in range(5))
    size = int(0.02 * arguments.step_s * rate)
    ranks = os.cpu_count() or 1
    with daemon("4GiB") as (address, _, _):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += ["-m", "bench.loop", "--state-bytes", str(size), "--step-s", str(arguments.step_s)]
        command += ["--steps", str(arguments.steps), "--blocks", str(arguments.blocks)]
        environment = {**os.environ, "CKPTD_DAEMON": address, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if len(lines) != ranks:
        raise SystemExit(done.stderr[-2000:])
    ratios = [off / on for line in lines for off, on in zip(line["off"], line["on"], strict=True)]
    taken = arguments.steps * arguments.blocks
    report(
        "loop",
        {
            "ranks": ranks,
            "bytes_per_rank": lines[0]["bytes"],
            "step_s": statistics.median(lines[0]["off"]),
            "snapshots_staged": f"{min(line['staged'] for line in lines)} of {taken}",
            "ratio": statistics.median(ratios),
            "ratio_worst_block": min(ratios),
        },
    )


if __name__ == "__main__":
    main()
