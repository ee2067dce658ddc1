"""Which ranks run the same program, and which work on the same data: the peer sets of judgement.

A layout is given (DeviceMesh, the meta file of a recording) or inferred from the membership of communicators. Layer:
``detect``, pure. Invariants: a rank without anyone to compare with has id -1; where an axis is not understood, ranks
that differ in it are no peers: fewer peers, never wrong ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

import numpy as np
import numpy.typing as npt

from ckptd.detect.records import Communicator
from ckptd.errors import InvalidRequest

Ids = npt.NDArray[np.int64]


class Axis(Enum):
    """What ranks that differ only in this axis of a mesh share."""

    DATA = ("dp", "ddp", "fsdp", "hsdp", "replicate", "shard", "data")
    TENSOR = ("tp", "tensor", "model", "mp")
    PIPELINE = ("pp", "pipe", "pipeline", "stage")
    EXPERT = ("ep", "expert", "experts")
    CONTEXT = ("cp", "sp", "context", "sequence")
    UNKNOWN = ()


_NAMES: Final = {name: axis for axis in Axis for name in axis.value}


@dataclass(frozen=True, slots=True)
class Layout:
    """Peer sets, as an id for each rank (-1: none). ``program``: same pipeline stage, same tensor and expert index,
    other data. ``data``: same data and stage, other tensor index. ``stage``: pipeline stage of each rank. ``dims``:
    what is known of the axes, names and sizes, outermost first; ``is_inferred``: from communicators only.
    ``replica``: same data, any stage and tensor index; None when not known."""

    program: Ids
    data: Ids
    stage: Ids
    dims: tuple[tuple[str, int], ...] = ()
    is_inferred: bool = False
    replica: Ids | None = None

    @classmethod
    def from_mesh(cls, names: Sequence[str], shape: Sequence[int], ranks: Sequence[int], world_size: int) -> Layout:
        """The layout of a DeviceMesh; ``ranks`` is row-major. Ranks outside of the mesh have no peers.

        Raises InvalidRequest when names, shape, ranks and world size contradict each other.
        """
        members = np.asarray(ranks, np.int64)
        _check_mesh(names, shape, members, world_size)
        axes = axes_of(names)
        index = np.indices(tuple(shape)).reshape(len(shape), -1)

        def alike(*free: Axis) -> Ids:
            """An id for each rank of the mesh: equal where all axes but the free ones are."""
            fixed = [row for row, axis in zip(index, axes, strict=True) if axis not in free]
            return _number(fixed, members, world_size)

        stage = np.zeros(world_size, np.int64)
        for row, axis in zip(index, axes, strict=True):
            if axis is Axis.PIPELINE:
                stage[members] = row
        return cls(
            program=alike(Axis.DATA),
            data=alike(Axis.TENSOR),
            stage=stage,
            dims=tuple(zip(names, map(int, shape), strict=True)),
            replica=alike(Axis.TENSOR, Axis.PIPELINE),
        )

    @classmethod
    def from_sizes(cls, dp: int, pp: int, tp: int, order: Sequence[str] = ("pp", "dp", "tp")) -> Layout:
        """The layout of dp * pp * tp ranks, numbered with the last axis of ``order`` running fastest."""
        sizes = {"dp": dp, "pp": pp, "tp": tp}
        if sorted(order) != sorted(sizes):
            raise InvalidRequest(f"order {'-'.join(order)} does not name each of dp, pp and tp once")
        world_size = dp * pp * tp
        return cls.from_mesh(tuple(order), [sizes[name] for name in order], range(world_size), world_size)


def axes_of(names: Sequence[str]) -> list[Axis]:
    """What the dimensions of a mesh are. A name that nobody knows is the data axis if there is no other."""
    axes = [_axis(name) for name in names]
    if axes.count(Axis.UNKNOWN) == 1 and Axis.DATA not in axes:
        axes[axes.index(Axis.UNKNOWN)] = Axis.DATA
    return axes


def infer(usage: Iterable[tuple[Communicator, float, bool]], world_size: int) -> Layout:
    """The layout that communicators suggest: (communicator, operations a step, used point-to-point) each.

    Families are communicators of one shape that divide the world among them. Those used point-to-point are the
    pipeline; of the rest, when there are several, the one with most operations a step (ties: the one whose members lie
    closest) is the tensor axis and the others are data. A family that another one refines is a product of axes, and
    says nothing new. Only the world: all ranks run one program, unless they pass messages point-to-point, which may
    be a pipeline.
    """
    known = _by_members(usage)
    families = _finest(_families(known, world_size))
    pipelines = [family for family in families if family.is_point_to_point]
    others = sorted(
        (family for family in families if not family.is_point_to_point),
        key=lambda family: (-family.operations, family.stride),
    )
    alone = np.full(world_size, -1, np.int64)
    stage = pipelines[0].index if len(pipelines) == 1 else np.zeros(world_size, np.int64)
    world = known.get(tuple(range(world_size)))
    program, data = alone, alone
    if len(others) >= 2:
        # Of three families or more two are data axes of which only one is certain to be: the widest spread one.
        data, program = others[0].group, max(others[1:], key=lambda family: family.stride).group
    elif others:
        program = others[0].group
    elif world is not None and not any(is_p2p for _, is_p2p in known.values()) and world_size > 1:
        program = np.zeros(world_size, np.int64)
    dims = [("pipeline", family.size) for family in pipelines]
    dims += [("data", int((program == program[0]).sum()))] if world_size and program[0] >= 0 else []
    dims += [("tensor", others[0].size)] if len(others) >= 2 else []
    return Layout(program, data, stage, tuple(dims), is_inferred=True)


@dataclass(frozen=True, slots=True)
class _Family:
    """Communicators of one shape, each rank in exactly one. ``group`` and ``index``: which one, and where in it."""

    size: int
    stride: int
    operations: float
    is_point_to_point: bool
    group: Ids
    index: Ids


def _by_members(usage: Iterable[tuple[Communicator, float, bool]]) -> dict[tuple[int, ...], tuple[float, bool]]:
    """Operations a step and whether used point-to-point, by members: frameworks make several groups of the same."""
    known: dict[tuple[int, ...], tuple[float, bool]] = {}
    for communicator, operations, is_p2p in usage:
        members = tuple(sorted(communicator.members))
        before, was_p2p = known.get(members, (0.0, False))
        known[members] = (before + operations, was_p2p or is_p2p)
    return known


def _families(known: dict[tuple[int, ...], tuple[float, bool]], world_size: int) -> list[_Family]:
    shapes: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for members in known:
        if 1 < len(members) < world_size and members[0] >= 0 and members[-1] < world_size:
            shapes.setdefault(tuple(rank - members[0] for rank in members), []).append(members)
    families = []
    for shape, groups in shapes.items():
        if len(groups) * len(shape) != world_size or len({rank for group in groups for rank in group}) != world_size:
            continue
        group, index = np.empty(world_size, np.int64), np.empty(world_size, np.int64)
        for number, members in enumerate(sorted(groups)):
            group[list(members)], index[list(members)] = number, np.arange(len(members))
        operations = sum(known[members][0] for members in groups) / len(groups)
        is_p2p = any(known[members][1] for members in groups)
        families.append(_Family(len(shape), shape[1], operations, is_p2p, group, index))
    return families


def _finest(families: list[_Family]) -> list[_Family]:
    """Those that no other family refines."""
    return [
        family
        for family in families
        if not any(other.size < family.size and _refines(other, family) for other in families)
    ]


def _refines(fine: _Family, coarse: _Family) -> bool:
    """Whether each group of ``fine`` lies within one group of ``coarse``."""
    pairs = np.unique(np.stack([fine.group, coarse.group]), axis=1)
    return int(pairs.shape[1]) == int(fine.group.max()) + 1


def _axis(name: str) -> Axis:
    """``dp_replicate`` and ``TP2`` are understood; parts that contradict each other are not."""
    parts = [part for part in re.split(r"[^a-z]+", name.lower()) if part]
    found = {_NAMES[part] for part in parts if part in _NAMES}
    return found.pop() if len(found) == 1 else Axis.UNKNOWN


def _number(fixed: Sequence[Ids], members: Ids, world_size: int) -> Ids:
    """Ids of equal columns of ``fixed``, at the ranks ``members``; -1 elsewhere and where a column is the only one."""
    ids = np.full(world_size, -1, np.int64)
    columns = np.stack(fixed) if fixed else np.zeros((1, len(members)), np.int64)
    _, inverse, counts = np.unique(columns, axis=1, return_inverse=True, return_counts=True)
    inverse = inverse.reshape(-1)
    ids[members] = np.where(counts[inverse] > 1, inverse, -1)
    return ids


def _check_mesh(names: Sequence[str], shape: Sequence[int], members: Ids, world_size: int) -> None:
    problems: list[tuple[Callable[[], bool], str]] = [
        (lambda: len(names) != len(shape), f"{len(names)} names for {len(shape)} dimensions"),
        (lambda: min(shape, default=0) < 1, "a dimension without ranks"),
        (lambda: math.prod(shape) != len(members), f"{len(members)} ranks do not fill it"),
        (lambda: bool(members.min() < 0 or members.max() >= world_size), f"a rank outside of 0..{world_size - 1}"),
        (lambda: len(np.unique(members)) != len(members), "a rank named twice"),
    ]
    for is_wrong, what in problems:
        if is_wrong():
            raise InvalidRequest(f"mesh {tuple(names)} of shape {tuple(shape)}: {what}")
