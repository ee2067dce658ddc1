from __future__ import annotations

import pytest
import torch
from state_snapshots import Snapshot, restore, save
from torch import nn

from ckptd.format.tree import decode_tree, encode_tree
from ckptd_client.state import TORCH_DECODERS, capture_rng, encode_torch, restore_rng, walk_state

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

OPTIMIZERS = {
    "foreach": {},
    "fused": {"fused": True},
    "capturable": {"capturable": True},
}


def program(seed: int, options: dict[str, bool]):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 300), nn.BatchNorm1d(300), nn.Linear(300, 64)).cuda()
    return {"model": model, "optim": torch.optim.AdamW(model.parameters(), 1e-3, **options)}


def train(state, steps: int = 2) -> None:
    for _ in range(steps):
        state["model"](torch.randn(8, 64, device="cuda")).square().sum().backward()
        state["optim"].step()
        state["optim"].zero_grad()


def on_host(snapshot: Snapshot) -> Snapshot:
    """What a restore gets: tensors in host memory."""
    return Snapshot(snapshot.data, snapshot.boxes, {name: t.cpu() for name, t in snapshot.tensors.items()})


def devices(state) -> dict[str, str]:
    return {leaf.name: leaf.tensor.device.type for leaf in walk_state(state).leaves}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_on_a_device_goes_on_bit_for_bit(name):
    first = program(1, OPTIMIZERS[name])
    train(first)
    snapshot, rng = on_host(save(first)), encode_tree(capture_rng(), encode_torch)
    train(first)
    for steps_before in (0, 2):
        second = program(2, OPTIMIZERS[name])
        train(second, steps_before)
        restore(second, snapshot)
        restore_rng(decode_tree(rng, TORCH_DECODERS))
        assert devices(second) == devices(first)
        train(second)
        for (key, a), (_, b) in zip(save(first).tensors.items(), save(second).tensors.items(), strict=True):
            assert torch.equal(a, b), key


def test_state_that_lay_on_the_host_comes_back_there():
    first, second = program(1, {}), program(2, {})
    train(first)
    for entry in first["optim"].state.values():
        entry["exp_avg"] = entry["exp_avg"].cpu()
    restore(second, on_host(save(first)))
    found = devices(second)
    assert found["optim.state.0.weight.exp_avg"] == found["optim.state.0.weight.step"] == "cpu"
    assert found["optim.state.0.weight.exp_avg_sq"] == found["model.0.weight"] == "cuda"


def test_a_snapshot_of_a_host_program_is_restored_onto_a_device():
    first, second = program(1, {}), program(2, {})
    train(first)
    expected = on_host(save(first))
    first["model"].cpu()
    for entry in first["optim"].state.values():
        entry.update({key: value.cpu() for key, value in entry.items()})
    restore(second, save(first))
    found = devices(second)
    assert found["optim.state.0.weight.exp_avg"] == "cuda"
    assert found["optim.state.0.weight.step"] == "cpu"
    for name, tensor in save(second).tensors.items():
        assert torch.equal(tensor.cpu(), expected.tensors[name]), name
