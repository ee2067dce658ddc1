from __future__ import annotations

import copy
import random
import warnings

import numpy as np
import pytest
import torch
from state_snapshots import assert_same, bits, restore, save
from torch import nn
from torch.optim import lr_scheduler as sched

from ckptd.errors import StateMismatch
from ckptd.format.tree import decode_tree, encode_tree
from ckptd_client.state import (
    TORCH_DECODERS,
    apply_state,
    capture_rng,
    check_state,
    encode_torch,
    restore_rng,
)
from ckptd_client.state.fill import PIECE_BYTES, fill_all


def model_of(seed: int, width: int = 8) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 2))


def train(model: nn.Module, *steppers, steps: int = 2) -> None:
    for _ in range(steps):
        model(torch.randn(6, 4)).square().sum().backward()
        for stepper in steppers:
            stepper.step()
        model.zero_grad()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-3),
    "fused": lambda p: torch.optim.AdamW(p, 1e-3, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, 1e-3, amsgrad=True),
    "tensor_lr": lambda p: torch.optim.AdamW(p, torch.tensor(1e-3)),
    "adagrad": lambda p: torch.optim.Adagrad(p),
    "adafactor": lambda p: torch.optim.Adafactor(p),
    "rprop": lambda p: torch.optim.Rprop(p),
    "asgd": lambda p: torch.optim.ASGD(p),
    "rmsprop": lambda p: torch.optim.RMSprop(p, momentum=0.1, centered=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_bit_for_bit_after_a_restore_into_a_fresh_program(name):
    def program(seed):
        model = model_of(seed)
        optimizer = OPTIMIZERS[name](model.parameters())
        return {"model": model, "optim": optimizer}

    first = program(1)
    train(first["model"], first["optim"])
    snapshot = save(first)
    torch.manual_seed(9)
    train(first["model"], first["optim"])
    for steps_before in (0, 3):
        second = program(2)
        train(second["model"], second["optim"], steps=steps_before)
        restore(second, snapshot)
        assert_same(save(second), snapshot)
        torch.manual_seed(9)
        train(second["model"], second["optim"])
        assert_same(save(second), save(first))


def test_lbfgs_state_of_lists_comes_back():
    def program(seed):
        model = model_of(seed)
        return {"model": model, "optim": torch.optim.LBFGS(model.parameters(), max_iter=3)}

    first = program(1)
    x = torch.randn(6, 4)

    def closure():
        first["optim"].zero_grad()
        loss = first["model"](x).square().sum()
        loss.backward()
        return loss

    first["optim"].step(closure)
    snapshot = save(first)
    assert any(".old_dirs." in name for name in snapshot.boxes)
    second = program(2)
    restore(second, snapshot)
    assert_same(save(second), snapshot)


def test_state_in_its_own_dtype_is_not_cast_to_that_of_the_parameter():
    def program():
        model = model_of(0).bfloat16()
        return {"model": model, "optim": torch.optim.SGD(model.parameters(), momentum=0.9)}

    first = program()
    for parameter in first["model"].parameters():
        first["optim"].state[parameter] = {"momentum_buffer": torch.randn(parameter.shape), "n": 3}
    snapshot = save(first)
    second = program()
    restore(second, snapshot)
    assert_same(save(second), snapshot)
    assert second["optim"].state[second["model"][0].weight]["momentum_buffer"].dtype is torch.float32


def test_what_exists_is_filled_in_place_and_what_is_new_aliases_nothing():
    model = model_of(0)
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer)
    ref, moments = model[0].weight, optimizer.state[model[0].weight]["exp_avg"]
    addresses = ref.data_ptr(), moments.data_ptr()
    state = {"model": model, "optim": optimizer}
    snapshot = save(state)
    train(model, optimizer)
    version = ref._version
    restore(state, snapshot)
    assert (model[0].weight.data_ptr(), optimizer.state[ref]["exp_avg"].data_ptr()) == addresses
    assert model[0].weight is ref
    assert optimizer.state[ref]["exp_avg"] is moments
    assert ref._version > version

    optimizer.state.clear()
    restore(state, snapshot)
    made = optimizer.state[ref]["exp_avg"]
    assert made.data_ptr() != snapshot.tensors["optim.state.0.weight.exp_avg"].data_ptr()


def test_a_stepped_optimizer_takes_the_state_of_a_fresh_one():
    model = model_of(0)
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"model": model, "optim": optimizer}
    snapshot = save(state)
    train(model, optimizer)
    restore(state, snapshot)
    assert not optimizer.state
    assert_same(save(state), snapshot)


def test_two_optimizers_and_param_groups_get_their_own_back():
    def program(seed):
        a, b = model_of(seed), model_of(seed + 1)
        groups = [{"params": a[0].parameters(), "lr": 0.1, "betas": (0.8, 0.9)}, {"params": a[2].parameters()}]
        return {
            "gan": {"a": a, "b": b},
            "optims": [torch.optim.AdamW(groups), torch.optim.SGD(b.parameters(), momentum=0.5)],
        }

    first = program(1)
    train(first["gan"]["a"], first["optims"][0])
    train(first["gan"]["b"], first["optims"][1])
    first["optims"][0].param_groups[1]["lr"] = 0.25
    first["optims"][0].param_groups[0]["extra"] = "kept"
    second = program(5)
    restore(second, save(first))
    assert_same(save(second), save(first))
    assert second["optims"][0].param_groups[1]["lr"] == 0.25
    assert second["optims"][0].param_groups[0]["betas"] == (0.8, 0.9)
    assert second["optims"][0].param_groups[0]["extra"] == "kept"


SCHEDULERS = {
    "step": lambda o: sched.StepLR(o, 2),
    "multistep": lambda o: sched.MultiStepLR(o, [1, 3]),
    "lambda": lambda o: sched.LambdaLR(o, lambda epoch: 0.5**epoch),
    "cosine": lambda o: sched.CosineAnnealingLR(o, 5),
    "restarts": lambda o: sched.CosineAnnealingWarmRestarts(o, 2),
    "onecycle": lambda o: sched.OneCycleLR(o, 0.1, total_steps=20),
    "cyclic": lambda o: sched.CyclicLR(o, 0.01, 0.1, cycle_momentum=False),
    "plateau": lambda o: sched.ReduceLROnPlateau(o),
    "sequential": lambda o: sched.SequentialLR(
        o, [sched.ConstantLR(o, 0.1, 2), sched.ExponentialLR(o, 0.9)], milestones=[2]
    ),
    "chained": lambda o: sched.ChainedScheduler([sched.ConstantLR(o, 0.1, 2), sched.ExponentialLR(o, 0.9)]),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_go_on_where_they_were(name):
    def program():
        model = model_of(0)
        optimizer = torch.optim.AdamW(model.parameters(), 0.05)
        return {"model": model, "optim": optimizer, "sched": SCHEDULERS[name](optimizer)}

    def advance(state, steps=3):
        for _ in range(steps):
            state["optim"].step()
            state["sched"].step(*((1.0,) if name == "plateau" else ()))

    first, second = program(), program()
    advance(first)
    restore(second, save(first))
    assert_same(save(second), save(first))
    advance(first)
    advance(second)
    assert first["optim"].param_groups[0]["lr"] == second["optim"].param_groups[0]["lr"]


def test_a_grad_scaler_and_a_disabled_one_come_back():
    first = {"scaler": torch.amp.GradScaler("cpu", init_scale=128.0), "off": torch.amp.GradScaler("cpu", enabled=False)}
    second = {"scaler": torch.amp.GradScaler("cpu"), "off": torch.amp.GradScaler("cpu")}
    restore(second, save(first))
    assert second["scaler"].get_scale() == 128.0


def test_extra_state_and_hooks_of_modules_run():
    class Extra(nn.Module):
        def __init__(self, count):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))
            self.count = count
            self.calls = []
            self.register_load_state_dict_post_hook(lambda module, keys: module.calls.append("post"))

        def get_extra_state(self):
            return {"count": self.count, "table": torch.full((2,), float(self.count)), "shape": torch.Size([2])}

        def set_extra_state(self, state):
            self.count, self.table = state["count"], state["table"]
            assert state["shape"] == torch.Size([2])

    first, second = nn.Sequential(Extra(5)), nn.Sequential(Extra(1))
    restore({"m": second}, save({"m": first}))
    assert second[0].count == 5
    assert second[0].table.tolist() == [5.0, 5.0]
    assert second[0].calls == ["post"]


def test_a_module_with_a_state_dict_of_its_own_is_loaded_through_it():
    class Renamed(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.inner = nn.Parameter(torch.full((2,), value))

        def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
            return {f"{prefix}doubled": self.inner.detach() * 2}

        def load_state_dict(self, state, strict=True, assign=False):
            with torch.no_grad():
                self.inner.copy_(state["doubled"] / 2)

    first, second = Renamed(3.0), Renamed(0.0)
    optimizer = torch.optim.SGD(first.parameters(), momentum=0.9)
    first.inner.sum().backward()
    optimizer.step()
    snapshot = save({"m": first, "optim": optimizer})
    assert {"m.doubled", "optim.state.inner.momentum_buffer"} == set(snapshot.boxes)
    restore({"m": second, "optim": torch.optim.SGD(second.parameters(), momentum=0.9)}, snapshot)
    assert torch.equal(first.inner, second.inner)


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    other = copy.deepcopy(model)
    with torch.no_grad():
        model[0].weight.fill_(4)
    restore({"m": other}, save({"m": model}))
    assert other[0].weight is other[1].weight
    assert other[1].weight[0, 0] == 4


def test_wrapped_and_unwrapped_programs_exchange_snapshots():
    class DistributedDataParallel(nn.Module):  # told by its name, so that no process group is needed to test it
        def __init__(self, module):
            super().__init__()
            self.module = module

    plain, wrapped = model_of(1), torch.compile(DistributedDataParallel(model_of(2)))
    first = {"model": plain, "optim": torch.optim.AdamW(plain.parameters())}
    train(plain, first["optim"])
    second = {"model": wrapped, "optim": torch.optim.AdamW(wrapped.parameters())}
    restore(second, save(first))
    assert_same(save(second), save(first))


def test_plain_containers_are_restored_in_place_and_plain_values_in_the_mapping():
    def program():
        return {
            "hist": [1, 2],
            "stats": {"a": 1, "deep": {"x": [0]}},
            "array": np.zeros(3),
            "seen": {1, 2},
            "tensor": torch.zeros(3),
            "pair": (torch.zeros(2), 1),
            "best": 0.5,
            "name": None,
        }

    first, second = program(), program()
    first["hist"].append({"loss": torch.ones(2, dtype=torch.bfloat16)})
    first["stats"] |= {"b": 2}
    first["stats"]["deep"]["x"].append(float("nan"))
    first["array"] += 3
    first["seen"].add(7)
    first["tensor"] += 1
    first["pair"] = (torch.ones(2), 9)
    first["best"], first["name"] = 0.25, "x"
    held = dict(second), second["stats"]["deep"], second["pair"][0]
    snapshot = save(first)
    restore(second, snapshot)
    assert_same(save(second), snapshot)
    for key in ("hist", "stats", "array", "seen", "tensor"):
        assert second[key] is held[0][key]
    assert second["stats"]["deep"] is held[1]
    assert second["pair"][0] is held[2]
    assert second["hist"][2]["loss"].data_ptr() != snapshot.tensors["hist.2.loss"].data_ptr()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).reshape(3, 4).t(),
        torch.arange(24.0).reshape(4, 6)[::2, 1::2],
        torch.ones(3, 1).expand(3, 5),
        torch.tensor(2.5),
        torch.empty(0, 3),
        torch.arange(4.0).to(torch.float8_e4m3fn),
        torch.tensor([True, False]),
        torch.randn(3, dtype=torch.complex64).conj(),
        torch.randn(3, dtype=torch.complex64).conj().imag,
    ],
    ids=["transposed", "strided", "expanded", "0d", "empty", "fp8", "bool", "conj", "neg"],
)
def test_awkward_tensors_are_filled_in_place(tensor):
    snapshot = save({"x": tensor})
    live = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    live = live.conj() if tensor.is_conj() else live
    state = {"x": live}
    restore(state, snapshot)
    assert state["x"] is live
    assert bits(live.resolve_conj()) == bits(snapshot.tensors["x"])


def test_a_parameter_that_is_a_lazy_conjugate_is_filled_in_place():
    first, second = nn.Module(), nn.Module()
    for module in (first, second):
        module.p = nn.Parameter(torch.randn(3, dtype=torch.complex64).conj())
    restore({"m": second}, save({"m": first}))
    assert torch.equal(second.p.detach().resolve_conj(), first.p.detach().resolve_conj())


def test_an_expanded_buffer_of_a_module_is_filled_in_place():
    first, second = nn.Module(), nn.Module()
    first.register_buffer("b", torch.ones(3, 1).expand(3, 5))
    second.register_buffer("b", torch.zeros(3, 1).expand(3, 5))
    restore({"m": second}, save({"m": first}))
    assert second.b.eq(1).all()
    assert second.b.stride() == (1, 0)


def test_plain_values_that_changed_their_kind_are_replaced():
    saved = {"a": [1, 2], "b": (1, 2), "c": {"x": 1}, "d": 5, "e": torch.ones(2), "f": {"y": torch.ones(1)}, "g": None}
    live = {"a": 7, "b": [3], "c": None, "d": [1], "e": None, "f": "text", "g": (1,)}
    snapshot = save(saved)
    restore(live, snapshot)
    assert_same(save(live), snapshot)


def test_large_tensors_are_copied_in_pieces_by_several_threads():
    source = torch.randint(0, 255, (PIECE_BYTES * 2 + 12345,), dtype=torch.uint8)
    target = torch.zeros_like(source)
    small = torch.zeros(3)
    fill_all([("x", target), ("y", small)], {"x": source, "y": torch.ones(3)}.__getitem__)
    assert torch.equal(source, target)
    assert small.sum() == 3
    with pytest.raises(StateMismatch, match="x: "):
        fill_all([("x", target[:-1])], lambda name: source)


# --- mismatches ---------------------------------------------------------------------------------------------------
def mismatch(live, snapshot) -> str:
    before = save(live)
    with pytest.raises(StateMismatch) as caught:
        apply_state(live, snapshot.tree, lambda name: pytest.fail("touched before the check"), snapshot.boxes)
    with pytest.raises(StateMismatch):
        check_state(live, snapshot.tree, snapshot.boxes)
    assert_same(save(live), before)
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    return caught.value.message


def test_a_mismatch_names_the_first_few_differences_in_one_line():
    snapshot = save({"model": model_of(0)})
    text = mismatch({"model": model_of(0, width=9)}, snapshot)
    assert "model.0.weight is (8, 4) float32 in the snapshot but (9, 4) float32 here" in text
    assert text.endswith("; and 2 more")
    text = mismatch({"model": model_of(0).double()}, snapshot)
    assert "model.0.weight is (8, 4) float32 in the snapshot but (8, 4) float64 here" in text
    text = mismatch({"model": model_of(0)[:2]}, snapshot)
    assert text.count("is in the snapshot but not here") == 2
    assert "model.2.weight is in the snapshot but not here" in text
    assert "model.1.weight is not in the snapshot" in mismatch({"model": model_of(0)}, save({"model": model_of(0)[:1]}))


def test_missing_and_unexpected_keys_and_kinds_are_named():
    model = model_of(0)
    optimizer = torch.optim.SGD(model.parameters())
    snapshot = save({"a": model, "b": optimizer, "c": 1, "d": [model]})
    text = mismatch({"a": optimizer, "b": model, "d": [], "e": 2}, snapshot)
    assert "c is in the snapshot but not here" in text
    assert "e is not in the snapshot" in text
    assert "a is a module in the snapshot but SGD here" in text
    assert "b is an optimizer in the snapshot but Sequential here" in text
    assert "d.0 is a module in the snapshot but absent here" in mismatch(
        {"a": model, "b": optimizer, "c": 1, "d": []}, snapshot
    )


def test_other_param_groups_are_a_mismatch():
    model = model_of(0)

    def program(*groups):
        return {"model": model, "optim": torch.optim.SGD([{"params": list(group)} for group in groups])}

    snapshot = save(program(model[0].parameters(), model[2].parameters()))
    one = program([*model[0].parameters(), *model[2].parameters()])
    assert "optim has 2 param groups in the snapshot but 1 here" in mismatch(one, snapshot)
    more = program(model[0].parameters(), [*model[2].parameters(), *model[1].parameters()])
    assert "optim.param_groups.1: parameter 1.weight is not in the snapshot" in mismatch(more, snapshot)
    less = program(model[0].parameters(), [model[2].weight])
    assert "optim.param_groups.1: parameter 2.bias is in the snapshot but not here" in mismatch(less, snapshot)


def test_a_load_state_dict_that_raises_is_named():
    class Broken:
        def state_dict(self):
            return {"a": 1}

        def load_state_dict(self, state):
            raise KeyError("b")

    with pytest.raises(StateMismatch, match=r"x: Broken\.load_state_dict\(\) failed"):
        restore({"x": Broken()}, save({"x": Broken()}))


# --- random numbers and foreign values ----------------------------------------------------------------------------
def test_random_numbers_go_on_bit_for_bit():
    random.gauss(0, 1)
    np.random.normal()
    data = encode_tree(capture_rng(), encode_torch)

    def draw():
        return random.gauss(0, 1), random.random(), np.random.normal(), np.random.rand(), torch.randn(3).tolist()

    expected = draw()
    for _ in range(2):
        restore_rng(decode_tree(data, TORCH_DECODERS))
        assert draw() == expected


def test_torch_values_are_carried_by_name():
    values = [torch.bfloat16, torch.device("cuda:1"), torch.Size([2, 3]), torch.channels_last, torch.strided]
    again = decode_tree(encode_tree(values, encode_torch), TORCH_DECODERS)
    assert again == values
    assert [type(value) for value in again] == [type(value) for value in values]


def test_restoring_warns_of_nothing():
    model = model_of(0)
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"model": model, "optim": optimizer, "sched": sched.StepLR(optimizer, 2)}
    train(model, optimizer, state["sched"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        restore(state, save(state))
