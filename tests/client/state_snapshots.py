"""A snapshot without a daemon, for the tests of the state walk: what ``save`` takes, ``restore`` puts back."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ckptd.format.tree import decode_tree, encode_tree
from ckptd.model import Box
from ckptd_client.state import (
    DTYPE_NAMES,
    TORCH_DECODERS,
    StateWalker,
    Walk,
    encode_torch,
    plan_restore,
)


@dataclass
class Snapshot:
    data: bytes
    boxes: dict[str, Box]
    tensors: dict[str, torch.Tensor]

    @property
    def tree(self):
        return decode_tree(self.data, TORCH_DECODERS)


def keep(walk: Walk) -> Snapshot:
    boxes = {
        leaf.name: Box(
            leaf.name, DTYPE_NAMES[leaf.tensor.dtype], leaf.global_shape, leaf.offset, tuple(leaf.tensor.shape), 0
        )
        for leaf in walk.leaves
    }
    tensors = {leaf.name: leaf.tensor.detach().clone().contiguous() for leaf in walk.leaves}
    return Snapshot(encode_tree(walk.tree, encode_torch), boxes, tensors)


def save(state, fenced=None) -> Snapshot:
    return keep(StateWalker(state, fenced).walk())


def restore(state, snapshot: Snapshot) -> None:
    plan = plan_restore(state, snapshot.tree, snapshot.boxes)
    for name, box in plan.boxes.items():
        saved = snapshot.boxes[name]
        assert (box.offset, box.shape) == (saved.offset, saved.shape), name
    plan.apply(snapshot.tensors.__getitem__)


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


def assert_same(a: Snapshot, b: Snapshot) -> None:
    assert a.data == b.data
    assert a.boxes == b.boxes
    for name, tensor in a.tensors.items():
        assert bits(tensor) == bits(b.tensors[name]), name
