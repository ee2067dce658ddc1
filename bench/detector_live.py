"""Faults injected into real jobs on gloo, and what ``ckptd faults`` names: which ranks, of what kind, after how long.

Each case is a job of its own under its own daemon: the daemon is what users start, the ranks run ``detector_job``,
forked from a process that has torch imported. A case is right when every rank that was hit is named, with a fitting
kind, and nobody else ever is. Times are from the injection to the first answer that names them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.detector_job import Plan
from bench.detector_nursery import Nursery
from bench.rig import daemon, report

FITTING = {
    "stop": {"hang"},
    "gil": {"hang"},
    "kill": {"death"},
    "skip": {"desync", "hang"},
    "size": {"desync", "death"},
    "slow": {"slow_compute"},
    "busy": {"slow_compute"},
    "": set(),
}
STOPS = {"stop", "gil", "kill", "skip", "size"}
WARM_UP_STEPS = 3
POLL_S = 0.1
LOG_SHOWN = 4000


@dataclass
class Result:
    """What became of a case. ``named_s``: from the injection to the answer that names all, None: never."""

    plan: Plan
    world_size: int
    named_s: float | None = None
    named_steps: int | None = None
    strangers: list[dict[str, Any]] = field(default_factory=list)
    faults: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_right(self) -> bool:
        return not self.strangers and (self.named_s is not None or not self.plan.fault)


class Ranks:
    """Processes of one job, forked by the nursery."""

    def __init__(self, nursery: Nursery, plan: Plan, world_size: int, address: str, folder: Path) -> None:
        self._nursery = nursery
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._journals = [folder / f"rank-{rank}.journal" for rank in range(world_size)]
        self.pids = []
        for rank in range(world_size):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "CKPTD_DAEMON": address,
                "CKPTD_RUN": "live",
                "CKPTD_WARM_UP_STEPS": str(WARM_UP_STEPS),
            }
            argv = ["job", json.dumps(asdict(plan)), str(self._journals[rank])]
            output = str(folder / f"rank-{rank}.log")
            self.pids.append(nursery.fork(argv, {**os.environ, **environment}, output))

    def events(self) -> list[dict[str, Any]]:
        lines = [line for path in self._journals if path.exists() for line in path.read_text().splitlines()]
        return [json.loads(line) for line in lines]

    def kill(self) -> None:
        for pid in self.pids:
            for number in (signal.SIGKILL, signal.SIGCONT):
                try:
                    os.killpg(pid, number)
                except ProcessLookupError:
                    break
        while any(self._nursery.poll(pid) is None for pid in self.pids):
            time.sleep(POLL_S)


class Watch:
    """``ckptd faults --watch``; ``faults`` is what it said last, resolved ones too."""

    def __init__(self, address: str, folder: Path) -> None:
        self.faults: list[dict[str, Any]] = []
        command = [Path(sys.executable).with_name("ckptd"), "faults", "--watch", "--json", "--socket", address]
        with (folder / "watch.log").open("w") as log:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.faults = json.loads(line)["faults"]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._thread.join()


def run_case(nursery: Nursery, plan: Plan, world_size: int, patience_s: float) -> Result:
    """One job with one fault, until all that were hit are named or ``patience_s`` after the injection is over. When
    that is not right, logs and journals are shown."""
    result = Result(plan, world_size)
    with daemon("512MiB") as (address, _, scratch), tempfile.TemporaryDirectory(prefix="ckptd-live-") as folder:
        watch = Watch(address, Path(folder))
        ranks = Ranks(nursery, plan, world_size, address, Path(folder))
        try:
            _follow(result, ranks, watch, patience_s)
            if result.named_s is not None:
                time.sleep(1.5)  # who else is named right after it
                _take(result, watch.faults)
        finally:
            ranks.kill()
            watch.close()
        if not result.is_right:
            for path in sorted([*Path(folder).iterdir(), *scratch.glob("*.log")]):
                sys.stderr.write(f"--- {path.name}\n{path.read_text()[-LOG_SHOWN:]}\n")
    return result


def _follow(result: Result, ranks: Ranks, watch: Watch, patience_s: float) -> None:
    plan = result.plan
    started = time.monotonic()
    hit: dict[str, Any] | None = None
    while True:
        time.sleep(POLL_S)
        events = ranks.events()
        hit = hit or next((event for event in events if "fault" in event), None)
        _take(result, watch.faults)
        now = time.monotonic()
        named = {rank for fault in result.faults if fault["kind"] in FITTING[plan.fault] for rank in fault["ranks"]}
        if hit is not None and named >= set(plan.ranks):
            result.named_s = now - hit["at_s"]
            newest = max((event["step"] for event in events if event["rank"] not in plan.ranks), default=0)
            result.named_steps = newest - plan.at_step
            return
        is_over = any(event.get("step") == plan.steps for event in events)
        if is_over or now - (hit["at_s"] if hit else started + 120) > patience_s:
            return


def _take(result: Result, found: list[dict[str, Any]]) -> None:
    result.faults = found
    for fault in found:
        is_sure = fault["confidence"] != "suspect" or not fault["kind"].startswith("slow")
        if is_sure and not set(fault["ranks"]) <= set(result.plan.ranks) and fault not in result.strangers:
            result.strangers.append(fault)


def cases(seed: int, count: int, kinds: list[str], devices: int = 0) -> Iterator[tuple[Plan, int]]:
    """``devices``: so many CUDA devices, a rank each; 0: on the CPU."""
    chance = random.Random(seed)
    for number, kind in zip(range(count), itertools.cycle(kinds)):
        world_size = devices or chance.choice((8,) if kind == "slow" else (2, 3, 4, 6, 8))
        factor = chance.choice((1.10, 1.30)) if kind == "slow" else 1.0
        hit = (chance.randrange(world_size),)
        # A fault that stops the job is waited for by the seconds, one that slows it by the steps.
        steps, compute_s = (400, 0.2) if kind in ("slow", "busy", "") else (1000, 0.1)
        at_step = chance.randint(WARM_UP_STEPS + 12, WARM_UP_STEPS + 30)
        mode = "fsdp" if number // len(kinds) % 2 else "ddp"
        device = "cuda" if devices else "cpu"
        steps, hit = (steps, hit) if kind else (60, ())
        yield Plan(mode, steps, compute_s, kind, hit, at_step, factor, device=device), world_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--kinds", nargs="+", default=["stop", "kill", "gil", "skip", "size", "slow", "busy"])
    parser.add_argument("--patience", type=float, default=40.0, metavar="SECONDS")
    parser.add_argument("--devices", type=int, default=0, help="CUDA devices, a rank on each; 0: ranks on the CPU")
    arguments = parser.parse_args()
    nursery = Nursery()
    results: list[Result] = []
    try:
        for plan, world_size in cases(arguments.seed, arguments.cases, arguments.kinds, arguments.devices):
            result = run_case(nursery, plan, world_size, arguments.patience)
            results.append(result)
            named = "never" if result.named_s is None else f"{result.named_s:.1f} s, {result.named_steps} steps"
            verdict = "right" if result.is_right else "WRONG"
            seen = [(f["kind"], f["ranks"], f["confidence"]) for f in result.faults]
            fault = f"{plan.fault or 'none':5} x{plan.factor:g}"
            line = f"{plan.mode:4} {world_size} ranks  {fault}  hit {plan.ranks}: {named}: {verdict} {seen}"
            sys.stderr.write(line + "\n")
    finally:
        nursery.close()
    report("detector_live", {"seed": arguments.seed, **figures(results)})


def figures(results: list[Result]) -> dict[str, float | int | str]:
    """Shares of cases that are right and how long they took, by what was injected; slow ones by factor."""
    found: dict[str, float | int | str] = {
        "cases": len(results),
        "with_strangers": sum(bool(result.strangers) for result in results),
        "stopped_right": _share([r for r in results if r.plan.fault in STOPS]),
    }
    for name in dict.fromkeys(_name(result.plan) for result in results):
        of_kind = [result for result in results if _name(result.plan) == name]
        named = [result for result in of_kind if result.named_s is not None and result.named_steps is not None]
        found |= {f"{name}_cases": len(of_kind), f"{name}_right": _share(of_kind)}
        if named:
            seconds = [result.named_s or 0.0 for result in named]
            steps = [result.named_steps or 0 for result in named]
            found |= {f"{name}_median_s": statistics.median(seconds), f"{name}_longest_s": max(seconds)}
            found |= {f"{name}_median_steps": statistics.median(steps), f"{name}_most_steps": max(steps)}
    return found


def _share(results: list[Result]) -> float:
    return sum(result.is_right for result in results) / len(results) if results else 1.0


def _name(plan: Plan) -> str:
    return f"slow_x{plan.factor:g}" if plan.fault == "slow" else plan.fault or "healthy"


if __name__ == "__main__":
    main()
