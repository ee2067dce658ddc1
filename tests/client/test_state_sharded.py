from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from state_snapshots import assert_same, restore, save
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from ckptd.errors import StateNotEncodable
from ckptd_client.state import StateWalker, walk_state
from ckptd_client.state.leaves import shard_extent

HERE = Path(__file__).parent


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def last_of_four():
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=4)
    yield
    dist.destroy_process_group()


def run_ranks(commands: list[list[object]]) -> None:
    """Run scripts at the same time; each must end by printing ``ok``."""
    ranks = [
        subprocess.Popen(
            [sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for command in commands
    ]
    try:
        for rank in ranks:
            output, _ = rank.communicate(timeout=120)
            assert "ok" in output.splitlines(), output  # gloo's own threads may have a last word at exit
    finally:
        for rank in ranks:
            rank.kill()


def model_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_fsdp2_and_plain_programs_exchange_snapshots(one_rank):
    def program(seed, is_sharded):
        model = model_of(seed)
        if is_sharded:
            mesh = init_device_mesh("cpu", (1,))
            fully_shard(model[0], mesh=mesh)
            fully_shard(model, mesh=mesh)
        return {"model": model, "optim": torch.optim.AdamW(model.parameters())}

    for is_sharded in (True, False):
        first, second = program(1, is_sharded), program(2, not is_sharded)
        train(first["model"], first["optim"])
        snapshot = save(first)
        with CommDebugMode() as comm:
            restore(second, snapshot)
        assert comm.get_total_counts() == 0
        assert_same(save(second), snapshot)
        moment = second["optim"].state[second["model"][0].weight]["exp_avg"]
        assert isinstance(moment, DTensor) is not is_sharded
        train(second["model"], second["optim"])


def test_leaves_of_fsdp2_are_the_local_tensors_and_walking_again_remembers_them(one_rank):
    model = fully_shard(model_of(0), mesh=init_device_mesh("cpu", (1,)))
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer)
    walker = StateWalker({"model": model, "optim": optimizer})
    for _ in range(2):
        leaves = {leaf.name: leaf for leaf in walker.walk().leaves}
        leaf = leaves["model.0.weight"]
        assert type(leaf.tensor) is torch.Tensor
        assert leaf.outer is model[0].weight
        assert leaf.optimizer is optimizer
        assert leaf.tensor.data_ptr() == model[0].weight.to_local().data_ptr()
        assert leaves["optim.state.0.weight.exp_avg"].optimizer is optimizer
        train(model, optimizer)


def test_ddp_and_plain_programs_exchange_snapshots(one_rank):
    first, second = model_of(1), DistributedDataParallel(model_of(2))
    state = {"model": first, "optim": torch.optim.AdamW(first.parameters())}
    train(first, state["optim"])
    wrapped = {"model": second, "optim": torch.optim.AdamW(second.parameters())}
    restore(wrapped, save(state))
    assert_same(save(wrapped), save(state))
    assert {leaf.name for leaf in walk_state({"m": nn.ModuleDict({"x": second})}).leaves} >= {"m.x.0.weight"}


def test_a_partial_dtensor_is_refused(one_rank):
    mesh = init_device_mesh("cpu", (1,))
    partial = DTensor.from_local(torch.ones(2), mesh, [Partial()], run_check=False)
    with pytest.raises(StateNotEncodable, match="x is a DTensor placed as"):
        walk_state({"x": partial})
    whole = distribute_tensor(torch.ones(2), mesh, [Replicate()])
    assert walk_state({"x": whole}).leaves[0].global_shape == (2,)


def test_a_two_dimensional_mesh_gives_each_rank_its_own_box():
    run_ranks([[HERE / "mesh_rank.py", rank] for rank in (1, 2)])


def test_a_rank_beyond_the_last_row_has_an_empty_box(last_of_four):
    mesh = init_device_mesh("cpu", (4,))
    assert walk_state({"x": distribute_tensor(torch.ones(5, 2), mesh, [Shard(0)])}).leaves[0].tensor.shape == (0, 2)


def chunk(indices: torch.Tensor, chunks: int, index: int) -> torch.Tensor:
    parts = torch.chunk(indices, chunks)
    return parts[index] if index < len(parts) else indices[:0]


@given(st.integers(0, 40), st.lists(st.tuples(st.integers(1, 5), st.integers(0, 4)), max_size=3))
def test_extents_are_those_of_chunking_again_and_again(size, cuts):
    indices = torch.arange(size)
    cuts = [(chunks, index % chunks, 1) for chunks, index in cuts]
    for chunks, index, _ in cuts:
        indices = chunk(indices, chunks, index)
    first, extent = shard_extent(size, cuts)
    assert extent == len(indices)
    assert not extent or indices.tolist() == list(range(first, first + extent))


def test_strided_shards_that_are_one_run_tile_the_dimension_and_others_are_told():
    found = [shard_extent(8, [(2, dp, 2), (2, tp, 1)]) for dp, tp in itertools.product(range(2), range(2))]
    assert found == [(0, 2), (4, 2), (2, 2), (6, 2)]
    assert shard_extent(9, [(4, 0, 2)]) is None
    assert shard_extent(0, [(2, 0, 2)]) == (0, 0)


def test_uneven_and_empty_shards_of_two_ranks_round_trip(tmp_path):
    run_ranks([[HERE / "sharded_ranks.py", rank, tmp_path / "store"] for rank in range(2)])
