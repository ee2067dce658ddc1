"""Captures from a CUDA device into a daemon's memory: fences, clones, layouts and dtypes, bit for bit, and how fast.

Run with ``python -m pytest tests/gpu -m gpu -s``; the rates are printed. Needs about 8 GiB of the device and 14 GiB of
shared memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from harness import DaemonProcess, Stage
from torch import nn

from ckptd_client import Checkpointer
from ckptd_client.capture import Capture

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
RUN = "on-device"
GIB = 1 << 30


@pytest.fixture
def gpu_daemon(stage: Stage) -> DaemonProcess:
    return stage.daemon(memory="2GiB")


def build(seed: int, width: int = 2048, layers: int = 4, **options: Any) -> dict[str, Any]:
    """Parameters and AdamW's state of ``layers * width * width * 12`` bytes on the device."""
    torch.manual_seed(seed)
    with torch.device("cuda"):
        model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)), nn.BatchNorm1d(width))
    return {"model": model, "optim": torch.optim.AdamW(model.parameters(), **({"lr": 1e-2} | options))}


def give_gradients(state: dict[str, Any]) -> None:
    for parameter in state["model"].parameters():
        parameter.grad = torch.randn_like(parameter)


def tensors(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Every tensor of model and optimizer, by name, as it is."""
    found = {f"model.{name}": tensor for name, tensor in state["model"].state_dict().items()}
    if "optim" in state:
        for number, entry in state["optim"].state_dict()["state"].items():
            found |= {f"optim.{number}.{key}": value for key, value in entry.items()}
    return found


def snapshot_of(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors(state).items()}


def differing(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Names whose bits differ."""
    assert found.keys() == expected.keys()

    def raw(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).cpu()

    return [name for name, tensor in found.items() if not torch.equal(raw(tensor), raw(expected[name]))]


def checkpointer(daemon: DaemonProcess, state: dict[str, Any], **options: Any) -> Checkpointer:
    return Checkpointer(state, **({"run": RUN, "daemon": daemon.address, "every": 1, "on_error": "raise"} | options))


def restore_into(daemon: DaemonProcess, state: dict[str, Any]) -> int:
    with checkpointer(daemon, state) as ckpt:
        restored = ckpt.restore()
    assert restored is not None
    return restored.step


def settle(ckpt: Checkpointer, step: int) -> None:
    """A first snapshot in each slot: from then on they are mapped and pinned."""
    for number in range(3):
        ckpt.save(step + number).wait("staged", 120)


# --- fences ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"foreach": False}, {"fused": True}, {"capturable": True}], ids=str)
@pytest.mark.parametrize("is_on_own_stream", [False, True])
def test_a_step_right_after_a_save_does_not_reach_the_snapshot(
    gpu_daemon: DaemonProcess, options: dict[str, bool], is_on_own_stream: bool
) -> None:
    state = build(1, **options)
    stream = torch.cuda.stream(torch.cuda.Stream()) if is_on_own_stream else nullcontext()
    torch.cuda.synchronize()
    with stream, checkpointer(gpu_daemon, state) as ckpt:
        give_gradients(state)
        state["optim"].step()
        settle(ckpt, 1)
        for step in range(10, 20):
            expected = snapshot_of(state)
            snapshot = ckpt.save(step)
            for _ in range(3):
                state["optim"].step()
            snapshot.wait("staged", 60)
        torch.cuda.synchronize()
    fresh = build(2, **options)
    assert restore_into(gpu_daemon, fresh) == 19
    assert not differing(tensors(fresh), expected)
    assert differing(tensors(state), expected)


def test_kernels_queued_before_a_save_are_in_the_snapshot(gpu_daemon: DaemonProcess) -> None:
    """The copy waits for the compute stream: the host is far ahead of it here."""
    state = build(1)
    give_gradients(state)
    with checkpointer(gpu_daemon, state) as ckpt:
        state["optim"].step()
        settle(ckpt, 1)
        for step in range(10, 15):
            torch.cuda._sleep(100_000_000)  # about 50 ms in which nothing of what follows runs
            state["optim"].step()
            expected = snapshot_of(state)
            ckpt.save(step).wait("staged", 60)
    fresh = build(2)
    restore_into(gpu_daemon, fresh)
    assert not differing(tensors(fresh), expected)


def test_buffers_that_change_right_after_a_save_are_those_of_the_save(gpu_daemon: DaemonProcess) -> None:
    state = build(1)
    with checkpointer(gpu_daemon, state) as ckpt:
        settle(ckpt, 1)
        for step in range(10, 20):
            expected = snapshot_of(state)
            snapshot = ckpt.save(step)
            for _ in range(4):
                state["model"](torch.randn(64, 2048, device="cuda"))
            snapshot.wait("staged", 60)
    fresh = build(2)
    restore_into(gpu_daemon, fresh)
    assert not differing(tensors(fresh), expected)
    assert "model.4.running_mean" in differing(tensors(state), expected)


def test_training_goes_on_bit_for_bit_with_its_random_numbers(gpu_daemon: DaemonProcess) -> None:
    def train(state: dict[str, Any], steps: int) -> None:
        for _ in range(steps):
            x = nn.functional.dropout(torch.randn(64, 256, device="cuda"), 0.2)
            state["model"](x).square().mean().backward()
            state["optim"].step()
            state["optim"].zero_grad()

    first, second = build(1, width=256), build(2, width=256)
    with checkpointer(gpu_daemon, first) as ckpt:
        train(first, 3)
        ckpt.save(3).wait("staged", 60)
        train(first, 3)
    restore_into(gpu_daemon, second)
    train(second, 3)
    assert not differing(tensors(second), tensors(first))


# --- layouts and dtypes -----------------------------------------------------------------------------------------------
class Odd(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        with torch.device("cuda"):
            self.transposed = nn.Parameter(torch.randn(700, 500).t())
            self.large = nn.Parameter(torch.randn(6000, 4000).t())  # many pieces, not one run of bytes
            self.strided = nn.Parameter(torch.randn(100, 60)[::2, 1::2])
            self.channels_last = nn.Parameter(torch.randn(2, 3, 40, 50).to(memory_format=torch.channels_last))
            self.scalar, self.empty = nn.Parameter(torch.randn(())), nn.Parameter(torch.randn(0, 3))
            self.narrow = nn.Parameter(torch.randn(333, 33).bfloat16())
            self.narrow_strided = nn.Parameter(torch.randn(64, 1001).bfloat16()[:, ::3])
            self.first = nn.Linear(40, 40)
            self.tied = self.first
            for name, dtype in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)):
                self.register_buffer(name, torch.randn(1017).to(dtype))
            self.register_buffer("flags", torch.rand(1001) > 0.5)
            self.register_buffer("count", torch.tensor(7))
        self.register_buffer("on_host", torch.randn(50))


def test_every_layout_and_dtype_comes_back_with_the_same_bits(
    gpu_daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPTD_TORN_CHECK", "all")
    first, second = {"model": Odd(1)}, {"model": Odd(2)}
    with checkpointer(gpu_daemon, first) as ckpt:
        for step in range(1, 5):
            ckpt.save(step).wait("staged", 60)
    assert restore_into(gpu_daemon, second) == 4
    assert not differing(tensors(second), tensors(first))
    for name, tensor in tensors(second).items():
        assert tensor.device == tensors(first)[name].device, name
        assert tensor.stride() == tensors(first)[name].stride(), name


class Conjugate(nn.Module):
    """A parameter that is a lazy conjugate."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.value = nn.Parameter(torch.randn(99, dtype=torch.complex64).conj())
        self.cuda()


def test_a_lazily_conjugated_parameter_comes_back_with_the_same_bits(gpu_daemon: DaemonProcess) -> None:
    first, second = {"model": Conjugate(1)}, {"model": Conjugate(2)}
    with checkpointer(gpu_daemon, first) as ckpt:
        ckpt.save(1).wait("staged", 60)
    assert restore_into(gpu_daemon, second) == 1
    assert not differing(tensors(second), tensors(first))


def test_the_stream_hands_over_the_same_bytes(gpu_daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTD_HANDOVER", "grpc")
    first, second = build(1, width=512), build(2, width=512)
    give_gradients(first)
    first["optim"].step()
    with checkpointer(gpu_daemon, first) as ckpt:
        ckpt.save(1).wait("staged", 60)
    restore_into(gpu_daemon, second)
    assert not differing(tensors(second), tensors(first))


def test_a_strided_tensor_larger_than_a_registered_piece_is_copied(stage: Stage) -> None:
    daemon = stage.daemon(memory="7GiB", slots=2)
    first = {"big": torch.randn(20_000, 16_000, device="cuda").t(), "small": torch.randn(1000, device="cuda")}
    second = {"big": torch.zeros(16_000, 20_000, device="cuda"), "small": torch.zeros(1000, device="cuda")}
    with checkpointer(daemon, first) as ckpt:
        ckpt.save(1).wait("staged", 120)
    with checkpointer(daemon, second) as ckpt:
        assert ckpt.restore() is not None
    assert torch.equal(first["big"], second["big"])
    assert torch.equal(first["small"], second["small"])


def test_frozen_weights_on_a_device_are_not_copied_again_while_unchanged(gpu_daemon: DaemonProcess) -> None:
    state = build(1)
    for parameter in state["model"].parameters():
        parameter.requires_grad_(False)
    del state["optim"]
    moved: list[int] = []
    with checkpointer(gpu_daemon, state) as ckpt:
        for step in range(1, 9):
            ckpt.save(step).wait("staged", 60)
            capture = ckpt._engine._current
            assert capture is not None
            moved.append(len(capture.devices.pieces))
        with torch.no_grad():
            state["model"][0].weight.add_(1.0)
        ckpt.save(9).wait("staged", 60)
    assert moved[-1] < moved[0]
    fresh = {"model": build(2)["model"]}
    assert restore_into(gpu_daemon, fresh) == 9
    assert not differing(tensors(fresh), tensors(state))


# --- speed ------------------------------------------------------------------------------------------------------------
def pinned_rate(size_bytes: int) -> float:
    """Bytes a second from the device into ordinary pinned memory, best of three."""
    source = torch.empty(size_bytes, dtype=torch.uint8, device="cuda")
    target = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
    return max(_timed(lambda: target.copy_(source, non_blocking=True), size_bytes) for _ in range(4))


def _timed(copy: Callable[[], Any], size_bytes: int) -> float:
    torch.cuda.synchronize()
    started = time.monotonic()
    copy()
    torch.cuda.synchronize()
    return size_bytes / (time.monotonic() - started)


def test_a_few_gigabytes_reach_the_slot_at_the_rate_of_pinned_memory(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon = stage.daemon(memory="14GiB")
    state = build(1, width=8192, layers=4, fused=True)
    give_gradients(state)
    state["optim"].step()
    size_bytes = sum(t.numel() * t.element_size() for t in tensors(state).values())
    copies_s: list[float] = []
    stalls_s: list[float] = []
    bind, copy = Capture.bind, Capture.copy
    bound_at: list[float] = []

    def timed_bind(capture: Capture, *args: Any) -> None:
        bound_at.append(time.monotonic())
        bind(capture, *args)

    def timed_copy(capture: Capture) -> None:
        copy(capture)
        copies_s.append(time.monotonic() - bound_at[-1])

    monkeypatch.setattr(Capture, "bind", timed_bind)
    monkeypatch.setattr(Capture, "copy", timed_copy)
    rate = pinned_rate(GIB)
    with checkpointer(daemon, state, on_error="warn") as ckpt:
        settle(ckpt, 1)
        assert ckpt._engine._handover is not None
        mapped = list(ckpt._engine._handover._mapped.values())
        assert all(torch.from_numpy(slot.bytes).is_pinned() for slot in mapped)
        copies_s.clear()
        for step in range(10, 15):
            torch.cuda.synchronize()
            expected = snapshot_of(state)
            torch.cuda.synchronize()
            snapshot = ckpt.save(step)
            capture = ckpt._engine._current
            state["optim"].step()
            assert capture is not None
            stalls_s.append(capture.stall_s)
            snapshot.wait("staged", 120)
    reached = size_bytes / min(copies_s)
    with capsys.disabled():
        print(
            f"\n{size_bytes / GIB:.2f} GiB: slot {reached / 1e9:.1f} GB/s, pinned memory {rate / 1e9:.1f} GB/s, "
            f"ratio {reached / rate:.2f}; host stall of save and fence, best {min(stalls_s) * 1e3:.1f} ms, "
            f"worst {max(stalls_s) * 1e3:.1f} ms, of copies of {min(copies_s) * 1e3:.1f} ms"
        )
    del state
    fresh = build(2, width=8192, layers=4, fused=True)
    assert restore_into(daemon, fresh) == 14
    assert not differing(tensors(fresh), expected)
    assert reached > 0.7 * rate
    assert min(stalls_s) < min(copies_s)  # the fence waits on the device, not on the host
