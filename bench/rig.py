"""What the measurements share: a daemon of their own, medians, a state of some size, and how a result is printed."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch

from ckptd_client import Checkpointer

MIB = 1 << 20


@contextmanager
def daemon(memory: str = "8GiB", *options: str) -> Iterator[tuple[str, int, Path]]:
    """(address, pid, scratch folder) of a daemon that lives as long as the block."""
    folder = Path(tempfile.mkdtemp(prefix="ckptd-bench-"))
    arena = Path("/dev/shm") / folder.name
    command = [Path(sys.executable).with_name("ckptd"), "serve", "--socket", folder / "d.sock", "--arena", arena]
    command += ["--memory", memory, *(option.format(folder=folder) for option in options)]
    with open(folder / "daemon.log", "w") as log:
        process = subprocess.Popen([str(part) for part in command], stdout=log, stderr=log)
    try:
        until = time.monotonic() + 30
        while not (folder / "d.sock").exists() or not (folder / "d.fd.sock").exists():
            if time.monotonic() > until or process.poll() is not None:
                raise RuntimeError("the daemon did not start")
            time.sleep(0.02)
        time.sleep(0.3)
        yield f"unix://{folder}/d.sock", process.pid, folder
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(arena, ignore_errors=True)


class Model(torch.nn.Module):
    """About ``size_bytes`` of parameters and AdamW state, in ``layers`` equal matrices."""

    def __init__(self, size_bytes: int, layers: int = 48) -> None:
        super().__init__()
        width = int((size_bytes / 3 / 4 / layers) ** 0.5)
        self.layers = torch.nn.ParameterList(
            torch.nn.Parameter(torch.empty(width, width).uniform_(-1, 1)) for _ in range(layers)
        )


def trained(size_bytes: int, layers: int = 48) -> tuple[Model, torch.optim.AdamW]:
    """A model with optimizer state of ``size_bytes`` in all."""
    model = Model(size_bytes, layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, foreach=True)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    return model, optimizer


def state_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    tensors = [*model.parameters(), *(t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t))]
    return sum(t.numel() * t.element_size() for t in tensors)


@dataclass(frozen=True)
class OneRank:
    """What a script that measures one rank against ``dcp`` works with."""

    model: Model
    optimizer: torch.optim.AdamW
    size_bytes: int
    rounds: int

    @classmethod
    def from_arguments(cls, doc: str | None) -> OneRank:
        """A state of ``--size-mib``, in a process group of its own, which ``dcp`` asks for."""
        parser = argparse.ArgumentParser(description=doc)
        parser.add_argument("--size-mib", type=int, default=1024)
        parser.add_argument("--rounds", type=int, default=7)
        arguments = parser.parse_args()
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        model, optimizer = trained(arguments.size_mib * MIB)
        return cls(model, optimizer, state_bytes(model, optimizer), arguments.rounds)

    def checkpointer(self, run: str, address: str) -> Checkpointer:
        """One that saves only when it is told to."""
        return Checkpointer({"m": self.model, "o": self.optimizer}, run, address, every=10**9)

    def state_dict(self) -> dict[str, object]:
        """The state as ``dcp`` takes it."""
        return {"m": self.model.state_dict(), "o": self.optimizer.state_dict()}


class Memcpy:
    """The limit: ``size_bytes`` copied once between two warm buffers on one core."""

    def __init__(self, size_bytes: int) -> None:
        self._source, self._target = np.ones(size_bytes, np.uint8), np.zeros(size_bytes, np.uint8)
        self.seconds()

    def seconds(self) -> float:
        started = time.perf_counter()
        np.copyto(self._target, self._source)
        return time.perf_counter() - started


def timed(action: Callable[[], object], rounds: int) -> float:
    """Median seconds of ``rounds`` calls after one to warm up."""
    action()
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        action()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def report(name: str, figures: dict[str, float | int | str]) -> None:
    """One line of JSON on standard output, a readable one on standard error."""
    print(json.dumps({"bench": name, "cores": os.cpu_count(), **figures}), flush=True)
    shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items())
    print(f"{name}: {shown}", file=sys.stderr)


def warm_up(checkpointer: Checkpointer, snapshots: int = 4) -> None:
    """Save until ``snapshots`` were staged and the daemon has made all of its slots: everything is mapped and touched,
    the plan is warm, nothing goes on in the background."""
    step = staged = 0
    while staged < snapshots:
        if checkpointer.save(step).staged.exception(120) is None:
            staged += 1
        else:
            time.sleep(0.5)
        step += 1
        if step > 200:
            raise RuntimeError("no snapshot is staged")
    wait_quiet()
    for _ in range(snapshots):  # a slot made meanwhile is mapped at its first use
        step += 1
        checkpointer.save(step).staged.exception(120)
    wait_quiet()


def wait_quiet(quiet_s: float = 0.5, timeout_s: float = 60.0) -> None:
    """Wait until the daemons of this user have used no processor time for ``quiet_s``."""
    until = time.monotonic() + timeout_s
    before = -1.0
    while (now := _daemon_cpu_s()) - before > 0.02 and time.monotonic() < until:
        before = now
        time.sleep(quiet_s)


def _daemon_cpu_s() -> float:
    daemons = [p for p in psutil.process_iter() if "ckptd" in p.name() and p.uids().real == os.getuid()]
    return sum(sum(p.cpu_times()[:2]) for p in daemons)
