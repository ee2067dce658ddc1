"""The last steps of all ranks, as matrices: what judgement of compute looks at.

Layer: ``detect``, pure. Invariants: memory is fixed at construction (one block of float32: 84 bytes a rank and step);
a rank's row may come late, twice or never; a step is judged once nearly all ranks that still report have it, and most
of them unmasked. Steps count as recorded: a recording that holds every tenth step is as good as one that holds all. A
program may count anew, and then all is forgotten; what most ranks have reached decides, no single rank does.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from ckptd.detect.layout import Ids
from ckptd.errors import InvalidRequest
from ckptd.format.timings import POSITIONS, SELF, WAITS, Mask, Rows

Matrix = npt.NDArray[np.float32]
Masks = npt.NDArray[np.uint32]

# A step is complete when this share of the live ranks has reported it; the rest may hang or be late.
COMPLETE: Final = 0.98
# A step of which more than this share is masked says nothing of any rank.
UNMASKED: Final = 0.5
# A rank without a row in this many newest steps is no longer waited for.
LIVE_STEPS: Final = 32
READY_STEPS: Final = 3
# A rank that is so many held steps behind with what it sent last is late or counts anew; where most are, they do that.
ANEW_STEPS: Final = 32
_ABSENT: Final = np.uint32(1 << 31)
_LENGTH, _SELF, _FIRST_WAIT, _FIRST_GAP = 0, 1, 2, 2 + WAITS
# A SELF row with its times as one array: one copy a batch instead of one a field.
_ROW: Final = np.dtype([("step", "<i8"), ("mask", "<u4"), ("times", "<f4", (_FIRST_GAP + POSITIONS,))])


class History:
    """The newest ``capacity_steps`` steps of ``world_size`` ranks."""

    def __init__(self, world_size: int, capacity_steps: int = 192) -> None:
        if world_size < 1 or capacity_steps < 1:
            raise InvalidRequest(f"a history of {world_size} ranks and {capacity_steps} steps holds nothing")
        self.world_size = world_size
        self.capacity_steps = capacity_steps
        # Ranks before steps: a window of one rank is contiguous, which is what sorting wants.
        self._values = np.zeros((_FIRST_GAP + POSITIONS, world_size, capacity_steps), np.float32)
        self._masks = np.full((world_size, capacity_steps), _ABSENT, np.uint32)
        self._columns: dict[int, int] = {}  # by step
        self._present = np.zeros(capacity_steps, np.int64)
        self._clean = np.zeros(capacity_steps, np.int64)
        self._held: Ids = np.zeros(0, np.int64)  # the steps of the columns, rising
        self._newest = np.full(world_size, -1, np.int64)  # step, by rank
        self._sent = np.full(world_size, -1, np.int64)  # step of the last row, whether it was kept or not
        self._is_behind = np.zeros(world_size, np.bool_)
        self._limit = -1  # steps beyond it are not kept; as it was when it was last looked at
        # Counts how often all was forgotten because steps count anew.
        self.generation = 0

    def put(self, rank: int | Ids, rows: Rows) -> None:
        """Takes SELF rows of one rank, or of ``rank[i]`` each. What is older than all that is held is dropped.

        Times that are no times count as an incomplete step. Raises InvalidRequest for a rank outside of the world.
        """
        rows = rows.view(_ROW)
        ranks = np.broadcast_to(np.asarray(rank, np.int64), (len(rows),))
        if len(rows) and (ranks.min() < 0 or ranks.max() >= self.world_size):
            raise InvalidRequest(f"rank {ranks.min()} or {ranks.max()} is not one of {self.world_size}")
        if not len(rows):
            return
        if (ranks[0] == ranks).all():
            # What a rank sent before it began anew is over.
            rows = rows[_fell_at(rows["step"]) :]
            ranks = ranks[: len(rows)]
        if self._note(ranks, rows["step"]) and 2 * int(self._is_behind.sum()) > int((self._sent >= 0).sum()):
            self._begin_anew()
        steps = rows["step"].tolist()
        for step in sorted(set(steps)):
            if not self._is_beyond(step):
                self._make_room(step)
        # Looked up when all have come: one may have pushed out another.
        columns = np.array([self._columns.get(step, -1) for step in steps], np.int64)
        kept = columns >= 0
        if kept.any():
            self._write(ranks[kept], columns[kept], rows[kept])

    def held_steps(self) -> Ids:
        """All steps that are held, rising, whether they can be judged or not."""
        return self._held.copy()

    def judged_steps(self) -> Ids:
        """The steps, rising, that can be judged: not newer than the newest complete one, not mostly masked."""
        if not self._columns:
            return np.zeros(0, np.int64)
        steps = self.held_steps()
        columns = self._columns_of(steps)
        live = int((self._newest >= steps[max(0, len(steps) - LIVE_STEPS)]).sum())
        complete = np.flatnonzero(self._present[columns] >= max(1, np.ceil(COMPLETE * live)))
        if not len(complete):
            return np.zeros(0, np.int64)
        until = complete[-1] + 1
        judged: Ids = steps[:until][self._clean[columns[:until]] >= max(1, np.ceil(UNMASKED * live))]
        return judged

    @property
    def is_ready(self) -> bool:
        """Whether there are steps to judge."""
        return len(self.judged_steps()) >= READY_STEPS

    @property
    def step_p99_s(self) -> float:
        """99 % of the steps held, masked or not, were no longer, in seconds; 0 without any."""
        columns = self._columns_of(self.held_steps())
        lengths = self._values[_LENGTH][:, columns][self._masks[:, columns] != _ABSENT]
        return float(np.percentile(lengths, 99)) if lengths.size else 0.0

    def rows(self, rank: int) -> Rows:
        """What is held of ``rank``, as SELF rows by rising step."""
        steps = self.held_steps()
        columns = self._columns_of(steps)
        there = self._masks[rank, columns] != _ABSENT
        rows = np.zeros(int(there.sum()), SELF)
        values = self._values[:, rank, columns[there]]
        rows["step"], rows["mask"] = steps[there], self._masks[rank, columns[there]]
        rows["self_s"], rows["length_s"] = values[_SELF], values[_LENGTH]
        rows["waits_s"], rows["gaps_s"] = values[_FIRST_WAIT:_FIRST_GAP].T, values[_FIRST_GAP:].T
        return rows

    def self_s(self, steps: Ids, ranks: Ids | None = None) -> Matrix:
        """Self time, ranks x steps; NaN where masked or absent."""
        return self._without_masked(_SELF, steps, ranks)

    def length_s(self, steps: Ids, ranks: Ids | None = None) -> Matrix:
        """Length of steps, ranks x steps; NaN where masked or absent."""
        return self._without_masked(_LENGTH, steps, ranks)

    def waits_s(self, steps: Ids, ranks: Ids) -> Matrix:
        """Time in synchronising, rooted and point-to-point operations, 3 x ranks x steps; NaN as above."""
        return np.stack([self._without_masked(_FIRST_WAIT + kind, steps, ranks) for kind in range(WAITS)])

    def gaps_s(self, steps: Ids, ranks: Ids) -> Matrix:
        """Self time by position, positions x ranks x steps; NaN as above."""
        return np.stack([self._without_masked(_FIRST_GAP + at, steps, ranks) for at in range(POSITIONS)])

    def masks(self, steps: Ids) -> Masks:
        """``Mask`` bits, ranks x steps; INCOMPLETE where absent."""
        masks = self._masks[:, self._columns_of(steps)]
        masks[masks == _ABSENT] = Mask.INCOMPLETE
        return masks

    def _note(self, ranks: Ids, steps: Ids) -> bool:
        """How far ranks are, by the last row of each; whether one of them is behind."""
        if len(ranks) > 1 and (ranks[0] != ranks).any():
            ranks, last = np.unique(ranks[::-1], return_index=True)
            steps = steps[::-1][last]
        else:
            ranks, steps = ranks[-1:], steps[-1:]
        self._sent[ranks] = steps
        is_behind = (len(self._held) - np.searchsorted(self._held, steps, "right") >= ANEW_STEPS) & (steps >= 0)
        self._is_behind[ranks] = is_behind
        return bool(is_behind.any())

    def _begin_anew(self) -> None:
        """Forgets all steps, and how far the ranks are that have not begun anew."""
        self._masks[:] = _ABSENT
        self._present[:] = self._clean[:] = 0
        self._newest[:] = -1
        self._sent[~self._is_behind] = -1
        self._is_behind[:] = False
        self._columns.clear()
        self._held, self._limit = self._held[:0], -1
        self.generation += 1

    def _is_beyond(self, step: int) -> bool:
        """Whether ``step`` would push out what half of the ranks may still send: more than ``capacity_steps`` steps, as
        they are recorded, after what these have reached."""
        if step <= self._limit or len(self._held) < READY_STEPS:
            return False
        known = np.sort(self._sent[self._sent >= 0])
        # Not the median: a few steps of a rank that counts otherwise may be held.
        apart = max(1, int(np.quantile(np.diff(self._held), 0.25, method="lower")))
        self._limit = int(known[(len(known) - 1) // 2]) + self.capacity_steps * apart
        return step > self._limit

    def _make_room(self, step: int) -> None:
        """Gives a step its column, in place of the oldest when all are taken, unless it is older than that."""
        if step in self._columns or step < 0:
            return
        column = len(self._columns)
        if column == self.capacity_steps:
            oldest = int(self._held[0])
            if step < oldest:
                return
            column = self._columns.pop(oldest)
            self._held = self._held[1:]
            self._masks[:, column] = _ABSENT
            self._present[column] = self._clean[column] = 0
        self._columns[step] = column
        self._held = np.insert(self._held, np.searchsorted(self._held, step), step)

    def _write(self, ranks: Ids, columns: Ids, rows: Rows) -> None:
        if len(rows) > 1:
            # Of rows for the same rank and step the last counts.
            _, last = np.unique((ranks * self.capacity_steps + columns)[::-1], return_index=True)
            last = len(rows) - 1 - last
            ranks, columns, rows = ranks[last], columns[last], rows[last]
        times = rows["times"]
        is_time = ((times >= 0) & (times < np.inf)).all(axis=1)
        masks = np.where(is_time, rows["mask"] & ~_ABSENT, np.uint32(Mask.INCOMPLETE))
        before = self._masks[ranks, columns]
        np.add.at(self._present, columns, before == _ABSENT)
        np.add.at(self._clean, columns, (masks == 0).astype(np.int64) - (before == 0))
        self._masks[ranks, columns] = masks
        self._values[:, ranks, columns] = times.T
        np.maximum.at(self._newest, ranks, rows["step"])

    def _columns_of(self, steps: Ids) -> Ids:
        return np.array([self._columns[int(step)] for step in steps], np.int64)

    def _without_masked(self, field: int, steps: Ids, ranks: Ids | None) -> Matrix:
        columns = self._columns_of(steps)
        rows = slice(None) if ranks is None else ranks[:, None]
        values: Matrix = self._values[field][rows, columns]
        if (self._clean[columns] < self.world_size).any():
            values[self._masks[rows, columns] != 0] = np.nan
        return values


def _fell_at(steps: Ids) -> int:
    """The row after the last fall of one rank's steps that is more than rows which come in another order."""
    falls = np.flatnonzero(steps[1:] <= steps[:-1] - ANEW_STEPS)
    return int(falls[-1]) + 1 if len(falls) else 0
