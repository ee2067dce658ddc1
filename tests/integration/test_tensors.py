"""Every kind of tensor through a real slot and through a real tier: the same bits come back."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from harness import DaemonProcess, Stage
from programs import bits, checkpointer, program, restore, save, train
from torch import nn

from ckptd.errors import StateNotEncodable
from ckptd_client import open_zarr


class Odd(nn.Module):
    """A parameter or buffer of every kind that a state_dict may hold."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.empty = nn.Parameter(torch.randn(0, 5))
        self.scalar = nn.Parameter(torch.randn(()))
        self.transposed = nn.Parameter(torch.randn(7, 5).t())
        self.strided = nn.Parameter(torch.randn(10, 6)[::2, 1::2])
        self.channels_last = nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
        self.large = nn.Parameter(torch.randn(700, 2500).t())  # more than one block, not one run of bytes
        self.bf16 = nn.Parameter(torch.randn(33, 3).bfloat16())
        self.fp16 = nn.Parameter(torch.randn(5).half())
        self.complex = nn.Parameter(torch.randn(9, dtype=torch.complex64))
        self.wide = nn.Parameter(torch.randn(3, dtype=torch.complex128))
        self.linear = nn.Linear(4, 4, bias=False)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.linear.weight
        for name, dtype in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)):
            self.register_buffer(name, torch.randn(17).to(dtype))
        for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
            self.register_buffer("of_" + str(dtype).partition(".")[2], torch.randint(0, 100, (6,), dtype=dtype))
        self.register_buffer("flags", torch.rand(13) > 0.5)
        self.register_buffer("expanded", torch.randn(4, 1).expand(4, 3))
        self.register_buffer("nan", torch.tensor([float("nan"), -0.0, float("inf"), 1e-42]))


@pytest.mark.parametrize("handover", ["shm", "grpc"])
@pytest.mark.parametrize("source", ["memory", "tier"])
def test_every_kind_of_tensor_comes_back_with_the_same_bits(
    tier_daemon: DaemonProcess, source: str, handover: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPTD_HANDOVER", handover)
    monkeypatch.setenv("CKPTD_TORN_CHECK", "all")
    first, second = (
        {"odd": Odd(1), "plain": {"x": torch.eye(3)[1:]}},
        {"odd": Odd(2), "plain": {"x": torch.zeros(2, 3)}},
    )
    strides = [t.stride() for t in second["odd"].state_dict().values()]
    save(tier_daemon, first, level="durable")
    restored = restore(tier_daemon, second, source=source)
    assert (restored.source == "memory") == (source == "memory")
    assert bits(second) == bits(first)
    assert [t.stride() for t in second["odd"].state_dict().values()] == strides
    assert second["odd"].tied.weight is second["odd"].linear.weight


def test_memory_and_stream_hand_over_the_same_bytes(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    state = program()
    train(state, 2)
    payloads = []
    for handover in ("shm", "grpc"):
        daemon = stage.tier_daemon()
        monkeypatch.setenv("CKPTD_HANDOVER", handover)
        torch.manual_seed(9)
        save(daemon, state, level="durable")
        arrays = [p for p in (daemon.folder / "tier").rglob("*") if p.is_file() and "/c/" in str(p)]
        payloads.append(sorted((p.parts[-3:], p.read_bytes()) for p in arrays))
    assert payloads[0] == payloads[1]
    assert payloads[0]


def test_a_checkpoint_that_a_daemon_wrote_opens_as_named_arrays(tier_daemon: DaemonProcess) -> None:
    state = program()
    train(state)
    save(tier_daemon, state, step=7, level="durable")
    found = open_zarr(tier_daemon.tiers[0].partition(",")[0], 7)
    for name, tensor in state["model"].state_dict().items():
        assert found[f"model.{name}"][...].tobytes() == tensor.numpy().tobytes()


@pytest.mark.slow
def test_a_state_of_100_000_tensors_is_saved_and_restored(stage: Stage) -> None:
    daemon = stage.daemon(memory="512MiB")

    def state(fill: float) -> dict[str, Any]:
        return {"many": [torch.full((4,), fill + n) for n in range(100_000)]}

    first, second = state(0.5), state(0.0)
    with checkpointer(daemon, first) as ckpt:
        ckpt.save(1).wait("staged", 60)
        started = time.monotonic()
        snapshot = ckpt.save(2)
        took_s = time.monotonic() - started
        snapshot.wait("staged", 60)
    assert took_s < 10
    restore(daemon, second)
    assert all(torch.equal(a, b) for a, b in zip(first["many"], second["many"], strict=True))


def test_what_cannot_be_encoded_raises_when_asked_to_and_names_the_path(daemon: DaemonProcess) -> None:
    state = {"a": {"deep": [1, object()]}, "model": nn.Linear(2, 2)}
    with checkpointer(daemon, state) as ckpt, pytest.raises(StateNotEncodable, match=r"a\.deep\[1\]"):
        ckpt.save(1)


def test_what_cannot_be_encoded_only_warns_by_default_and_later_saves_go_on(daemon: DaemonProcess) -> None:
    state: dict[str, Any] = {"a": object(), "model": nn.Linear(2, 2)}
    with checkpointer(daemon, state, on_error="warn") as ckpt:
        snapshot = ckpt.step(1)
        assert snapshot is not None
        assert "a: " in str(snapshot.skipped)
        assert isinstance(snapshot.staged.exception(0), StateNotEncodable)
        state["a"] = 3
        ckpt.save(2).wait("staged", 10)


def test_an_alias_that_became_a_tensor_of_its_own_is_saved_as_such(daemon: DaemonProcess) -> None:
    shared = torch.ones(5)
    state = {"plain": {"x": shared, "y": shared}}
    with checkpointer(daemon, state) as ckpt:
        ckpt.save(1).wait("staged", 10)
        state["plain"]["y"] = torch.full((5,), 7.0)
        ckpt.save(2).wait("staged", 10)
    fresh = {"plain": {"x": torch.zeros(5), "y": torch.zeros(5)}}
    restore(daemon, fresh)
    assert fresh["plain"]["y"].tolist() == [7.0] * 5
    assert fresh["plain"]["x"].tolist() == [1.0] * 5


def test_assigned_weights_are_saved_from_where_they_are_now(daemon: DaemonProcess) -> None:
    state = {"model": nn.Linear(4, 4)}
    with checkpointer(daemon, state) as ckpt:
        ckpt.save(1).wait("staged", 10)
        state["model"].load_state_dict({"weight": torch.eye(4), "bias": torch.arange(4.0)}, assign=True)
        ckpt.save(2).wait("staged", 10)
    fresh = {"model": nn.Linear(4, 4)}
    restore(daemon, fresh)
    assert bits(fresh) == bits(state)


def test_a_large_tensor_of_every_layout_survives_with_many_pieces(stage: Stage) -> None:
    daemon = stage.tier_daemon(memory="256MiB")
    torch.manual_seed(3)
    first = {"x": torch.randn(5_000_000), "t": torch.randn(2000, 1500).t()}
    second = {"x": torch.zeros(5_000_000), "t": torch.zeros(1500, 2000)}
    save(daemon, first, level="durable")
    for source in ("memory", "tier"):
        second["x"].zero_()
        restore(daemon, second, source=source)
        assert bits(second) == bits(first)
