"""Two ranks of FSDP2 over gloo, one process each: ``python sharded_ranks.py RANK STORE``. Prints ``ok`` at the end.

Uneven on purpose: of 3 rows rank 0 has 2, and of the bias of 1 element rank 1 has nothing.
"""

from __future__ import annotations

import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from state_snapshots import assert_same, restore, save
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from ckptd_client.state import plan_restore


def program(seed: int, is_sharded: bool):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 1), nn.BatchNorm1d(1))
    if is_sharded:
        mesh = init_device_mesh("cpu", (2,))
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
    return {"model": model, "optim": torch.optim.AdamW(model.parameters(), 0.01)}


def train(state, steps: int = 2) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        state["model"](torch.randn(4, 5, generator=generator)).square().sum().backward()
        state["optim"].step()
        state["optim"].zero_grad()


def check_whole_into_shards() -> None:
    """A snapshot of one unsharded program, restored by two ranks that each ask for their own boxes."""
    whole = program(1, is_sharded=False)
    train(whole)
    snapshot = save(whole)
    state = program(2, is_sharded=True)
    plan = plan_restore(state, snapshot.tree, snapshot.boxes)

    def load(name: str) -> torch.Tensor:
        box = plan.boxes[name]
        part = tuple(slice(at, at + extent) for at, extent in zip(box.offset, box.shape, strict=True))
        return snapshot.tensors[name][part]

    plan.apply(load)
    for name, parameter in state["model"].named_parameters():
        assert torch.equal(parameter.full_tensor(), whole["model"].get_parameter(name)), name
        for key, value in state["optim"].state[parameter].items():
            value = value.full_tensor() if isinstance(value, DTensor) else value
            assert torch.equal(value, whole["optim"].state[whole["model"].get_parameter(name)][key]), (name, key)


def main(rank: int, store: str) -> None:
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    try:
        first, second = program(1, is_sharded=True), program(2, is_sharded=True)
        train(first)
        with CommDebugMode() as comm:
            snapshot = save(first)
            restore(second, snapshot)
            assert_same(save(second), snapshot)
        assert comm.get_total_counts() == 0, comm.get_comm_counts()
        weight, bias = snapshot.boxes["model.0.weight"], snapshot.boxes["model.1.bias"]
        assert (weight.global_shape, weight.offset, weight.shape) == ((3, 5), (2 * rank, 0), (2 - rank, 5))
        assert (bias.global_shape, bias.shape) == ((1,), (1 - rank,))
        train(first)
        train(second)
        assert_same(save(second), save(first))
        check_whole_into_shards()
        dist.barrier()
    finally:
        dist.destroy_process_group()
    print("ok")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
