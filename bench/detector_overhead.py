"""What timing collectives costs: DDP and FSDP2 steps with the tap noting against letting through, and one operation.

Two ranks on gloo. A step sleeps, so that it is as long as a real one on a machine of few cores, and then runs forward,
backward and optimizer. Steps with and without noting alternate, in an order that is drawn for each pair and the same on
both ranks; the tap stays installed (installing anew would make torch look its kernels up anew, which costs the next
steps), so what passing it costs is measured apart: one operation on one rank, with the tap and without it. While the
tap notes, a heartbeat makes its message each second, which goes nowhere.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import socket
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from bench.rig import MIB, report
from ckptd.errors import CkptdError
from ckptd_api.v1 import node_pb2, types_pb2
from ckptd_client.timing import collection as process
from ckptd_client.timing.collection import Collection
from ckptd_client.timing.heartbeat import Heartbeat

_WARM_UP = 10
_ROUNDS = 15
_Z95_ONE_SIDED = 1.645


class Nowhere:
    """The connection of a heartbeat: encodes what it is given."""

    run, rank, instance = "bench", 0, 1
    incarnation = types_pb2.Incarnation(ordinal=1, id=1)
    problem: CkptdError | None = None

    @property
    def daemon(self) -> Nowhere:
        return self

    def call(self, method: str, request: node_pb2.ReportTimingsRequest, timeout_s: float) -> object:
        request.SerializeToString()
        return node_pb2.ReportTimingsResponse()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def trained(kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    layers = [nn.Linear(128, 128) for _ in range(6)]
    model: nn.Module = nn.Sequential(*layers)
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.05)
    else:
        for layer in layers:
            fully_shard(layer)
        fully_shard(model)
    return model, torch.optim.SGD(model.parameters(), lr=1e-3)


def pairs(kind: str, count: int, sleep_s: float, collection: Collection) -> dict[str, Any]:
    """Seconds of ``count`` pairs of steps (noting, letting through) on this rank, and operations of one step."""
    model, optimizer = trained(kind)
    x = torch.randn(16, 128)
    reporters = list(collection.reporters)

    def step(is_noted: bool) -> float:
        assert collection.tap is not None
        dist.barrier()
        collection.tap.recorder = collection.recorder if is_noted else None
        collection.reporters[:] = reporters if is_noted else []
        started = time.perf_counter()
        time.sleep(sleep_s)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started

    for number in range(_WARM_UP):
        step(number % 2 == 0)
    before = collection.recorder.entered
    step(True)
    operations = collection.recorder.entered - before
    order, taken = random.Random(0), []
    for _ in range(count):
        first = order.random() < 0.5
        one, other = step(first), step(not first)
        taken.append((one, other) if first else (other, one))
    collection.reporters[:] = reporters
    return {"operations": operations, "pairs": taken}


def microseconds(call: Callable[[], object], count: int = 200) -> float:
    for _ in range(count):
        call()
    started = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - started) / count * 1e6


def operation_costs() -> dict[str, float]:
    """One all-reduce of 16 floats on one rank, microseconds: bare and with the tap, alternating."""
    tensor, user = torch.ones(16), object()
    calls: dict[str, Callable[[], object]] = {
        "sync": lambda: dist.all_reduce(tensor),
        "async": lambda: dist.all_reduce(tensor, async_op=True).wait(),
    }
    found: dict[str, list[float]] = {}
    for _ in range(_ROUNDS):
        for name, call in calls.items():
            found.setdefault(f"{name}_bare_us", []).append(microseconds(call))
        process.enter(user)
        for name, call in calls.items():
            found.setdefault(f"{name}_tapped_us", []).append(microseconds(call))
        process.leave(user)
    costs = {name: statistics.median(values) for name, values in found.items()}
    return costs | {f"{name}_times": costs[f"{name}_tapped_us"] / costs[f"{name}_bare_us"] for name in calls}


def rss_bytes() -> int:
    with open("/proc/self/statm") as numbers:
        return int(numbers.read().split()[1]) * resource.getpagesize()


def fill(collection: Collection) -> None:
    """Every row of the ring is written: its memory is there only then."""
    row = (0, 1, -1, 1, 64, 1, 2)
    while not collection.recorder.ring.dropped:
        collection.recorder.ring.write(*row)


def rank_main(arguments: argparse.Namespace) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    dist.barrier()
    before = rss_bytes()
    collection = process.enter("bench")
    heartbeat = Heartbeat(collection, Nowhere())
    heartbeat.start()
    fill(collection)
    memory = rss_bytes() - before
    found = {kind: pairs(kind, arguments.pairs, arguments.step_s, collection) for kind in ("ddp", "fsdp")}
    heartbeat.close()
    process.leave("bench")
    if dist.get_rank() == 0:
        print(json.dumps({"memory_bytes": memory, **found}), flush=True)
    dist.destroy_process_group()


def run_ranks(arguments: argparse.Namespace) -> dict[str, Any]:
    """What rank 0 printed."""
    command = [sys.executable, "-m", "bench.detector_overhead", "--as-rank", "--pairs", str(arguments.pairs)]
    command += ["--step-s", str(arguments.step_s)]
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(command, env={**os.environ, **job, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        printed, _ = ranks[0].communicate(timeout=1500)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    lines = [line for line in (printed or "").splitlines() if line.startswith("{")]
    if not lines:
        raise SystemExit("rank 0 failed")
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def judged(kind: str, found: dict[str, Any]) -> dict[str, Any]:
    """Mean of the differences as a share of the step, and the bound below which it is with 95 % confidence."""
    without = statistics.mean(off for _, off in found["pairs"])
    differences = [on - off for on, off in found["pairs"]]
    mean = statistics.mean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return {
        f"{kind}_step_s": without,
        f"{kind}_operations": found["operations"],
        f"{kind}_mean_percent": 100 * mean / without,
        f"{kind}_upper_95_percent": 100 * (mean + _Z95_ONE_SIDED * error) / without,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--step-s", type=float, default=0.2, help="how long a step sleeps")
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.as_rank:
        rank_main(arguments)
        return
    result = run_ranks(arguments)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    costs = operation_costs()
    dist.destroy_process_group()
    report(
        "detector_overhead",
        {
            "pairs": arguments.pairs,
            **judged("ddp", result["ddp"]),
            **judged("fsdp", result["fsdp"]),
            **costs,
            "memory_mib": result["memory_bytes"] / MIB,
        },
    )


if __name__ == "__main__":
    main()
