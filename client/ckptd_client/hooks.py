"""Fences attached to optimizers: before each step, the optimizer waits for the copy of its own tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

Fence = Callable[[torch.optim.Optimizer | None], None]


class OptimizerHooks:
    """Registers ``fence`` as a step pre-hook of every optimizer; ``detach`` removes all of them.

    The hook is kept out of compiled graphs (a compiled ``step`` breaks its graph there): it waits and takes locks.
    """

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer], fence: Fence) -> None:
        self._handles: list[Any] = []
        fence = torch.compiler.disable(fence)  # type: ignore[no-untyped-call]

        def before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            fence(optimizer)

        for optimizer in optimizers:
            hook = torch.compiler.disable(before_step)  # type: ignore[no-untyped-call]
            self._handles.append(optimizer.register_step_pre_hook(hook))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
