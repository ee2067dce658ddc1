"""One rank of a 2 x 2 mesh of tensor parallelism and FSDP2, its peers faked: ``python mesh_rank.py RANK``.

A process of its own, because torch remembers meshes by content across process groups. Prints ``ok`` at the end.
"""

from __future__ import annotations

import sys

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

from ckptd_client.state import walk_state


def main(rank: int) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    leaves = {leaf.name: leaf for leaf in walk_state({"m": model}).leaves}
    dp, tp = divmod(rank, 2)
    up, down = leaves["m.0.weight"], leaves["m.1.weight"]
    assert (up.global_shape, up.offset, tuple(up.tensor.shape)) == ((8, 4), (tp * 4 + dp * 2, 0), (2, 4))
    assert (down.global_shape, down.offset, tuple(down.tensor.shape)) == ((4, 8), (dp * 2, tp * 4), (2, 4))
    dist.destroy_process_group()
    print("ok")


if __name__ == "__main__":
    main(int(sys.argv[1]))
