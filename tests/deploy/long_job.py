"""One rank of a job on gloo that trains until it is told to end, forked by ``TrainerProcess``.

In $TRAINER_CONTROL of a rank: a file ``slow`` makes its compute take as many times as long as the number in it; ``end``
of rank 0 ends the job, all ranks after the same step. Events: ``ready`` (restored step or None), ``step``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ckptd_client import Checkpointer

CONTROL = Path(os.environ["TRAINER_CONTROL"])
WIDTH = 64
TIMEOUT_S = 600.0


def emit(event: str, **fields: Any) -> None:
    with open(os.environ["TRAINER_EVENTS"], "a") as events:
        events.write(json.dumps({"event": event, "at_s": time.monotonic(), **fields}) + "\n")


def compute(seconds: float) -> None:
    slow = CONTROL / "slow"
    time.sleep(seconds * (float(slow.read_text()) if slow.exists() else 1.0))


class Job:
    def __init__(self, compute_s: float) -> None:
        torch.manual_seed(0)
        layers = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH))
        self.model = torch.nn.parallel.DistributedDataParallel(layers)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self._data = torch.randn(8, WIDTH)
        self._compute_s = compute_s

    def step(self) -> bool:
        """Forward, backward, and an all-reduce of what jobs log; True when rank 0 says that it was the last."""
        compute(self._compute_s / 2)
        loss = self.model(self._data).square().mean()
        compute(self._compute_s / 2)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        last = torch.tensor([float(dist.get_rank() == 0 and (CONTROL / "end").exists())])
        dist.all_reduce(last)
        return bool(last.item())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--compute-s", type=float, default=0.1)
    parser.add_argument("--every", type=int, default=10, help="a snapshot every so many steps")
    parser.add_argument("--only-first", action="store_true", help="one snapshot, after the first step, and no other")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_S))
    job = Job(options.compute_s)
    state = {"model": job.model, "optim": job.optimizer}
    with Checkpointer(state, every=1_000_000 if options.only_first else options.every) as checkpointer:
        restored = checkpointer.restore()
        emit("ready", restored=restored.step if restored else None)
        for step in itertools.count(restored.step + 1 if restored else 1):
            is_last = job.step()
            checkpointer.step(step)
            if options.only_first and step == 1:
                checkpointer.save(step)
            emit("step", step=step)
            if is_last:
                break
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
