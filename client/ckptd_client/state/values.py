"""Saved values against live ones: what kind a node is, what is restored into rather than replaced, and replacing it.

Layer: inside ``ckptd_client.state``, below ``plan``. Nothing here knows of boxes.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import Any, Final

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from ckptd.errors import StateMismatch
from ckptd.format.tree import TensorRef
from ckptd_client.state.naming import is_stateful
from ckptd_client.state.walk import MODULE, OPTIMIZER, STATEFUL

KINDS: Final = {MODULE: "a module", OPTIMIZER: "an optimizer", STATEFUL: "an object with state_dict()"}
MISSING: Final = object()  # stands for a live value that is not there


def call_load(target: Any, value: Any, path: str) -> None:
    try:
        target.load_state_dict(value)
    except Exception as error:  # the user's code may raise anything: name whose it was
        raise StateMismatch(f"{path}: {type_name(target)}.load_state_dict() failed: {error}") from error


def kind_of(node: Any) -> str | None:
    """MODULE, OPTIMIZER or STATEFUL when a tree node stands for such an object."""
    if isinstance(node, dict) and len(node) == 1:
        kind = next(iter(node))
        return kind if kind in KINDS else None
    return None


def has_anchor(live: Any) -> bool:
    """Whether ``live`` holds anything that is restored into, rather than replaced."""
    if isinstance(live, (dict, list, tuple)):
        return any(map(has_anchor, live.values() if isinstance(live, dict) else live))
    return isinstance(live, (torch.Tensor, nn.Module, Optimizer)) or is_stateful(live)


def put_in_place(live: Any, saved: Any) -> Any:
    """``saved``, as the content of ``live`` when that is mutable and of the same type."""
    if type(live) is not type(saved):
        return saved
    if (
        isinstance(live, np.ndarray)
        and live.shape == saved.shape
        and live.dtype == saved.dtype
        and live.flags.writeable
    ):
        np.copyto(live, saved)
    elif isinstance(live, (set, Counter)):
        live.clear()
        live.update(saved)
    elif isinstance(live, bytearray):
        live[:] = saved
    elif isinstance(live, deque) and live.maxlen == saved.maxlen:
        live.clear()
        live.extend(saved)
    else:
        return saved
    return live


def node_name(node: Any) -> str:
    """What a tree node stands for, in words."""
    kind = kind_of(node)
    return KINDS[kind] if kind else "a tensor" if isinstance(node, TensorRef) else f"a {type(node).__name__}"


def type_name(live: Any) -> str:
    return "absent" if live is MISSING else type(live).__name__
