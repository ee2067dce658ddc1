"""One rank of a job under torchrun: DDP or FSDP2 on gloo, dropout on, a snapshot every step. Rank 0 keeps a journal."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from ckptd_client import Checkpointer

MODE, RUN, STEPS, JOURNAL = sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])


def note(event: str, **fields: Any) -> None:
    if dist.get_rank() == 0:
        with JOURNAL.open("a") as lines:
            lines.write(json.dumps({"event": event, **fields}) + "\n")


def hash_all(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    digest = hashlib.sha256()
    tensors = list(model.state_dict().values())
    for state in optimizer.state_dict()["state"].values():
        tensors += [state[key] for key in sorted(state)]
    for tensor in tensors:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        digest.update(local.detach().contiguous().numpy().tobytes())
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, digest.hexdigest())
    return hashlib.sha256(json.dumps(of_ranks).encode()).hexdigest()


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    # Uneven sizes: the last rank's shard is smaller, or empty.
    model: nn.Module = nn.Sequential(nn.Linear(33, 65), nn.ReLU(), nn.Dropout(0.2), nn.Linear(65, 1))
    if MODE == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        fully_shard(model[0])
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=MODE == "fsdp-fused")
    torch.manual_seed(100 + dist.get_rank())
    random.seed(200 + dist.get_rank())
    with Checkpointer({"model": model, "optim": optimizer}, run=RUN, every=1) as ckpt:
        restored = ckpt.restore()
        note("ready", restored=restored and restored.step, source=restored and restored.source)
        for step in range(restored.step + 1 if restored else 1, STEPS + 1):
            x = torch.randn(8, 33) * random.random()
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            ckpt.step(step)
            note("step", step=step, hash=hash_all(model, optimizer))
    note("end")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
