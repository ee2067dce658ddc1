"""From wished intervals to steps: time-based and automatic intervals become schedule entries. Pure.

``every="auto"`` means for now: lost time at most 1 % of training time, and a snapshot at least every 10 minutes.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from ckptd.model import Schedule, ScheduleEntry

STALL_SHARE: Final = 0.01
LONGEST_S: Final = 600.0
_NOTICE_S: Final = 2.0
_FIRST_INTERVAL: Final = {"auto": 1, "seconds": 10, "steps": 0}
_TOLERANCE: Final = 0.25
_STALLS: Final = 5
_ENOUGH_STALLS: Final = 3
_MOST_ENTRIES: Final = 64


@dataclass(frozen=True, slots=True)
class Wish:
    """A wished interval: steps (0: never), seconds, or automatic."""

    kind: Literal["steps", "seconds", "auto"]
    value: float = 0.0

    def in_steps(self, step_s: float | None, stall_s: float | None) -> int | None:
        """The interval in steps, or None while the step time is not known."""
        if self.kind == "steps":
            return int(self.value)
        if not step_s:
            return None
        if self.kind == "seconds":
            return max(1, round(self.value / step_s))
        if stall_s is None:
            return None
        affordable = math.ceil(stall_s / (STALL_SHARE * step_s))
        return max(1, min(affordable, max(1, int(LONGEST_S / step_s))))


@dataclass
class Pace:
    """What the ranks report of their steps, and the schedule that follows. The slowest rank counts."""

    every: Wish
    persist: Wish
    schedule: Schedule = field(default_factory=Schedule)
    _step_s: dict[int, float] = field(default_factory=dict)
    _stalls_s: dict[int, deque[float]] = field(default_factory=dict)
    _newest_step: int = 0

    def __post_init__(self) -> None:
        # Until the step time (and for auto, the stall of a first snapshot) is known, the schedule is a guess.
        every = self.every.in_steps(None, None)
        persist = self.persist.in_steps(None, None)
        first = _FIRST_INTERVAL[self.every.kind] if every is None else every
        self.schedule = Schedule((ScheduleEntry(0, first, first if persist is None else _multiple(persist, first)),))

    def report(self, rank: int, step: int, step_s: float, stall_s: float) -> None:
        """``rank`` is at ``step``; its steps take ``step_s`` (0: not known), a snapshot lost it ``stall_s`` (negative:
        none to report)."""
        self._newest_step = max(self._newest_step, step)
        if step_s > 0:
            self._step_s[rank] = step_s
        if stall_s >= 0:
            self._stalls_s.setdefault(rank, deque(maxlen=_STALLS)).append(stall_s)
        if self._step_s:
            self._reschedule()

    def demand(self, *, is_persisted: bool) -> int | None:
        """Have one more step due, the first that every rank hears of in time; which it is, None when a change of the
        schedule is under way. ``is_persisted``: durable too."""
        usual = self.schedule.entries[-1]
        if usual.from_step > self._newest_step or not self._step_s:
            return None
        step = self._newest_step + math.ceil(_NOTICE_S / max(self._step_s.values())) + 1
        persist = 1 if is_persisted or usual.is_persisted(step) else 0
        once = ScheduleEntry(step, 1, persist)
        extended = self.schedule.extended(once).extended(replace(usual, from_step=step + 1))
        self.schedule = Schedule(extended.entries[-_MOST_ENTRIES:])  # older ones are of steps long done
        return step

    def _reschedule(self) -> None:
        step_s = max(self._step_s.values())
        # A median: the first snapshots also wait for slots to be made, which later ones do not.
        known = [statistics.median(s) for s in self._stalls_s.values() if len(s) >= _ENOUGH_STALLS]
        stall_s = max(known, default=None)
        every = self.every.in_steps(step_s, stall_s)
        if every is None:
            return
        persist = _multiple(self.persist.in_steps(step_s, stall_s) or 0, every)
        last = self.schedule.entries[-1]
        if _close(last.every_steps, every) and _close(last.persist_steps, persist):
            return
        # Far enough ahead that every rank hears of it before it is in force.
        from_step = self._newest_step + math.ceil(_NOTICE_S / step_s) + 1
        if last.from_step > self._newest_step:
            return  # the last change is not in force yet: judge it first
        self.schedule = self.schedule.extended(ScheduleEntry(from_step, every, persist))


def _multiple(persist: int, every: int) -> int:
    """``persist`` rounded up to whole intervals: durable steps are a subset of the due ones, and 5 over 2 would else
    meet at every 10th step only."""
    return -(-persist // every) * every if every else persist


def _close(old: int, new: int) -> bool:
    return old == new or (old > 0 and new > 0 and abs(new - old) <= _TOLERANCE * old)
