"""One tensor of the state as a leaf: its local bytes, where they lie in the global tensor, and its fence class.

Layer: the bottom of ``ckptd_client.state``. Invariants: a leaf's ``tensor`` is plain, strided and of a dtype in
``ckptd.model.DTYPES``; it shares storage with ``outer`` (only a conjugate or negative view is resolved into a copy, and
is then REST); no collective is ever started. What cannot be a leaf is refused by name.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, NamedTuple, NoReturn

import numpy as np
import torch
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ckptd.errors import StateNotEncodable
from ckptd.model import DTYPE_CODE

DTYPE_NAMES: Final[dict[torch.dtype, str]] = {
    getattr(torch, name): name for name in DTYPE_CODE if isinstance(getattr(torch, name, None), torch.dtype)
}
TORCH_DTYPES: Final[dict[str, torch.dtype]] = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_PLAIN_TYPES: Final = (torch.Tensor, torch.nn.Parameter)


class FenceClass(Enum):
    """Who may mutate a tensor, and so until when its copy may run. Every tensor is in exactly one class."""

    OWNED = "owned"  # parameters and state of an optimizer of the state: until that optimizer's next step
    FROZEN = "frozen"  # parameters that need no gradient and have no owner: not copied again while unchanged
    DECLARED = "declared"  # listed in ``fenced``: until the user's code calls fence()
    REST = "rest"  # everything else: copied at once


@dataclass(slots=True)
class Leaf:
    """One tensor to capture.

    Attributes:
        name: fully qualified name, e.g. ``model.layers.0.weight``.
        tensor: the local plain tensor, sharing storage with ``outer``; its shape is the extent of the box.
        outer: what the program holds (Parameter, DTensor, tensor): its ``_version`` tells of mutations.
        global_shape: shape of the whole tensor, in elements.
        offset: first index of ``tensor`` in the whole, in each dimension.
        fence: see ``FenceClass``.
        optimizer: the owner of an OWNED leaf, else None.
    """

    name: str
    tensor: torch.Tensor
    outer: torch.Tensor
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    fence: FenceClass
    optimizer: Optimizer | None


@dataclass(slots=True)
class Walk:
    """What one walk found: the tensors, and everything else as a value for ``encode_tree`` (with ``TensorRef``)."""

    leaves: list[Leaf]
    tree: Any


class Place(NamedTuple):
    """The local part of a tensor and where it lies in the whole. ``is_copy``: it does not share storage."""

    local: torch.Tensor
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    is_copy: bool = False


Found = tuple[str, torch.Tensor, FenceClass, Optimizer | None]  # a leaf before its tensor is placed
# What is known of a tensor that was placed before: local shape, dtype, global shape and offset. The reference is weak,
# so that a walk keeps no memory of the user alive.
_Seen = tuple["weakref.ref[torch.Tensor]", torch.Size, torch.dtype, tuple[int, ...], tuple[int, ...]]


class LeafMaker:
    """Makes leaves and remembers where their tensors lie, so that walking again costs half a microsecond each."""

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}

    def make(self, found: Iterable[Found]) -> list[Leaf]:
        """One leaf each; StateNotEncodable, naming the first whose bytes cannot be taken."""
        leaves = []
        recall = self._seen.get
        for name, tensor, fence, optimizer in found:
            seen = recall(name)
            if seen is not None:
                ref, shape, dtype, global_shape, offset = seen
                inner = tensor._local_tensor if type(tensor) is DTensor else tensor
                if ref() is tensor and inner.shape == shape and inner.dtype is dtype:
                    local = inner if type(inner) is torch.Tensor and not inner.requires_grad else inner.detach()
                    leaves.append(Leaf(name, local, tensor, global_shape, offset, fence, optimizer))
                    continue
            leaves.append(self._make(name, tensor, fence, optimizer))
        return leaves

    def _make(self, name: str, tensor: torch.Tensor, fence: FenceClass, optimizer: Optimizer | None) -> Leaf:
        local, global_shape, offset, is_copy = place_tensor(tensor, name)
        inner = tensor._local_tensor if type(tensor) is DTensor else tensor
        # A complex or copied one is placed anew each time: its conjugate bit may have come or gone.
        if type(inner) in _PLAIN_TYPES and not is_copy and not inner.is_complex():
            self._seen[name] = weakref.ref(tensor), inner.shape, inner.dtype, global_shape, offset
        else:
            self._seen.pop(name, None)
        if is_copy:
            fence, optimizer = FenceClass.REST, None
        return Leaf(name, local, tensor, global_shape, offset, fence, optimizer)


def place_tensor(tensor: torch.Tensor, name: str) -> Place:
    """The local part of ``tensor``; StateNotEncodable, naming ``name``, when its bytes cannot be taken."""
    if is_lazy(tensor):
        _refuse(name, "is an uninitialized lazy parameter", "run one forward pass before the first save")
    if isinstance(tensor, DTensor):
        return _place_dtensor(tensor, name)
    local, is_copy = _plain(tensor, name)
    shape = tuple(local.shape)
    return Place(local, shape, (0,) * len(shape), is_copy)


def _plain(tensor: torch.Tensor, name: str) -> tuple[torch.Tensor, bool]:
    kind = type(tensor)
    if kind not in _PLAIN_TYPES and (
        hasattr(kind, "__tensor_flatten__") or kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    ):
        hint = "keep it out of `state`, or save the plain tensors that it is made of"
        _refuse(name, f"is a {kind.__module__}.{kind.__qualname__}, a wrapper whose bytes cannot be taken", hint)
    if tensor.is_nested or tensor.layout is not torch.strided:
        _refuse(name, f"has layout {'nested' if tensor.is_nested else tensor.layout}", "save a dense tensor")
    if tensor.is_quantized:
        _refuse(name, f"is quantized ({tensor.dtype})", "save its int_repr(), scale and zero point")
    if tensor.is_meta:
        _refuse(name, "is on the meta device and has no data", "materialize it (to_empty) before the first save")
    if tensor.dtype not in DTYPE_NAMES:
        _refuse(name, f"has dtype {tensor.dtype}", f"supported are {', '.join(DTYPE_CODE)}")
    local = tensor
    if tensor.requires_grad or kind is not torch.Tensor:
        local = tensor.detach()
        local = local if type(local) is torch.Tensor else local.as_subclass(torch.Tensor)
    if local.is_conj() or local.is_neg():
        return local.resolve_conj().resolve_neg(), True
    return local, False


def _refuse(name: str, reason: str, hint: str) -> NoReturn:
    raise StateNotEncodable(f"{name} {reason}", hint)


# --- DTensor ------------------------------------------------------------------------------------------------------
def _place_dtensor(tensor: DTensor, name: str) -> Place:
    mesh, shape = tensor.device_mesh, tuple(tensor.shape)
    local, is_copy = _plain(tensor._local_tensor, name)
    coordinate = mesh.get_coordinate()
    if coordinate is None:  # this rank is outside the mesh: it holds nothing of the tensor
        return Place(local.new_empty((0, *shape[1:])), shape, (0,) * len(shape), is_copy=True)
    cuts: list[list[tuple[int, int, int]]] = [[] for _ in shape]
    for mesh_dim, placement in enumerate(tensor.placements):
        if isinstance(placement, Replicate):
            continue
        dim = getattr(placement, "dim", None)
        if isinstance(placement, Partial) or not isinstance(dim, int):
            _refuse(name, f"is a DTensor placed as {placement}", "redistribute it to Shard or Replicate before saving")
        cuts[dim].append((mesh.size(mesh_dim), coordinate[mesh_dim], int(getattr(placement, "split_factor", 1))))
    extents = [shard_extent(size, cut) for size, cut in zip(shape, cuts, strict=True)]
    if None in extents or tuple(e[1] for e in extents if e is not None) != tuple(local.shape):
        _refuse(
            name,
            f"is a DTensor {shape} placed as {tensor.placements} whose local part {tuple(local.shape)} is not one box",
            "shard it evenly over the strided mesh dimensions",
        )
    return Place(local, shape, tuple(e[0] for e in extents if e is not None), is_copy)


def shard_extent(size: int, cuts: Sequence[tuple[int, int, int]]) -> tuple[int, int] | None:
    """Where one rank's part of a dimension lies, by the rules of ``torch.chunk``.

    Args:
        size: extent of the whole dimension, in elements.
        cuts: in the order of mesh dimensions, (number of chunks, index of the chunk, split factor). A split factor of
            more than 1 is that of DTensor's ``_StridedShard``: cut into so many parts first, then each into chunks.

    Returns:
        (first index, extent), or None when the part is not one run of indices.
    """
    if all(factor == 1 for _, _, factor in cuts):
        first, extent = 0, size
        for chunks, index, _ in cuts:
            step = -(-extent // chunks)
            first, extent = first + min(index * step, extent), max(0, min(step, extent - index * step))
        return first, extent
    indices = np.arange(size)
    for chunks, index, factor in cuts:
        parts = [_chunk(part, chunks, index) for part in (_chunk(indices, factor, i) for i in range(factor))]
        indices = np.concatenate(parts)
    if not len(indices):
        return 0, 0
    if int(indices[-1]) - int(indices[0]) + 1 != len(indices) or (np.diff(indices) != 1).any():
        return None
    return int(indices[0]), len(indices)


def _chunk(indices: np.ndarray[Any, Any], chunks: int, index: int) -> np.ndarray[Any, Any]:
    step = -(-len(indices) // chunks)
    return indices[index * step : (index + 1) * step]
