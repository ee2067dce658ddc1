"""What judgement works on, and what it finds.

Two kinds of input: ``Timings``, the reduced steps and sampled operations of every rank over the last steps, which
tell what is slow; and ``RankState``, what a rank is in the middle of at one moment, which tells what hangs. Ranks are
global.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from ckptd.format.timings import Op, Rows


class Kind(StrEnum):
    SLOW_COMPUTE = "slow_compute"
    SLOW_LINK = "slow_link"
    SLOW_COMM = "slow_comm"
    HANG = "hang"
    COMM_HANG = "comm_hang"
    DESYNC = "desync"
    DEATH = "death"


class Confidence(StrEnum):
    """Suspect: seen once, or on weak ground. Confirmed: seen in two windows in a row, or beyond doubt by its kind.
    Verified: a test between the nodes, or the operating system, said so."""

    SUSPECT = "suspect"
    CONFIRMED = "confirmed"
    VERIFIED = "verified"


@dataclass(frozen=True, slots=True)
class Fault:
    """A verdict. ``ranks`` and ``nodes`` are roots only, sorted; victims never. ``since_step``: the first step of the
    window in which it was first seen, for a hang the step that does not end; -1 unknown. ``evidence``: what a person
    can check, JSON values only, with units in the names; its ``summary`` is one sentence."""

    kind: Kind
    ranks: tuple[int, ...]
    nodes: tuple[str, ...] = ()
    confidence: Confidence = Confidence.SUSPECT
    since_step: int = -1
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Communicator:
    """A process group. ``id`` is the same on all members and differs between a group and one made again with the same
    members. ``members``: global ranks, in group order. ``label``: a mesh dimension, the group's description or ""."""

    id: str
    members: tuple[int, ...]
    label: str = ""


@dataclass(frozen=True, slots=True)
class Pending:
    """An operation that was entered and has not ended. ``seq`` as in OPERATION; ``peer``: global rank or -1."""

    communicator: str
    seq: int
    op: Op
    size_bytes: int
    peer: int = -1
    for_s: float = 0.0
    where: str = ""  # call site, when known


@dataclass(frozen=True, slots=True)
class Count:
    """How far a rank is in one communicator: operations entered and ended, collectives only."""

    enqueued: int
    completed: int


@dataclass(frozen=True, slots=True)
class RankState:
    """What a rank is in the middle of. ``counts`` and ``pending`` are of its last heartbeat, ``silent_s`` ago.
    ``is_dead``: its process is gone, or its control stream closed without a goodbye. ``signatures``: by communicator
    and seq, (operation, bytes) of recent operations, to compare what members entered under the same number. ``step``:
    the last it finished, -1 unknown."""

    rank: int
    node: str = ""
    counts: Mapping[str, Count] = field(default_factory=dict)
    pending: tuple[Pending, ...] = ()
    signatures: Mapping[tuple[str, int], tuple[Op, int]] = field(default_factory=dict)
    silent_s: float = 0.0
    is_dead: bool = False
    has_left: bool = False
    step: int = -1
    stack: str = ""
    gone_s: float | None = None  # when it was found gone, in the judge's seconds
    error: str = ""  # it left with this exception
    signal: int = 0  # that ended its process, when it is known
    mask: int = 0  # ckptd.format.timings.Mask in force
    is_moving: bool = False  # it waits, if at all, beside what it goes on with


@dataclass(frozen=True, slots=True)
class Timings:
    """Steps and samples of all ranks. ``steps[rank]``: SELF rows by rising step; ``samples[rank]``: SAMPLE rows, whose
    communicators are rows of ``tables[rank]``. A rank that sent nothing has no key."""

    world_size: int
    nodes: tuple[str, ...]  # of each rank, "" unknown
    steps: Mapping[int, Rows] = field(default_factory=dict)
    samples: Mapping[int, Rows] = field(default_factory=dict)
    tables: Mapping[int, Mapping[int, Communicator]] = field(default_factory=dict)
