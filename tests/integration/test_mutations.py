"""Whoever mutates the state between two saves, and however: what is sealed is never torn. Bits compared in full."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from harness import DaemonProcess, Stage, wait_until
from programs import RUN, bits, checkpointer, program, restore, save, train
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.nn.functional import mse_loss

from ckptd.errors import CkptdError, StepDead
from ckptd_client import Checkpointer
from ckptd_client.binding import Binding
from ckptd_client.capture import Capture

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "plain sgd": (torch.optim.SGD, {}),
    "adam": (torch.optim.Adam, {"amsgrad": True}),
    "fused adamw": (torch.optim.AdamW, {"fused": True}),
    "rmsprop": (torch.optim.RMSprop, {"centered": True, "momentum": 0.5}),
    "adagrad": (torch.optim.Adagrad, {"initial_accumulator_value": 0.1}),
    "adafactor": (torch.optim.Adafactor, {}),
    "rprop": (torch.optim.Rprop, {}),
    "nadam": (torch.optim.NAdam, {}),
    "tensor lr": (torch.optim.Adam, {"lr": torch.tensor(0.01), "foreach": False}),
}


@pytest.fixture(autouse=True)
def every_byte_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTD_TORN_CHECK", "all")


def wide(seed: int = 0, **options: Any) -> dict[str, Any]:
    """About 25 MB of parameters and state: a copy takes long enough to run into the next step."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(1000, 1000), nn.Linear(1000, 1000))
    return {"model": model, "optim": torch.optim.AdamW(model.parameters(), **({"lr": 1e-2} | options))}


def step_wide(state: dict[str, Any], step: Callable[[], Any] | None = None) -> None:
    for parameter in state["model"].parameters():
        parameter.grad = torch.ones_like(parameter)
    (step or state["optim"].step)()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_bit_for_bit_with(name: str, daemon: DaemonProcess) -> None:
    make, options = OPTIMIZERS[name]
    first = program(1, make, **copy.deepcopy(options))
    with checkpointer(daemon, first) as ckpt:
        for step in range(1, 4):
            train(first)
            ckpt.save(step).wait("staged", 10)
        train(first, 2)
    expected = bits(first)
    second = program(2, make, **copy.deepcopy(options))
    assert restore(daemon, second).step == 3
    train(second, 2)
    assert bits(second) == expected


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": False}], ids=str)
def test_a_step_right_after_a_save_waits_for_the_copy(stage: Stage, options: dict[str, Any]) -> None:
    daemon = stage.daemon(memory="256MiB")
    state = wide(1, **options)
    step_wide(state)
    sealed: dict[int, Any] = {}
    with checkpointer(daemon, state) as ckpt:
        for step in range(1, 8):
            sealed[step] = bits(state)
            snapshot = ckpt.save(step)
            step_wide(state)
            snapshot.wait("staged", 20)
    fresh = wide(2)
    assert bits(state) != sealed[7]
    assert restore(daemon, fresh).step == 7
    assert bits(fresh["model"]) == sealed[7]["model"]
    assert [s for _, s in sorted(bits(fresh["optim"])["state"].items())] == [
        s for _, s in sorted(sealed[7]["optim"]["state"].items())
    ]


@pytest.mark.slow
@pytest.mark.parametrize("is_compiled_before", [True, False])
def test_a_compiled_optimizer_step_meets_the_fence(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, is_compiled_before: bool
) -> None:
    daemon = stage.daemon(memory="256MiB")
    state = wide(1)
    compiled = torch.compile(state["optim"].step)
    if is_compiled_before:
        step_wide(state, compiled)
    fenced: list[Any] = []
    fence = Capture.fence
    monkeypatch.setattr(Capture, "fence", lambda capture, owner: (fenced.append(owner), fence(capture, owner)))
    with checkpointer(daemon, state) as ckpt:
        step_wide(state, compiled)
        for step in range(1, 6):
            sealed = bits(state["model"])
            snapshot = ckpt.save(step)
            step_wide(state, compiled)
            assert snapshot.wait("staged", 20) == step
            assert fenced.pop() is state["optim"]
    fresh = wide(2)
    assert restore(daemon, fresh).step == 5
    assert bits(fresh["model"]) == sealed


@pytest.mark.slow
def test_a_compiled_module_is_saved_under_the_names_of_the_plain_one(daemon: DaemonProcess) -> None:
    first = program(1)
    compiled = {"model": torch.compile(first["model"]), "optim": first["optim"]}
    with checkpointer(daemon, compiled) as ckpt:
        for step in (1, 2):
            train(compiled)
            ckpt.save(step).wait("staged", 10)
    second = program(2)
    restore(daemon, second)
    assert bits(second) == bits(first)


def test_optimizers_that_step_in_backward_are_fenced_by_hooks_of_their_own(stage: Stage) -> None:
    daemon = stage.daemon(memory="256MiB")

    def build(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = nn.Sequential(*(nn.Linear(600, 600) for _ in range(4)))
        each = {n: torch.optim.AdamW([p], lr=1e-2) for n, p in model.named_parameters()}

        def attach(parameter: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
            def step(_: torch.Tensor) -> None:
                optimizer.step()
                optimizer.zero_grad()

            parameter.register_post_accumulate_grad_hook(step)

        for name, parameter in model.named_parameters():
            attach(parameter, each[name])
        return {"model": model, "optims": each}

    first, second = build(1), build(2)
    x = torch.randn(4, 600)
    with checkpointer(daemon, first) as ckpt:
        for step in range(1, 6):
            first["model"](x).square().sum().backward()
            sealed = bits(first)
            snapshot = ckpt.save(step)
            if step < 5:
                first["model"](x).square().sum().backward()
            snapshot.wait("staged", 20)
    assert restore(daemon, second).step == 5
    assert bits(second) == sealed


def test_apply_optimizer_in_backward_is_fenced_too(stage: Stage) -> None:
    daemon = stage.daemon(memory="256MiB")

    def build(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = nn.Sequential(*(nn.Linear(600, 600) for _ in range(4)))
        _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 1e-3, "momentum": 0.9})
        optims = {n: p._in_backward_optimizers[0] for n, p in model.named_parameters()}  # type: ignore[attr-defined]
        return {"model": model, "optims": optims}

    first, second = build(1), build(2)
    x = torch.randn(4, 600)
    first["model"](x).square().sum().backward()
    with checkpointer(daemon, first) as ckpt:
        for step in range(1, 6):
            sealed = bits(first)
            snapshot = ckpt.save(step)
            first["model"](x).square().sum().backward()
            snapshot.wait("staged", 20)
    assert restore(daemon, second).step == 5
    assert bits(second) == sealed


def test_gradients_accumulate_between_a_save_and_the_step(daemon: DaemonProcess) -> None:
    first, second = program(1), program(2)
    with checkpointer(daemon, first) as ckpt:
        for step in range(1, 5):
            for _ in range(3):
                first["model"](torch.randn(8, 16)).square().sum().backward()
            first["optim"].step()
            first["optim"].zero_grad()
            sealed, snapshot = bits(first), ckpt.save(step)
            first["model"].eval()  # backward runs while it is copied; buffers of the batch norm stay
            first["model"](torch.randn(8, 16)).square().sum().backward()
            first["model"].train()
            snapshot.wait("staged", 10)
    assert restore(daemon, second).step == 4
    assert bits(second) == sealed


def test_buffers_that_forward_changes_are_those_of_the_save(daemon: DaemonProcess) -> None:
    first, second = program(1), program(2)
    with checkpointer(daemon, first) as ckpt:
        for step in range(1, 6):
            train(first)
            sealed, snapshot = bits(first), ckpt.save(step)
            for _ in range(5):
                first["model"](torch.randn(8, 16))
            snapshot.wait("staged", 10)
    restore(daemon, second)
    assert bits(second) == sealed


def test_a_grad_scaler_that_skips_steps_goes_on_bit_for_bit(daemon: DaemonProcess) -> None:
    def build(seed: int) -> dict[str, Any]:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3)
        return program(seed) | {"scaler": scaler}

    def step(state: dict[str, Any], number: int) -> None:
        loss = state["model"](torch.randn(8, 16)).square().sum()
        if number % 3 == 0:
            loss = loss * float("inf")
        state["scaler"].scale(loss).backward()
        state["scaler"].step(state["optim"])
        state["scaler"].update()
        state["optim"].zero_grad()

    first, second = build(1), build(2)
    with checkpointer(daemon, first) as ckpt:
        for number in range(1, 8):
            step(first, number)
            ckpt.save(number).wait("staged", 10)
        for number in range(8, 12):
            step(first, number)
    assert restore(daemon, second).step == 7
    for number in range(8, 12):
        step(second, number)
    assert bits(second) == bits(first)
    assert first["scaler"].get_scale() != 2.0**8


def test_the_first_save_may_come_before_the_first_step(daemon: DaemonProcess) -> None:
    first, second = program(1), program(2)
    train(second, 2)  # what the optimizer has here must go
    with checkpointer(daemon, first) as ckpt:
        ckpt.save(0).wait("staged", 10)
        train(first, 2)
    assert restore(daemon, second).step == 0
    train(second, 2)
    assert bits(second) == bits(first)


def test_a_param_group_may_be_added_mid_run(daemon: DaemonProcess) -> None:
    def build(seed: int, *, is_late: bool) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
        state = {"model": model, "optim": torch.optim.AdamW(model[0].parameters(), lr=1e-2)}
        if is_late:
            state["optim"].add_param_group({"params": list(model[1].parameters()), "lr": 1e-4})
        return state

    first = build(1, is_late=False)
    with checkpointer(daemon, first) as ckpt:
        train(first)
        ckpt.save(1).wait("staged", 10)
        first["optim"].add_param_group({"params": list(first["model"][1].parameters()), "lr": 1e-4})
        train(first)
        sealed, snapshot = bits(first), ckpt.save(2)
        train(first)
        snapshot.wait("staged", 10)
    second = build(2, is_late=True)
    restore(daemon, second)
    assert bits(second) == sealed


def test_frozen_weights_are_copied_again_only_when_they_changed(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = stage.daemon(memory="256MiB")
    copied: list[int] = []
    copy_on_cpu = Binding.copy_on_cpu

    def counted(binding: Binding, piece: Any, sources: Any) -> None:
        copied.append(sum(item.size_bytes for item in piece.items))
        copy_on_cpu(binding, piece, sources)

    monkeypatch.setattr(Binding, "copy_on_cpu", counted)

    def build(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        base, lora = nn.Linear(1500, 1500).requires_grad_(False), nn.Linear(16, 4)
        return {"base": base, "lora": lora, "optim": torch.optim.SGD(lora.parameters(), lr=1e-2)}

    first, second = build(1), build(2)
    sizes = []
    with checkpointer(daemon, first) as ckpt:
        for step in range(1, 13):
            if step == 9:
                with torch.no_grad():
                    first["base"].weight.add_(1.0)
            copied.clear()
            ckpt.save(step).wait("staged", 20)
            sizes.append(sum(copied))
    assert min(sizes[3:8]) < 1_000_000 < sizes[8]  # each slot has them once; then one that changed is copied again
    assert restore(daemon, second).step == 12
    assert bits(second) == bits(first)


def test_a_data_write_to_frozen_weights_is_not_lost(stage: Stage) -> None:
    daemon = stage.daemon(memory="64MiB")
    torch.manual_seed(0)
    state = {"base": nn.Linear(300, 300).requires_grad_(False)}
    with checkpointer(daemon, state, on_error="warn") as ckpt:
        for step in range(1, 6):
            ckpt.save(step).wait("staged", 10)
        state["base"].weight.data.mul_(2.0)
        steps = itertools.count(6)
        wait_until(lambda: ckpt.save(next(steps)).staged.exception(10) is None, "a save that copies them again")
    fresh = {"base": nn.Linear(300, 300).requires_grad_(False)}
    restore(daemon, fresh)
    assert bits(fresh) == bits(state)


def test_declared_ema_weights_are_those_of_the_save_when_the_fence_is_called(stage: Stage) -> None:
    daemon = stage.daemon(memory="256MiB")

    def build(seed: int) -> dict[str, Any]:
        state = wide(seed)
        return state | {"ema": copy.deepcopy(state["model"])}

    first, second = build(1), build(2)
    with checkpointer(daemon, first, fenced={"ema": first["ema"]}) as ckpt:
        for step in range(1, 6):
            step_wide(first)
            sealed, snapshot = bits(first["ema"]), ckpt.save(step)
            ckpt.fence()
            with torch.no_grad():
                for average, now in zip(first["ema"].parameters(), first["model"].parameters(), strict=True):
                    average.lerp_(now, 0.1)
            snapshot.wait("staged", 20)
    assert restore(daemon, second).step == 5
    assert bits(second["ema"]) == sealed


def test_what_changes_under_the_copy_without_a_fence_is_never_sealed(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = stage.daemon(memory="256MiB")
    state = wide(1)
    sealed: dict[int, Any] = {}
    torn = 0
    with checkpointer(daemon, state, on_error="warn") as ckpt:
        for step in range(1, 30):
            sealed[step] = bits(state)
            snapshot = ckpt.save(step)
            state["model"][1].weight.data.add_(1.0)  # raises no version
            error = snapshot.staged.exception(20)
            assert error is None or isinstance(error, StepDead)
            torn += error is not None
    assert torn  # most of them: a write before the copy is seen as well as one under it
    if torn < 29:
        fresh = wide(2)
        step = restore(daemon, fresh).step
        assert bits(fresh["model"]) == sealed[step]["model"]


def test_random_numbers_go_on_where_they_were(daemon: DaemonProcess) -> None:
    def draw() -> Any:
        return [
            [random.random(), random.gauss(0, 1)],
            np.random.standard_normal(3).tolist(),
            torch.randn(3).tolist(),
        ]

    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    draw()
    state = program(4)
    with checkpointer(daemon, state) as ckpt:
        ckpt.save(1).wait("staged", 10)
        expected = [draw(), draw()]
    draw()
    restore(daemon, state)
    assert [draw(), draw()] == expected


def test_saving_draws_from_no_generator_of_the_user(daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CKPTD_TORN_CHECK")
    state = {"many": {str(n): torch.zeros(20_000) for n in range(100)}, **program(1)}
    train(state)
    random.seed(1)
    before = random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()
    with checkpointer(daemon, state) as ckpt:
        for step in range(1, 6):
            ckpt.save(step).wait("staged", 10)
    assert (random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()) == before


def test_schedulers_go_on(daemon: DaemonProcess) -> None:
    def build(seed: int) -> dict[str, Any]:
        state = program(seed, torch.optim.SGD, lr=0.1)
        warm = torch.optim.lr_scheduler.LinearLR(state["optim"], 0.1, total_iters=4)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(state["optim"], 20)
        both = torch.optim.lr_scheduler.SequentialLR(state["optim"], [warm, cosine], [4])
        return state | {"sched": both, "plateau": torch.optim.lr_scheduler.ReduceLROnPlateau(state["optim"])}

    first, second = build(1), build(2)
    with checkpointer(daemon, first) as ckpt:
        for step in range(1, 7):
            train(first)
            first["sched"].step()
            first["plateau"].step(1.0)
            ckpt.save(step).wait("staged", 10)
    restore(daemon, second)
    rates = []
    for state in (first, second):
        torch.manual_seed(0)
        for _ in range(5):
            train(state)
            state["sched"].step()
        rates.append(state["optim"].param_groups[0]["lr"])
    assert rates[0] == rates[1]
    assert bits(second["model"]) == bits(first["model"])


class Numbers(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((16,), float(index))


@pytest.mark.slow
def test_a_data_loader_with_forked_workers_lives_beside_saves(daemon: DaemonProcess) -> None:
    state = program(1)
    with checkpointer(daemon, state, on_error="warn") as ckpt:
        step = 0
        for _ in range(3):
            loader = torch.utils.data.DataLoader(Numbers(), 8, num_workers=2, multiprocessing_context="fork")
            for batch in loader:
                step += 1
                mse_loss(state["model"](batch), torch.zeros(8, 4)).backward()
                state["optim"].step()
                snapshot = ckpt.step(step)
        assert step == 24
        assert snapshot is not None
        wait_until(lambda: ckpt.save(step).skipped is None, "the last save")
    assert restore(daemon, program(2)).step == 24


def test_a_failed_load_leaves_the_state_as_it_was(daemon: DaemonProcess) -> None:
    save(daemon, program(1))
    other = {"model": nn.Linear(3, 3), "optim": None}
    before = bits(other["model"])
    with Checkpointer(other, run=RUN, daemon=daemon.address, every=1) as ckpt, pytest.raises(CkptdError):
        ckpt.restore()
    assert bits(other["model"]) == before
