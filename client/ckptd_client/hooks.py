"""Fences attached to optimizers: before each step, the optimizer waits for the copy of its own tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

Fence = Callable[[torch.optim.Optimizer | None], None]


class OptimizerHooks:
    """``fence`` as a step pre-hook of optimizers; ``detach`` removes all of them.

    The hook is kept out of compiled graphs (a compiled ``step`` breaks its graph there): it waits and takes locks.
    """

    def __init__(self, fence: Fence) -> None:
        self._handles: dict[int, Any] = {}

        def before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            fence(optimizer)

        self._hook = torch.compiler.disable(before_step)  # type: ignore[no-untyped-call]

    def attach(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Hook the optimizers that are not hooked yet."""
        for optimizer in optimizers:
            if id(optimizer) not in self._handles:
                self._handles[id(optimizer)] = optimizer.register_step_pre_hook(self._hook)

    def detach(self) -> None:
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
