"""What one start of a run tells the metrics as it goes on: levels reached, dead steps, commits. Layer: ``serve``.

Every daemon of a run counts what the coordinator's watermarks say. Invariants: what the first watermarks hold, and what
was sealed before this life of the daemon, happened before it, so it is shown and not counted, and its time is that of
the seal or not known; a level never goes back, whatever a coordinator that restarted finds again; a gap between two
steps is of this start of the run and this life of the daemon, never across a stop.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from statistics import median
from typing import Final

from ckptd.metrics import Metrics
from ckptd.restore.inventory import MEMORY
from ckptd.tiers.tier import Tier
from ckptd_api.v1 import types_pb2

LEVELS: Final = ("staged", "protected", "durable")
_GAPS: Final = 8
_ENOUGH: Final = 3  # a snapshot that was due for another reason (a slow node) must not make the interval alone


class RunMetrics:
    """See the module. ``sealed_before``: when each step was sealed that this daemon found when it started, since the
    epoch; ``clock`` gives the time since the epoch, ``monotonic`` seconds for gaps."""

    def __init__(
        self,
        metrics: Metrics,
        run: str,
        sealed_before: Mapping[int, float],
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics = metrics
        self._run = run
        self._sealed_before = dict(sealed_before)
        self._clock = clock
        self._monotonic = monotonic
        self._is_first = True
        self._last = types_pb2.Watermarks()
        self._steps: dict[str, int] = {}
        self._reached_s: dict[str, float] = {}
        self._gaps_s: dict[str, deque[float]] = {level: deque(maxlen=_GAPS) for level in LEVELS}

    def follow(self, marks: types_pb2.Watermarks) -> None:
        """The watermarks have changed. Those of a coordinator that restarted lack levels, which come back later, from
        older steps on."""
        for level in LEVELS:
            if marks.HasField(level) and getattr(marks, level) > self._steps.get(level, -1):
                self._reach(level, getattr(marks, level))
        if not self._is_first:
            dead = {outcome.step for outcome in marks.dead} - {outcome.step for outcome in self._last.dead}
            self._metrics.dead_steps_total.labels(self._run).inc(len(dead))
            self._commits("failed", len(_failed(marks) - _failed(self._last)))
        self._is_first, self._last = False, marks

    def _reach(self, level: str, step: int) -> None:
        metrics, now_s = self._metrics, self._monotonic()
        self._steps[level] = step
        metrics.snapshot_step.labels(self._run, level).set(step)
        # Of a snapshot older than this daemon's life all that is known is when it was sealed, if it is here.
        is_older = self._is_first or step in self._sealed_before
        reached_at_s = self._sealed_before.get(step, math.nan) if is_older else self._clock()
        metrics.snapshot_timestamp_seconds.labels(self._run, level).set(reached_at_s)
        if is_older:
            return
        if level in self._reached_s:
            gaps_s = self._gaps_s[level]
            gaps_s.append(now_s - self._reached_s[level])
            if len(gaps_s) >= _ENOUGH:
                metrics.snapshot_interval_seconds.labels(self._run, level).set(median(gaps_s))
        self._reached_s[level] = now_s
        self._commits("committed", level == "durable")

    def _commits(self, result: str, count: int) -> None:
        if count:
            self._metrics.commits_total.labels(self._run, result).inc(count)
            self._metrics.commit_timestamp_seconds.labels(self._run, result).set(self._clock())


def _failed(marks: types_pb2.Watermarks) -> set[int]:
    return {outcome.step for outcome in marks.not_durable if outcome.error == "DrainFailed"}


def tier_label(source: str, tiers: Iterable[Tier]) -> str:
    """The label ``tier`` of bytes that came from ``source``: a tier's URL, or somebody's memory."""
    return next((tier.spec.label for tier in tiers if tier.spec.url == source), MEMORY)
