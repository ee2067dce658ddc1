"""The capture plan: where every tensor of the state goes in the slot, and the pieces in which it is copied.

A plan is made once and kept while its key holds: (name, address, shape, strides, dtype, fence class, owner) of every
leaf. It is rebuilt when the state changes its form: optimizer state that appears with the first step, a parameter group
added, ``load_state_dict(assign=True)``. Within a segment, what is fenced first comes first, so that the copy reaches it
first.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from ckptd.format.blocks import BOX_ALIGN_BYTES, align
from ckptd.format.index import encode_columns
from ckptd.model import DTYPE_CODE, Box, Segment, ShardIndex
from ckptd_client.state import DTYPE_NAMES, FenceClass, Leaf

PIECE_BYTES: Final = 16 * 1024 * 1024
BATCH_BYTES: Final = 4 * 1024 * 1024
BATCH_ITEMS: Final = 2048
_ORDER: Final = {FenceClass.OWNED: 0, FenceClass.DECLARED: 1, FenceClass.FROZEN: 2, FenceClass.REST: 3}


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor to copy: leaf number ``leaf`` to byte ``position`` of segment ``segment``."""

    leaf: int
    segment: int
    position: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A unit of copying: whole items, or bytes ``start`` to ``stop`` of a single large one. ``group`` fences it."""

    group: int
    items: tuple[Item, ...]
    start: int
    stop: int


@dataclass(slots=True)
class Group:
    """Tensors that one fence guards: those of one optimizer, the declared, the frozen, or the rest."""

    fence: FenceClass
    optimizer: torch.optim.Optimizer | None
    leaves: list[int] = field(default_factory=list)


class Plan:
    """Made from the leaves of one walk; pieces are in payload order. Positions are relative to their segment."""

    def __init__(self, leaves: Sequence[Leaf]) -> None:
        self.key = plan_key(leaves)
        self.groups: list[Group] = []
        group_of = self._group(leaves)
        items, boxes, self.segments = _place(leaves, group_of)
        self.pieces = _cut(items, leaves, group_of)
        self.lazy = [(n, item) for item in items if self.groups[n := group_of[item.leaf]].fence is not FenceClass.REST]
        self.columns = encode_columns(ShardIndex.from_boxes(boxes, self.segments))
        self.size_bytes = sum(segment.size_bytes for segment in self.segments)

    def _group(self, leaves: Sequence[Leaf]) -> list[int]:
        """The group of every leaf; groups are ordered by fence class, optimizers by first appearance."""
        first_seen: dict[tuple[FenceClass, int], int] = {}
        for number, leaf in enumerate(leaves):
            first_seen.setdefault(_group_key(leaf), number)
        ordered = sorted(first_seen, key=lambda key: (_ORDER[key[0]], first_seen[key]))
        number_of = {key: number for number, key in enumerate(ordered)}
        self.groups = [Group(key[0], leaves[first_seen[key]].optimizer) for key in ordered]
        result = []
        for number, leaf in enumerate(leaves):
            group = number_of[_group_key(leaf)]
            self.groups[group].leaves.append(number)
            result.append(group)
        return result


def plan_key(leaves: Sequence[Leaf]) -> Hashable:
    """What a plan depends on."""
    addresses = [leaf.tensor.data_ptr() for leaf in leaves]
    first_at = dict(zip(reversed(addresses), reversed(range(len(addresses))), strict=True))
    return tuple(
        (leaf.name, address, t.shape, t.stride(), t.dtype, leaf.fence, id(leaf.optimizer))
        if leaf.fence is not FenceClass.REST
        # The rest is cloned at every save: its address does not matter, but whose alias it is does.
        else (leaf.name, first_at[address], t.shape, t.stride(), t.dtype, t.device)
        for leaf, t, address in ((leaf, leaf.tensor, address) for leaf, address in zip(leaves, addresses, strict=True))
    )


def _group_key(leaf: Leaf) -> tuple[FenceClass, int]:
    return leaf.fence, id(leaf.optimizer) if leaf.fence is FenceClass.OWNED else 0


def _place(leaves: Sequence[Leaf], group_of: Sequence[int]) -> tuple[list[Item], list[Box], tuple[Segment, ...]]:
    """Items in payload order, a box for every leaf (aliases share a position), and the segments."""
    names = sorted({DTYPE_NAMES[leaf.tensor.dtype] for leaf in leaves}, key=DTYPE_CODE.__getitem__)
    segment_of = {name: number for number, name in enumerate(names)}
    ends = [0] * len(names)
    items: list[Item] = []
    position_of: list[int] = [0] * len(leaves)
    seen: dict[Any, int] = {}
    order = sorted(
        range(len(leaves)),
        key=lambda n: (segment_of[DTYPE_NAMES[leaves[n].tensor.dtype]], group_of[n], str(leaves[n].tensor.device), n),
    )
    for number in order:
        tensor = leaves[number].tensor
        segment = segment_of[DTYPE_NAMES[tensor.dtype]]
        size_bytes = tensor.numel() * tensor.element_size()
        alias = _alias_key(leaves[number])
        if size_bytes == 0 or alias in seen:
            position_of[number] = seen.get(alias, 0)
            continue
        position = seen[alias] = position_of[number] = ends[segment]
        items.append(Item(number, segment, position, size_bytes))
        ends[segment] = align(position + size_bytes, BOX_ALIGN_BYTES)
    boxes = [
        Box(leaf.name, DTYPE_NAMES[leaf.tensor.dtype], leaf.global_shape, leaf.offset, tuple(leaf.tensor.shape), at)
        for leaf, at in zip(leaves, position_of, strict=True)
    ]
    segments = tuple(Segment(name, end) for name, end in zip(names, ends, strict=True))
    return items, boxes, segments


def _alias_key(leaf: Leaf) -> Hashable:
    """Equal for leaves that hold the same elements (tied weights); the conjugate of a tensor is not the tensor."""
    t = leaf.tensor
    return t.data_ptr(), t.dtype, t.shape, t.stride(), t.device, t.is_conj(), t.is_neg()


def _cut(items: Sequence[Item], leaves: Sequence[Leaf], group_of: Sequence[int]) -> list[Piece]:
    """Large items alone and in parts, small neighbours of one group, segment and device together."""
    pieces: list[Piece] = []

    def place(item: Item) -> tuple[int, int, torch.device]:
        return group_of[item.leaf], item.segment, leaves[item.leaf].tensor.device

    for (group, _, _), run in itertools.groupby(items, key=place):
        batch: list[Item] = []
        batch_bytes = 0
        for item in run:
            is_large = item.size_bytes >= BATCH_BYTES
            if batch and (is_large or batch_bytes >= BATCH_BYTES or len(batch) >= BATCH_ITEMS):
                pieces.append(Piece(group, tuple(batch), 0, batch_bytes))
                batch, batch_bytes = [], 0
            if is_large:
                pieces += [
                    Piece(group, (item,), start, min(start + PIECE_BYTES, item.size_bytes))
                    for start in range(0, item.size_bytes, PIECE_BYTES)
                ]
            else:
                batch.append(item)
                batch_bytes += item.size_bytes
        if batch:
            pieces.append(Piece(group, tuple(batch), 0, batch_bytes))
    return pieces
