"""How fast a core of this node is: a small matrix product and a copy within memory, timed on one thread.

Layer: ``serve``; NumPy. The product is of integers, which NumPy does itself: it hands those of floats to a library that
uses all cores. The thread keeps its priority and is timed by the clock on the wall: a nicer one would be timed while it
waits behind the trainers, and processor time would not see what a cgroup or a neighbour takes away. Training burdens
all nodes alike, so what stands out among them is the node.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Final

import numpy as np

from ckptd.failpoints import failpoint

_SIDE: Final = 192
_COPY_BYTES: Final = 16 << 20  # more than a core's own caches
_ENOUGH_S: Final = 0.2
_MOST: Final = 40
MOST_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class NodeSpeed:
    """Seconds of one product and of one copy, medians of several."""

    product_s: float
    copy_s: float


def measure_speed() -> NodeSpeed:
    """Takes about half a second, on a node that is not slower than any should be."""
    until_s = time.monotonic() + MOST_S
    matrix = np.arange(_SIDE * _SIDE, dtype=np.int32).reshape(_SIDE, _SIDE)
    product = np.empty_like(matrix)
    source, target = np.ones(_COPY_BYTES, np.uint8), np.empty(_COPY_BYTES, np.uint8)
    product_s = _timed(lambda: np.matmul(matrix, matrix, out=product), until_s)
    return NodeSpeed(product_s, _timed(lambda: np.copyto(target, source), until_s))


def _timed(work: Callable[[], object], until_s: float) -> float:
    """The median, after one time that counts not: memory is touched, the core awake."""
    work()
    seconds: list[float] = []
    while not seconds or (len(seconds) < _MOST and sum(seconds) < _ENOUGH_S and time.monotonic() < until_s):
        started_s = time.perf_counter()
        failpoint("probe.compute")
        work()
        seconds.append(time.perf_counter() - started_s)
    return median(seconds)
