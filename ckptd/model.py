"""Frozen value types of ckptd: runs, incarnations, snapshots, rosters, boxes, shard indexes, schedules.

Layer: the bottom, beside ``errors``; standard library and NumPy only, no I/O. Invariants: values are immutable and
compare by content; ``Incarnation`` orders by ordinal, ``SnapshotId`` by (ordinal, step).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from ckptd.errors import InvalidRequest

_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def check_run_name(run: str) -> str:
    """``run`` itself when it can name a run (and so a folder in a tier), else InvalidRequest."""
    if not _RUN_NAME.fullmatch(run):
        raise InvalidRequest(
            f"run name {run!r} is not valid",
            "use 1 to 128 of A-Z a-z 0-9 . _ - and start with a letter or a digit",
        )
    return run


class Incarnation(NamedTuple):
    """One start of a run. Orders by ``ordinal``; ``id`` (64 bit, random) tells two starts of one ordinal apart."""

    ordinal: int
    id: int

    def __str__(self) -> str:
        return f"{self.ordinal}-{self.id:016x}"

    @classmethod
    def parse(cls, text: str) -> Incarnation:
        """The inverse of ``str``; InvalidRequest on anything else."""
        ordinal, _, ident = text.partition("-")
        try:
            return cls(int(ordinal), int(ident, 16))
        except ValueError as error:
            raise InvalidRequest(f"{text!r} is not an incarnation (ordinal-id)") from error


class SnapshotId(NamedTuple):
    """A snapshot within a run. Newer means higher (ordinal, step)."""

    incarnation: Incarnation
    step: int

    def __str__(self) -> str:
        return f"step {self.step} of incarnation {self.incarnation}"


# --- dtypes -------------------------------------------------------------------------------------------------------
class Dtype(NamedTuple):
    """A tensor dtype: torch's name, bytes per element, and the NumPy dtype its bits are stored as in a tier."""

    name: str
    size_bytes: int
    stored: str


DTYPES: tuple[Dtype, ...] = (
    # The position is the code in shard indexes: append only.
    Dtype("float32", 4, "float32"),
    Dtype("float64", 8, "float64"),
    Dtype("float16", 2, "float16"),
    Dtype("bfloat16", 2, "uint16"),
    Dtype("int64", 8, "int64"),
    Dtype("int32", 4, "int32"),
    Dtype("int16", 2, "int16"),
    Dtype("int8", 1, "int8"),
    Dtype("uint8", 1, "uint8"),
    Dtype("bool", 1, "bool"),
    Dtype("complex64", 8, "complex64"),
    Dtype("complex128", 16, "complex128"),
    Dtype("float8_e4m3fn", 1, "uint8"),
    Dtype("float8_e5m2", 1, "uint8"),
    Dtype("float8_e4m3fnuz", 1, "uint8"),
    Dtype("float8_e5m2fnuz", 1, "uint8"),
    Dtype("float8_e8m0fnu", 1, "uint8"),
    Dtype("uint16", 2, "uint16"),
    Dtype("uint32", 4, "uint32"),
    Dtype("uint64", 8, "uint64"),
)
DTYPE_CODE: Mapping[str, int] = {dtype.name: code for code, dtype in enumerate(DTYPES)}


# --- boxes and shard indexes --------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Box:
    """A rectangular part of a named global tensor.

    Attributes:
        name: fully qualified name of the tensor in the state.
        dtype: one of ``DTYPES`` by name.
        global_shape: shape of the whole tensor, in elements; ``()`` for 0-d.
        offset: first index of the box in each dimension.
        shape: extent of the box in each dimension.
        position: byte offset of the box in its dtype's segment; its elements lie there in C order.
    """

    name: str
    dtype: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    position: int

    @property
    def size_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * DTYPES[DTYPE_CODE[self.dtype]].size_bytes


@dataclass(frozen=True)
class Segment:
    """One contiguous run of same-dtype bytes of a shard: ``size_bytes`` of it are used."""

    dtype: str
    size_bytes: int


@dataclass(frozen=True)
class ShardIndex:
    """What one rank's shard holds: boxes in columns, segments, and the non-tensor state.

    Columns because a shard may have 100,000 boxes. For box ``i``: ``names[name_ids[i]]`` is its name, ``dtypes[i]`` its
    dtype code, ``ndims[i]`` its number of dimensions ``d``; its global shape, offset and shape are the next ``3 * d``
    numbers of ``dims``; ``positions[i]`` is its byte offset in the segment of its dtype. ``tree`` is the typed JSON of
    the non-tensor state (``ckptd.format.tree``).
    """

    names: tuple[str, ...]
    name_ids: npt.NDArray[np.int32]
    dtypes: npt.NDArray[np.uint8]
    ndims: npt.NDArray[np.uint8]
    dims: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    segments: tuple[Segment, ...]
    tree: bytes = b"null"

    @classmethod
    def from_boxes(cls, boxes: Sequence[Box], segments: Sequence[Segment], tree: bytes = b"null") -> ShardIndex:
        """Columns from boxes; boxes of one name (uneven shards, aliases) share a row of the name table."""
        table: dict[str, int] = {}
        dims: list[int] = []
        for box in boxes:
            table.setdefault(box.name, len(table))
            dims += (*box.global_shape, *box.offset, *box.shape)
        return cls(
            names=tuple(table),
            name_ids=np.array([table[box.name] for box in boxes], dtype=np.int32),
            dtypes=np.array([DTYPE_CODE[box.dtype] for box in boxes], dtype=np.uint8),
            ndims=np.array([len(box.shape) for box in boxes], dtype=np.uint8),
            dims=np.array(dims, dtype=np.int64),
            positions=np.array([box.position for box in boxes], dtype=np.int64),
            segments=tuple(segments),
            tree=tree,
        )

    @cached_property
    def boxes(self) -> tuple[Box, ...]:
        """The boxes, in the order they were given."""
        ends = np.cumsum(self.ndims.astype(np.int64) * 3)
        dims, result = self.dims.tolist(), []
        for name_id, code, ndim, end, position in zip(
            self.name_ids.tolist(),
            self.dtypes.tolist(),
            self.ndims.tolist(),
            ends.tolist(),
            self.positions.tolist(),
            strict=True,
        ):
            start = end - 3 * ndim
            result.append(
                Box(
                    self.names[name_id],
                    DTYPES[code].name,
                    tuple(dims[start : start + ndim]),
                    tuple(dims[start + ndim : start + 2 * ndim]),
                    tuple(dims[start + 2 * ndim : end]),
                    position,
                )
            )
        return tuple(result)


# --- protection ---------------------------------------------------------------------------------------------------
LARGEST_GROUP: Final = 255  # nodes of a parity group: GF(2^8) has no more points


class Geometry(NamedTuple):
    """k data and m parity fragments in a stripe: any m of the k + m may be lost."""

    k: int
    m: int

    def __str__(self) -> str:
        return f"{self.k}+{self.m}"

    @classmethod
    def parse(cls, text: str) -> Geometry:
        """The inverse of ``str``; InvalidRequest on anything else, and beyond ``LARGEST_GROUP``."""
        match = re.fullmatch(r"(\d+)\+(\d+)", text)
        if match is None or int(match[1]) < 1 or not 1 <= int(match[2]) <= LARGEST_GROUP - int(match[1]):
            raise InvalidRequest(
                f"{text!r} is not k+m", f"for example 6+2; k and m from 1, their sum at most {LARGEST_GROUP}"
            )
        return cls(int(match[1]), int(match[2]))


# --- roster -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class RosterEntry:
    """One rank as the roster knows it. ``node_id`` is empty for a rank without a daemon (its due steps are dead)."""

    rank: int
    node_id: str
    address: str
    nonce: int
    domains: tuple[tuple[str, str], ...] = ()
    protect_max: str = ""
    slots: int = 0
    estimated_bytes: int = 0


@dataclass(frozen=True)
class Roster:
    """Who takes part in an incarnation: one entry a rank, ordered by rank. Placement is a pure function of it.

    ``protect`` is the wished geometry: "k+m", "auto" or "off". ``from_step`` is the first step of this version.
    """

    version: int
    incarnation_id: int
    block_bytes: int
    entries: tuple[RosterEntry, ...]
    protect: str = "off"
    from_step: int = 0

    @property
    def world_size(self) -> int:
        return len(self.entries)

    @property
    def coordinator(self) -> RosterEntry:
        """The entry whose daemon coordinates: that of rank 0."""
        return self.entries[0]

    def ranks_of(self, node_id: str) -> tuple[int, ...]:
        return tuple(entry.rank for entry in self.entries if entry.node_id == node_id)

    @cached_property
    def nodes(self) -> Mapping[str, RosterEntry]:
        """The entry of the lowest rank of each node, by node_id, in the order of those ranks; ranks without a daemon
        are on no node."""
        nodes: dict[str, RosterEntry] = {}
        for entry in self.entries:
            if entry.node_id:
                nodes.setdefault(entry.node_id, entry)
        return nodes


# --- schedule -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class ScheduleEntry:
    """From ``from_step`` on, every ``every_steps``-th step is due, and of the due ones every ``persist_steps``-th step
    is due to become durable. 0 stands for never."""

    from_step: int
    every_steps: int
    persist_steps: int

    def is_due(self, step: int) -> bool:
        return self.every_steps > 0 and step % self.every_steps == 0

    def is_persisted(self, step: int) -> bool:
        return self.persist_steps > 0 and self.is_due(step) and step % self.persist_steps == 0


@dataclass(frozen=True, slots=True)
class Schedule:
    """Which steps are due: a pure function of the step number, the same on every rank.

    The entry in force at a step is the last whose ``from_step`` is not beyond it. Entries are only ever appended, each
    with a ``from_step`` in the future, so ranks that learn of one late still agree on the past.
    """

    entries: tuple[ScheduleEntry, ...] = field(default=())

    def at(self, step: int) -> ScheduleEntry:
        in_force = ScheduleEntry(0, 0, 0)
        for entry in self.entries:
            if entry.from_step <= step:
                in_force = entry
        return in_force

    def is_due(self, step: int) -> bool:
        return self.at(step).is_due(step)

    def is_persisted(self, step: int) -> bool:
        return self.at(step).is_persisted(step)

    def extended(self, entry: ScheduleEntry) -> Schedule:
        """With ``entry`` appended; entries it overtakes before they came into force are dropped."""
        kept = tuple(old for old in self.entries if old.from_step < entry.from_step)
        return Schedule((*kept, entry))


@dataclass(frozen=True, slots=True)
class Action:
    """Something that was done about a node, ``at_s`` seconds after the epoch, for a fault of ``kind``."""

    node_id: str
    at_s: float
    kind: str
