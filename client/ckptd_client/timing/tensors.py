"""What the taps ask of tensors, on the path of every operation."""

from __future__ import annotations

from typing import Any, Final

import torch

_PLAIN: Final[dict[type, bool]] = {}


def is_plain(tensor: Any) -> bool:
    """Whether it is a tensor of memory: not fake, not functional, not being traced, not meta."""
    kind = type(tensor)
    known = _PLAIN.get(kind)
    if known is None:
        dispatch = getattr(kind, "__torch_dispatch__", None)
        known = _PLAIN[kind] = dispatch is torch.Tensor.__torch_dispatch__
    return known and not tensor.is_meta


def first_tensor(value: Any) -> Any:
    """The first tensor in ``value``; None when it has none."""
    while type(value) is list:
        if not value:
            return None
        value = value[0]
    return value


def address_of(value: Any) -> int:
    """Where the first tensor in ``value`` lies in memory; 0 when there is none."""
    tensor = first_tensor(value)
    return int(tensor.data_ptr()) if is_plain(tensor) else 0


def total_bytes(value: Any) -> int:
    return value.nbytes if type(value) is not list else sum(map(total_bytes, value))
