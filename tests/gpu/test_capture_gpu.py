"""Capture from a CUDA device into the registered slot, the fence on the stream, restore: bit for bit, with the rate.

Run on a machine with a GPU: ``python -m pytest tests/gpu -m gpu -s``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import pytest
import torch
from harness import DaemonProcess

from ckptd_client import Checkpointer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GIB = 1 << 30


@pytest.fixture
def address() -> Iterator[str]:
    daemon = DaemonProcess(memory="24GiB")
    yield daemon.address
    daemon.close()


def a_model(width: int, layers: int, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        *(torch.nn.Linear(width, width, dtype=dtype, device="cuda") for _ in range(layers)),
        torch.nn.BatchNorm1d(width, device="cuda", dtype=dtype),
    )


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, width: int, dtype: torch.dtype) -> None:
    optimizer.zero_grad()
    model(torch.randn(16, width, device="cuda", dtype=dtype)).square().mean().backward()
    optimizer.step()


def tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    state = [t for entry in optimizer.state.values() for t in entry.values() if torch.is_tensor(t)]
    return [*model.state_dict().values(), *state]


def copies(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    torch.cuda.synchronize()
    return [t.detach().cpu().clone() for t in tensors(model, optimizer)]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    a, b = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(a, b)


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_snapshot_holds_the_step_it_names_though_training_goes_on(
    address: str, dtype: torch.dtype, is_fused: bool
) -> None:
    width, run = 1024, f"gpu-{str(dtype)[6:]}-{is_fused}"
    model = a_model(width, 8, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=is_fused)
    expected: dict[int, list[torch.Tensor]] = {}
    staged = []
    with Checkpointer({"model": model, "optim": optimizer}, run, address, every=10**9) as checkpointer:
        for step in range(1, 31):
            train(model, optimizer, width, dtype)
            expected[step] = copies(model, optimizer)
            snapshot = checkpointer.save(step)
            train(model, optimizer, width, dtype)  # at once: only the fence keeps the copy whole
            if snapshot.staged.exception(30) is None:
                staged.append(step)
    assert staged
    assert staged[-1] == 30
    fresh = a_model(width, 8, dtype)
    other = torch.optim.AdamW(fresh.parameters(), lr=1e-2, fused=is_fused)
    with Checkpointer({"model": fresh, "optim": other}, run, address) as checkpointer:
        restored = checkpointer.restore()
    assert restored is not None
    assert restored.step == 30
    assert all(same_bits(a, b) for a, b in zip(expected[30], copies(fresh, other), strict=True))


def test_odd_tensors_come_back_bit_for_bit(address: str) -> None:
    def state() -> dict[str, torch.Tensor]:
        return {
            "strided": torch.zeros(64, 64, device="cuda")[::2, 1::3],
            "transposed": torch.zeros(33, 65, device="cuda").t(),
            "bfloat16": torch.zeros(1001, device="cuda", dtype=torch.bfloat16),
            "float8": torch.zeros(77, device="cuda", dtype=torch.float8_e4m3fn),
            "bool": torch.zeros(129, device="cuda", dtype=torch.bool),
            "complex": torch.zeros(65, device="cuda", dtype=torch.complex64),
            "scalar": torch.zeros((), device="cuda"),
            "empty": torch.zeros(0, 4, device="cuda"),
            "host": torch.zeros(50),
        }

    original = state()
    for tensor in original.values():
        tensor.copy_(
            torch.randn(tensor.shape, device=tensor.device) > 0
            if tensor.dtype is torch.bool
            else torch.randn(tensor.shape, device=tensor.device).to(tensor.dtype)
        )
    with Checkpointer({"plain": original}, "odd", address, every=10**9) as checkpointer:
        checkpointer.save(1).wait("staged", 30)
    fresh = state()
    with Checkpointer({"plain": fresh}, "odd", address) as checkpointer:
        assert checkpointer.restore() is not None
    assert all(same_bits(original[name], fresh[name]) for name in original)


def test_a_few_gigabytes_are_captured_near_the_rate_of_pinned_memory(address: str) -> None:
    width, layers = 8192, 4
    model = a_model(width, layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    train(model, optimizer, width, torch.float32)
    size = sum(t.numel() * t.element_size() for t in tensors(model, optimizer))
    source = torch.empty(2 * GIB, dtype=torch.uint8, device="cuda")
    pinned = torch.empty(2 * GIB, dtype=torch.uint8, pin_memory=True)
    taken, limit, lost = [], [], []
    with Checkpointer({"model": model, "optim": optimizer}, "rate", address, every=10**9) as checkpointer:
        number = 0
        while len(taken) < 8 and number < 60:
            number += 1
            torch.cuda.synchronize()
            started = time.perf_counter()
            pinned.copy_(source, non_blocking=True)
            torch.cuda.synchronize()
            limit.append(2 * GIB / (time.perf_counter() - started))
            started = time.perf_counter()
            snapshot = checkpointer.save(number)
            capture = checkpointer._engine.current
            assert capture is not None
            while not capture.is_over and not all(capture._done):
                time.sleep(0.0005)
            copied = time.perf_counter() - started
            if snapshot.staged.exception(60) is not None:
                time.sleep(0.5)
                continue
            taken.append(size / copied)
            # What a training step loses: save, a step of 50 ms, the fence, on the stream's clock.
            started = time.perf_counter()
            snapshot = checkpointer.save(1000 + number)
            torch.cuda._sleep(int(50e-3 * 1.7e9))
            optimizer.step()
            torch.cuda.synchronize()
            lost.append(time.perf_counter() - started)
            snapshot.staged.exception(60)
        expected = copies(model, optimizer)
        checkpointer.save(5000).wait("staged", 60)
    started = time.perf_counter()
    fresh = a_model(width, layers)
    other = torch.optim.AdamW(fresh.parameters(), lr=1e-3, fused=True)
    with Checkpointer({"model": fresh, "optim": other}, "rate", address) as checkpointer:
        restored = checkpointer.restore()
    assert restored is not None
    assert restored.step == 5000
    assert all(same_bits(a, b) for a, b in zip(expected, copies(fresh, other), strict=True))
    rate, best = statistics.median(taken), statistics.median(limit)
    print(
        f"\n{torch.cuda.get_device_name()}: {size / 1e9:.2f} GB captured at {rate / 1e9:.1f} GB/s, plain pinned copy "
        f"{best / 1e9:.1f} GB/s, ratio {rate / best:.2f}; save + 50 ms + step {statistics.median(lost) * 1e3:.0f} ms "
        f"(copy alone {size / best * 1e3:.0f} ms); restore {restored.seconds:.2f} s = "
        f"{size / restored.seconds / 1e9:.1f} GB/s"
    )
