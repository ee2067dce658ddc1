"""torch's own small values in the typed JSON tree: dtype, device, Size, layout and memory format, by name.

Use as ``encode_tree(tree, encode_torch)`` and ``decode_tree(data, TORCH_DECODERS)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch

_NAMED: Final = (
    (torch.dtype, "torch.dtype"),
    (torch.layout, "torch.layout"),
    (torch.memory_format, "torch.memory_format"),
)


def encode_torch(value: Any) -> tuple[str, Any] | None:
    """(tag, payload) of a value that only torch knows, or None."""
    if isinstance(value, torch.Size):
        return "torch.Size", list(value)
    if isinstance(value, torch.device):
        return "torch.device", str(value)
    for kind, tag in _NAMED:
        if isinstance(value, kind):
            return tag, str(value).removeprefix("torch.")
    return None


def _named(kind: type) -> Callable[[Any], Any]:
    def build(name: Any) -> Any:
        value = getattr(torch, name)
        if not isinstance(value, kind):
            raise TypeError(f"torch.{name} is not a {kind.__name__}")
        return value

    return build


TORCH_DECODERS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    **{tag: _named(kind) for kind, tag in _NAMED},
}
