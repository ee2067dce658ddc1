"""Where in a step time passed: a gap between two operations, named alike on all ranks of a program. Pure.

A position is a CRC-32 of the names of the operations around the gap, so that it needs no table shared between ranks.
"""

from __future__ import annotations

import zlib
from typing import Final

import numpy as np
import numpy.typing as npt

from ckptd.detect.signature import MOST_SIGNATURES, Ids
from ckptd.format.timings import POSITIONS

BOUNDARY: Final = "step"
_NAMES_OF_ONE: Final = 2
_MOST_NAMES: Final = 1 << 12


def position(name: str) -> int:
    """The position of what is called ``name``, on every rank and in every process."""
    return zlib.crc32(name.encode()) % POSITIONS


class Positions:
    """Adds gaps up by position, and remembers what the positions are."""

    def __init__(self) -> None:
        self._of_pair: dict[int, int] = {}
        self._seconds: dict[int, float] = {}

    def add(
        self, gaps_s: npt.NDArray[np.float64], before: Ids, after: Ids, names: list[str]
    ) -> npt.NDArray[np.float64]:
        """Seconds by position (POSITIONS,) of gaps (n,) between ids ``before`` and ``after``, indices into ``names``;
        -1 is the boundary of the step."""
        pairs, inverse = np.unique((before + 1) * (MOST_SIGNATURES + 1) + after + 1, return_inverse=True)
        seconds = np.bincount(inverse, gaps_s, len(pairs))
        places = np.zeros(len(pairs), np.int64)
        for at, pair in enumerate(pairs.tolist()):
            places[at] = self._place(pair, names)
            if pair in self._seconds or len(self._seconds) < _MOST_NAMES:
                self._seconds[pair] = self._seconds.get(pair, 0.0) + float(seconds[at])
        return np.bincount(places, seconds, POSITIONS).astype(np.float64)

    def names(self, names: list[str]) -> tuple[str, ...]:
        """What each position is, the longest first."""
        found: list[list[str]] = [[] for _ in range(POSITIONS)]
        for pair in sorted(self._seconds, key=lambda p: -self._seconds[p]):
            found[self._place(pair, names)].append(_name(pair, names))
        return tuple(" | ".join(texts[:_NAMES_OF_ONE]) for texts in found)

    def _place(self, pair: int, names: list[str]) -> int:
        place = self._of_pair.get(pair)
        if place is None:
            if len(self._of_pair) >= _MOST_NAMES:
                self._of_pair.clear()
            place = self._of_pair[pair] = position(_name(pair, names))
        return place


def _name(pair: int, names: list[str]) -> str:
    before, after = divmod(pair, MOST_SIGNATURES + 1)
    texts = [BOUNDARY, *names]
    return f"{texts[before]} -> {texts[after]}"
