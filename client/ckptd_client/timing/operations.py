"""The c10d operations: what each is, and where in its arguments are the group, the input, the peer.

Layer: inside ``ckptd_client.timing``; a table. Positions are those of the schemas of torch 2.11 to 2.13, by which the
boxed arguments come; ``missing`` names the operations whose schema is another one, or that torch has and this table has
not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch

from ckptd.format.timings import Op

# Answers no operation but a check of values.
_NOT_COMMUNICATION: Final = frozenset({"check_for_nan"})


@dataclass(frozen=True, slots=True)
class Spec:
    """``source``: the argument that tells the bytes: the input, except for scatter, where only the root has one.
    ``peer``: the argument that is the rank, in the group, of the other end or of the root; -1 none. ``is_async``: the
    argument ``async_op``; -1 none. ``is_in_place``: outputs are the inputs."""

    op: Op
    source: int
    group: int
    peer: int = -1
    is_async: int = -1
    is_in_place: bool = False


SPECS: Final = {
    "allreduce_": Spec(Op.ALL_REDUCE, 0, 1, is_async=4, is_in_place=True),
    "allreduce_coalesced_": Spec(Op.ALL_REDUCE, 0, 1, is_async=3, is_in_place=True),
    "broadcast_": Spec(Op.BROADCAST, 0, 1, peer=2, is_async=4, is_in_place=True),
    "reduce_": Spec(Op.REDUCE, 0, 1, peer=3, is_async=5, is_in_place=True),
    "barrier": Spec(Op.BARRIER, 0, 1, is_async=3),
    "monitored_barrier_": Spec(Op.BARRIER, 0, 1),
    "allgather_": Spec(Op.ALL_GATHER, 1, 2, is_async=3),
    "_allgather_base_": Spec(Op.ALL_GATHER, 1, 2, is_async=3),
    "allgather_coalesced_": Spec(Op.ALL_GATHER, 1, 2, is_async=3),
    "allgather_into_tensor_coalesced_": Spec(Op.ALL_GATHER, 1, 2, is_async=3),
    "reduce_scatter_": Spec(Op.REDUCE_SCATTER, 1, 2, is_async=4),
    "_reduce_scatter_base_": Spec(Op.REDUCE_SCATTER, 1, 2, is_async=4),
    "reduce_scatter_tensor_coalesced_": Spec(Op.REDUCE_SCATTER, 1, 2, is_async=4),
    "alltoall_": Spec(Op.ALL_TO_ALL, 1, 2, is_async=3),
    "alltoall_base_": Spec(Op.ALL_TO_ALL, 1, 2, is_async=5),
    "gather_": Spec(Op.GATHER, 1, 2, peer=3, is_async=4),
    "scatter_": Spec(Op.SCATTER, 0, 2, peer=3, is_async=4),
    "send": Spec(Op.SEND, 0, 1, peer=2),
    "recv_": Spec(Op.RECV, 0, 1, peer=2),
    "recv_any_source_": Spec(Op.RECV, 0, 1),
}


def usable() -> dict[str, Spec]:
    """The operations of this torch whose schema is as ``SPECS`` says."""
    return {name: spec for name, spec in SPECS.items() if _is_as_described(name, spec)}


def missing() -> list[str]:
    """Operations of this torch that cannot be recorded."""
    names = {full.removeprefix("c10d::") for full in _schemas()}
    return sorted(names - set(usable()) - _NOT_COMMUNICATION)


def _schemas() -> list[str]:
    names: list[str] = torch._C._dispatch_get_all_op_names()
    return [name for name in names if name.startswith("c10d::") and "." not in name]


def _is_as_described(name: str, spec: Spec) -> bool:
    if f"c10d::{name}" not in _schemas():
        return False
    arguments: list[Any] = getattr(torch.ops.c10d, name).default._schema.arguments
    names = dict(enumerate(argument.name for argument in arguments))
    return (
        "ProcessGroup" in str(arguments[spec.group].type)
        and "Tensor" in str(arguments[spec.source].type)
        and (spec.peer < 0 or names.get(spec.peer) in ("root_rank", "dst", "src"))
        and (spec.is_async < 0 or names.get(spec.is_async) == "async_op")
    )
