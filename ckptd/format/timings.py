"""Packed timings: what ranks send to their daemon, daemons to the analyst, and what a recording holds.

Rows are NumPy structured arrays, little-endian and packed, so that a batch is one copy on the wire. Times of a row are
of one rank's own monotonic clock: never compare them between ranks, only durations. ``docs/FORMAT.md`` gives the bytes.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ckptd.errors import InvalidRequest

Rows = npt.NDArray[np.void]

WAITS: Final = 3
POSITIONS: Final = 16


class Op(IntEnum):
    """What a c10d operation is."""

    OTHER = 0
    ALL_REDUCE = 1
    ALL_GATHER = 2
    REDUCE_SCATTER = 3
    ALL_TO_ALL = 4
    BARRIER = 5
    BROADCAST = 6
    REDUCE = 7
    GATHER = 8
    SCATTER = 9
    SEND = 10
    RECV = 11

    @property
    def label(self) -> str:
        return self.name.lower()


# All members leave such an operation together: the premise of comparing what they did between two of them.
SYNCHRONISING: Final = frozenset({Op.ALL_REDUCE, Op.ALL_GATHER, Op.REDUCE_SCATTER, Op.ALL_TO_ALL, Op.BARRIER})
ROOTED: Final = frozenset({Op.BROADCAST, Op.REDUCE, Op.GATHER, Op.SCATTER})
POINT_TO_POINT: Final = frozenset({Op.SEND, Op.RECV})


class Mask(IntFlag):
    """Why a step says nothing about hardware."""

    NONE = 0
    CHECKPOINT = 1
    EVALUATION = 2
    COMPILE = 4
    WARM_UP = 8
    # Operations of the step were dropped, or could not be seen.
    INCOMPLETE = 16


# An operation that has ended. ``communicator`` is a row of the rank's table. ``seq`` counts from 1 within the
# communicator, for point-to-point within (communicator, peer, direction), so that both ends count alike. ``peer`` is
# the global rank of the other end or of the root, else -1.
OPERATION: Final = np.dtype(
    [
        ("communicator", "<u4"),
        ("op", "u1"),
        ("peer", "<i4"),
        ("seq", "<u8"),
        ("size_bytes", "<u8"),
        ("start_ns", "<i8"),
        ("end_ns", "<i8"),
    ]
)

# A collective that a rank has entered, in the memory it shares with its daemon (``BLACK_BOX_ROWS`` of them, as a ring).
# ``ordinal`` counts from 1 over all of them; 0: the row was never written.
ENTERED: Final = np.dtype(
    [("ordinal", "<u8"), ("communicator", "<u4"), ("op", "u1"), ("seq", "<u8"), ("size_bytes", "<u8")]
)
BLACK_BOX_ROWS: Final = 1024
BLACK_BOX_BYTES: Final = BLACK_BOX_ROWS * ENTERED.itemsize

# A step mark: step ``step`` was done at ``end_ns``; it began at the mark before it.
STEP: Final = np.dtype([("step", "<i8"), ("end_ns", "<i8"), ("mask", "<u4")])

# One rank's step, reduced. ``self_s``: the length minus the union of all communication. ``waits_s``: the union of
# synchronising, rooted and point-to-point operations. ``gaps_s``: self time by position, which is the hash of what was
# before the gap and what after it, so that ranks which run the same program agree on positions.
SELF: Final = np.dtype(
    [
        ("step", "<i8"),
        ("mask", "<u4"),
        ("length_s", "<f4"),
        ("self_s", "<f4"),
        ("waits_s", "<f4", (WAITS,)),
        ("gaps_s", "<f4", (POSITIONS,)),
    ]
)

# How long one operation took on one rank; all members of the communicator sample the same ``seq``.
SAMPLE: Final = np.dtype(
    [
        ("step", "<i8"),
        ("communicator", "<u4"),
        ("op", "u1"),
        ("peer", "<i4"),
        ("seq", "<u8"),
        ("size_bytes", "<u8"),
        ("duration_s", "<f4"),
    ]
)


def pack(rows: Rows) -> bytes:
    return rows.tobytes()


def unpack(data: bytes, dtype: np.dtype[Any], what: str, most: int) -> Rows:
    """The rows of ``data``; InvalidRequest, naming ``what``, when they are none or more than ``most``."""
    if len(data) % dtype.itemsize or len(data) // dtype.itemsize > most:
        raise InvalidRequest(f"{what}: {len(data)} bytes are not up to {most} rows of {dtype.itemsize} bytes")
    return np.frombuffer(data, dtype)
