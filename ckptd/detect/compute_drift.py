"""Ranks that get slower little by little: CUSUM on how far each is above its peers.

Layer: ``detect``, pure, explicit state. What a rank usually is above its peers is its own zero, so that devices which
differ from the start are not taken for drifting. Slack and alarm are FALCON's 1.5 % and 10 % a window of 10 steps, and
never less than 1.5 and 10 standard deviations of the peers: in a healthy job the sum stays near zero. The zero goes on
learning while the sum is zero: one of few windows is wrong by the slack for some rank of thousands, and its sum would
grow for ever.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from ckptd.detect.compute_scores import Flags, Scores, Values
from ckptd.detect.compute_thresholds import Thresholds
from ckptd.detect.layout import Ids

ZERO_WINDOWS: Final = 8
MOST_ZERO_WINDOWS: Final = 30
_SLACK_Z: Final = 1.5
_ALARM_Z: Final = 10.0
_NOW: Final = 2.0  # slacks above zero that the last window itself must be


class Drift:
    """The sums of one kind of peers; ``take`` windows that do not overlap."""

    def __init__(self, world_size: int, thresholds: Thresholds) -> None:
        self._thresholds = thresholds
        self._zero: Values = np.zeros(world_size)
        self._seen: Ids = np.zeros(world_size, np.int64)
        self._sum: Values = np.zeros(world_size)
        self._since: Ids = np.full(world_size, -1, np.int64)

    def take(self, scores: Scores, first_step: int) -> Flags:
        """The ranks whose sum is above the alarm and that are still slower than they were."""
        known = np.isfinite(scores.rho) & np.isfinite(scores.spread)
        rho, spread = np.where(known, scores.rho, 0), np.where(known, scores.spread, 0)
        is_summed = known & (self._seen >= ZERO_WINDOWS)
        slack = np.maximum(self._thresholds.drift_slack, _SLACK_Z * spread)
        alarm = np.maximum(self._thresholds.drift_alarm, _ALARM_Z * spread)
        change = rho - self._zero
        grown = np.clip(self._sum + change - slack, 0, 2 * alarm)  # bounded: it must come down after a repair
        self._since[is_summed & (self._sum == 0)] = first_step
        self._sum[is_summed] = grown[is_summed]
        is_learning = known & (self._sum == 0)
        self._seen[is_learning] = np.minimum(self._seen[is_learning] + 1, MOST_ZERO_WINDOWS)
        self._zero[is_learning] += change[is_learning] / self._seen[is_learning]
        return np.asarray(is_summed & (self._sum > alarm) & (change > _NOW * slack))

    def since(self, rank: int) -> int:
        """The first step of the window in which the sum last left zero."""
        return int(self._since[rank])
