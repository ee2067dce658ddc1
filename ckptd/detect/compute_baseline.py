"""What each rank took when nobody was above its peers: all there is to compare with where peers are few or none.

Layer: ``detect``, pure, explicit state; about 300 steps.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from ckptd.detect.compute_scores import Flags, Values, median_of

WINDOWS: Final = 60  # of 10 steps, five apart


class Baseline:
    """Self time of the last windows of each rank, without those in which it was above its peers."""

    def __init__(self, world_size: int) -> None:
        self._ring: npt.NDArray[np.float32] = np.full((world_size, WINDOWS), np.nan, np.float32)
        self._count = 0

    def learn(self, values: Values, is_above: Flags) -> None:
        """``values``: a window's self time of each rank, in seconds."""
        self._ring[:, self._count % WINDOWS] = np.where(is_above, np.nan, values)
        self._count += 1

    def typical_s(self) -> Values:
        """The median, by rank; NaN where nothing is known."""
        return (
            median_of(self._ring[:, : min(self._count, WINDOWS)]) if self._count else np.full(len(self._ring), np.nan)
        )
