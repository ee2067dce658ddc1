"""From what on a rank counts as slow. Layer: ``detect``, pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

import numpy as np

WINDOWS_LEARNT: Final = 1024
_QUANTILE: Final = 0.999
_MARGIN: Final = 1.2
_PLACES: Final = 3


@dataclass(frozen=True, slots=True)
class Scale:
    """Windows of one length. ``in_a_row``: how many must agree before a rank is confirmed."""

    window_steps: int
    stride_steps: int
    in_a_row: int
    z: float
    rho: float
    few_rho: float

    @property
    def is_fast(self) -> bool:
        """Too short to leave out the odd step: each step of the window must be slow by itself."""
        return self.window_steps < 10


@dataclass(frozen=True, slots=True)
class Thresholds:
    """``z``: robust standard deviations above the peers; ``rho``: share above them. ``few_rho`` holds among 2 or 3
    peers, whose spread is unknown. The fast path needs five slow steps in a row: stalls that hit 1 % of steps do that
    once in 10^10 rank-steps, four would still be once in 10^8."""

    z: float = 6.0
    rho: float = 0.03
    few_rho: float = 0.10
    fast_z: float = 10.0
    fast_rho: float = 0.20
    # Below this share of a step nothing is told apart, however alike the peers are.
    floor_share: float = 0.003
    # Excess, against the largest in the job, from which on a rank can be confirmed at the same time.
    dominance: float = 0.5
    # Share of the window's steps that must be slower than rho / 2: not a few long stalls.
    steady_share: float = 0.5
    # Share of the compute, by position, that must be slower for a slow device.
    spread_share: float = 0.5
    spread_rho: float = 0.05
    # Share of a node's ranks that makes it a matter of the node.
    node_share: float = 0.75
    # Once half of a node's ranks are above, this is enough for the others; noise is not alike on one node.
    same_node_share: float = 0.5
    same_node_z: float = 3.0
    # CUSUM on the change of rho, a window of 10 steps at a time.
    drift_slack: float = 0.015
    drift_alarm: float = 0.10

    @property
    def scales(self) -> tuple[Scale, ...]:
        fast = Scale(3, 1, 3, self.fast_z, self.fast_rho, self.fast_rho)
        return (fast, *(Scale(steps, steps // 2, 2, self.z, self.rho, self.few_rho) for steps in (10, 40, 160)))


class Calibration:
    """The largest z of healthy windows: the threshold stays above what this job does when nothing is wrong.

    Noise moves about; what stays at one place from window to window is not noise and teaches nothing, else a rank that
    gets slower little by little would raise the threshold before itself.
    """

    def __init__(self, least: float) -> None:
        self._least = least
        self._seen: deque[float] = deque(maxlen=WINDOWS_LEARNT)
        self._places: deque[str] = deque(maxlen=_PLACES)
        self._threshold = least

    @property
    def z(self) -> float:
        return self._threshold

    def learn(self, z: float, place: str) -> None:
        """``z``: the largest of a window in which nobody was flagged; ``place``: whose it is."""
        is_elsewhere = place not in self._places
        self._places.append(place)
        if not is_elsewhere:
            return
        self._seen.append(z)
        # Sorting a thousand windows each time would cost more than the window.
        if _MARGIN * z > self._threshold or self._threshold > self._least:
            self._threshold = max(self._least, _MARGIN * float(np.quantile(self._seen, _QUANTILE)))
