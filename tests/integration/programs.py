"""Small training programs in this process against a real daemon, and comparing their state bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from harness import DaemonProcess
from torch import nn

from ckptd_client import Checkpointer, Restored

RUN = "here"


def program(seed: int = 0, make: Any = torch.optim.AdamW, **options: Any) -> dict[str, Any]:
    """A model with dropout and batch norm, and an optimizer of it."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 40), nn.BatchNorm1d(40), nn.Dropout(0.3), nn.Linear(40, 4))
    return {"model": model, "optim": make(model.parameters(), **({"lr": 1e-2} | options))}


def train(state: Mapping[str, Any], steps: int = 1) -> None:
    for _ in range(steps):
        state["model"](torch.randn(8, 16)).square().sum().backward()
        state["optim"].step()
        state["optim"].zero_grad()


def checkpointer(daemon: DaemonProcess | None, state: Mapping[str, Any], **options: Any) -> Checkpointer:
    address = daemon.address if daemon else None
    return Checkpointer(state, **({"run": RUN, "daemon": address, "every": 1, "on_error": "raise"} | options))


def save(daemon: DaemonProcess, state: Mapping[str, Any], step: int = 1, level: Any = "staged", **options: Any) -> None:
    with checkpointer(daemon, state, **options) as ckpt:
        ckpt.save(step, persist=level == "durable").wait(level, 20)


def restore(daemon: DaemonProcess, state: Mapping[str, Any], source: str | None = None, **options: Any) -> Restored:
    with checkpointer(daemon, state, **options) as ckpt:
        restored = ckpt.restore(source=source)
    assert restored is not None
    return restored


def bits(value: Any) -> Any:
    """A copy that compares bit for bit: tensors as (dtype, shape, bytes)."""
    if isinstance(value, torch.Tensor):
        flat = value.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
        raw = b"" if not flat.numel() else flat.view(torch.uint8).numpy().tobytes()
        return str(value.dtype), tuple(value.shape), raw
    if isinstance(value, Mapping):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(item) for item in value]
    return bits(value.state_dict()) if hasattr(value, "state_dict") else value
