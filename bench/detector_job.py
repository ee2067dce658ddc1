"""One rank of a job whose compute is a timed sleep and a small product, with a fault that happens to it at one step.

Forked by ``bench.detector_live``. Faults: "stop" (SIGSTOP), "kill" (SIGKILL), "gil" (a C call that keeps the GIL),
"skip" (leaves a collective out), "size" (another size in a collective), "slow" (its compute takes so many times as
long), "busy" (processes that take its core away). A rank keeps a journal: a line a step, and the time of the fault.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from ckptd_client import Checkpointer

BURNERS = 4
TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Plan:
    """What the job does: ``mode`` is ddp or fsdp; ``fault`` happens to ``victim`` at ``at_step`` ("": to nobody)."""

    mode: str
    steps: int
    compute_s: float
    fault: str = ""
    ranks: tuple[int, ...] = ()
    at_step: int = 0
    factor: float = 1.0
    every: int = 0  # a snapshot every so many steps
    device: str = "cpu"  # "cuda": NCCL, a device a rank


class Job:
    def __init__(self, plan: Plan, rank: int, journal: Any) -> None:
        self.plan = plan
        self.rank = rank
        self._journal = journal
        torch.manual_seed(0)
        self._device = torch.device(plan.device, rank) if plan.device == "cuda" else torch.device("cpu")
        self.model: torch.nn.Module = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
        self.model.to(self._device)
        if plan.mode == "ddp":
            self.model = torch.nn.parallel.DistributedDataParallel(self.model)
        else:
            for layer in self.model:  # type: ignore[attr-defined]
                fully_shard(layer)
            fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self._data = torch.randn(8, 64, device=self._device)
        # Where a core is taken away, computing must need one; eight ranks share two otherwise.
        self._work = torch.randn(*2 * (320 if plan.fault == "busy" else 64,), device=self._device)
        if plan.fault == "busy":
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, [cores[0] if rank in plan.ranks else cores[-1]])

    def note(self, **fields: Any) -> None:
        self._journal.write(json.dumps({"rank": self.rank, "at_s": time.monotonic(), **fields}) + "\n")
        self._journal.flush()

    def step(self, step: int) -> None:
        """Compute in four parts, forward and backward, an all-reduce of the loss as jobs do for their logs."""
        is_hit = bool(self.plan.fault) and self.rank in self.plan.ranks and step >= self.plan.at_step
        if is_hit and step == self.plan.at_step:
            self.note(fault=self.plan.fault, step=step)
        self._compute(self.plan.factor if is_hit and self.plan.fault == "slow" else 1.0)
        if is_hit and step == self.plan.at_step:
            self._fail()
        loss = self.model(self._data).square().mean()
        self._compute(self.plan.factor if is_hit and self.plan.fault == "slow" else 1.0)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        is_now = is_hit and step == self.plan.at_step
        logged = torch.zeros(2 if is_now and self.plan.fault == "size" else 1, device=self._device)
        if not (is_now and self.plan.fault == "skip"):
            dist.all_reduce(logged)

    def _compute(self, factor: float) -> None:
        for _ in range(4):
            time.sleep(self.plan.compute_s * factor / 8)
            (self._work @ self._work).sum().item()

    def _fail(self) -> None:
        fault = self.plan.fault
        if fault == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault == "gil":
            ctypes.PyDLL(None).sleep(3600)
        elif fault == "busy":
            core = min(os.sched_getaffinity(0))
            code = f"import os; os.sched_setaffinity(0, [{core}])\nwhile os.getppid() != 1: pass"
            for _ in range(BURNERS):
                subprocess.Popen([sys.executable, "-c", code])


def main(plan: Plan, journal: str) -> None:
    torch.set_num_threads(1)
    if plan.device == "cuda":
        torch.cuda.set_device(int(os.environ["RANK"]))
    backend = "nccl" if plan.device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT_S))
    with open(journal, "a") as lines:
        job = Job(plan, dist.get_rank(), lines)
        state = {"model": job.model, "optim": job.optimizer}
        with Checkpointer(state, every=plan.every or 1_000_000) as checkpointer:
            job.note(step=0)
            for step in range(1, plan.steps + 1):
                job.step(step)
                checkpointer.step(step)
                job.note(step=step)
    dist.destroy_process_group()
