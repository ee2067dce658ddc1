"""One rank of a job that uses the network: DDP with a bucket of some MiB, or a pipeline that is closed to a ring.

Forked by ``bench.detector_link`` on a node of its own. Compute is a sleep.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ckptd_client import Checkpointer

TIMEOUT_S = 300.0
_WIDTH = 512
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class Traffic:
    """What a rank does: ``mode`` is ddp or ring; ``size_bytes`` of gradients or of an activation."""

    mode: str
    steps: int
    compute_s: float
    size_bytes: int


class Job:
    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic
        torch.manual_seed(0)
        rows = traffic.size_bytes // _FLOAT_BYTES // _WIDTH
        layer = torch.nn.Linear(_WIDTH, rows if traffic.mode == "ddp" else 1, bias=False)
        self.model: torch.nn.Module = torch.nn.parallel.DistributedDataParallel(layer)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        self._data = torch.randn(1, _WIDTH)
        self._activation = torch.zeros(traffic.size_bytes // _FLOAT_BYTES)

    def step(self) -> None:
        time.sleep(self._traffic.compute_s / 2)
        if self._traffic.mode == "ring":
            self._pass_on(1)
        loss = self.model(self._data).square().mean()
        time.sleep(self._traffic.compute_s / 2)
        if self._traffic.mode == "ring":
            self._pass_on(-1)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _pass_on(self, way: int) -> None:
        """An activation to the next rank (``way`` 1), or a gradient to the one before (-1)."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        sent = dist.isend(self._activation, (rank + way) % world_size)
        received = dist.irecv(torch.empty_like(self._activation), (rank - way) % world_size)
        assert sent is not None
        assert received is not None
        received.wait()
        sent.wait()


def main(traffic: Traffic, journal: str) -> None:
    """The journal gets a line a step, when it is done."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_S))
    with open(journal, "a", buffering=1) as lines:

        def note(**fields: Any) -> None:
            lines.write(json.dumps({"at_s": time.monotonic(), **fields}) + "\n")

        job = Job(traffic)
        with Checkpointer({"model": job.model, "optim": job.optimizer}, every=1_000_000) as checkpointer:
            for step in range(1, traffic.steps + 1):
                job.step()
                checkpointer.step(step)
                note(step=step)
    dist.destroy_process_group()
