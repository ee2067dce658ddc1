"""One rank's operations become steps and samples: how long the rank computed, waited, and where. Pure.

Times are of the rank's own clock and only durations leave. Invariants: memory is bounded whatever is sent; what lies
across a mark counts in both steps by its overlap; the gaps of a step add up to its self time; members of a
communicator sample the same operations without asking each other; of short steps all ranks reduce the same ones, so
that the cost of a second does not grow with the steps in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

from ckptd.detect.period import PeriodFinder
from ckptd.detect.positions import Positions
from ckptd.detect.records import Communicator
from ckptd.detect.signature import Ids, Signatures
from ckptd.format.timings import (
    OPERATION,
    POINT_TO_POINT,
    ROOTED,
    SAMPLE,
    SELF,
    STEP,
    SYNCHRONISING,
    WAITS,
    Mask,
    Rows,
)

Bools = npt.NDArray[np.bool_]
Seconds = npt.NDArray[np.float64]

# Operations kept until their step is done; what is beyond makes a step INCOMPLETE.
MOST_OPERATIONS: Final = 1 << 15
# A step is reduced when an operation entered after its mark has ended: since operations come in order of their end,
# nothing that ended in the step is still on its way. For a rank that communicates no more, when so many marks wait.
MOST_MARKS: Final = 64
# About so many samples of one kind of operation in a step, at most, and half of it at least.
SAMPLES: Final = 4
# Of a program with more steps a second, only so many or down to half of them are reduced.
STEPS_PER_SECOND: Final = 32
# How many of the last steps tell how long steps are.
RATE_STEPS: Final = 64
# Parts of operations, one for each step that an operation lies in, looked at together.
_MOST_PARTS: Final = 1 << 17

_KINDS: Final = (SYNCHRONISING, ROOTED, POINT_TO_POINT)
_NS: Final = 1e-9
_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
_EDGE: Final = -1  # id of the boundary of a step


@dataclass(frozen=True, slots=True)
class _Steps:
    """Steps (n,) by rising time, none overlapping another."""

    step: Ids
    mask: Ids
    begin_ns: Ids
    end_ns: Ids

    def __getitem__(self, chosen: slice | Bools) -> _Steps:
        return _Steps(self.step[chosen], self.mask[chosen], self.begin_ns[chosen], self.end_ns[chosen])

    def parts_of(self, starts: Ids, ends: Ids) -> tuple[Ids, Ids]:
        """The first step that each interval (n,) lies in, and the one after the last."""
        first = np.searchsorted(self.end_ns, starts, "right")
        return first, np.maximum(np.searchsorted(self.begin_ns, ends, "left"), first)


class Reducer:
    """Reduces the operations of one rank, as they come.

    Steps end at marks. As long as no mark has ever come (``watch()`` without step calls), they end where the sequence
    of operations repeats, ``ckptd.detect.period``. Of short steps every 2nd, 4th, ... by number is reduced.
    """

    def __init__(self) -> None:
        self._signatures = Signatures()
        self._positions = Positions()
        self._finder: PeriodFinder | None = PeriodFinder(self._signatures.known)
        self._rows = np.zeros(0, OPERATION)
        self._ids: Ids = np.zeros(0, np.int64)
        self._is_sampled: Bools = np.zeros(0, np.bool_)
        self._marks = np.zeros(0, STEP)
        self._begin_ns: int | None = None
        self._last_step = -1
        self._newest_start_ns = np.iinfo(np.int64).min
        self._dropped_until_ns = np.iinfo(np.int64).min
        self._ends_ns: Ids = np.zeros(0, np.int64)  # of the last RATE_STEPS marks

    @property
    def position_names(self) -> tuple[str, ...]:
        """What the positions of ``gaps_s`` are: "before -> after", the longest first; "" never seen."""
        return self._positions.names([signature.name for signature in self._signatures.known])

    def take(self, operations: Rows, marks: Rows, table: Mapping[int, Communicator]) -> tuple[Rows, Rows]:
        """SELF and SAMPLE rows of the steps that are now done.

        ``operations``: OPERATION rows that have ended since the last call, in order of their end; ``marks``: STEP rows;
        ``table``: the rank's communicators by row, all so far. The first mark begins the first step.
        """
        ids = self._signatures.number(operations, table)
        self._keep(operations, ids)
        if len(marks) and self._finder is not None:
            # Where the program repeats need not be where its steps end.
            self._finder = None
            self._begin_anew()
            self._marks = self._marks[:0]
        elif self._finder is not None:
            marks = self._finder.take(ids, operations["start_ns"], operations["end_ns"])
        self._marks = self._in_order(_joined(self._marks, marks))
        due = self._marks[: self._due()]
        if not len(due):
            return np.zeros(0, SELF), np.zeros(0, SAMPLE)
        self._marks = self._marks[len(due) :]
        return self._reduce_all(due["step"].astype(np.int64), due["end_ns"].astype(np.int64), due["mask"])

    def _keep(self, operations: Rows, ids: Ids) -> None:
        rows = _joined(self._rows, operations)
        self._ids = np.concatenate([self._ids, ids])[-MOST_OPERATIONS:]
        self._is_sampled = np.concatenate([self._is_sampled, np.zeros(len(operations), np.bool_)])[-MOST_OPERATIONS:]
        self._rows = rows[-MOST_OPERATIONS:]
        if len(rows) > MOST_OPERATIONS:
            self._dropped_until_ns = max(self._dropped_until_ns, int(rows["end_ns"][:-MOST_OPERATIONS].max()))
        if len(operations):
            self._newest_start_ns = max(self._newest_start_ns, int(operations["start_ns"].max()))

    def _in_order(self, marks: Rows) -> Rows:
        """Those of ``marks`` after the last that is not later than the one before it: another clock began there."""
        ends = marks["end_ns"].astype(np.int64)
        back = np.flatnonzero(ends[1:] <= ends[:-1])
        if len(back):
            marks = marks[back[-1] + 1 :]
        is_back = len(marks) > 0 and self._begin_ns is not None and int(marks["end_ns"][0]) <= self._begin_ns
        if len(back) or is_back:
            self._begin_anew()
        return marks

    def _begin_anew(self) -> None:
        self._begin_ns, self._last_step, self._ends_ns = None, -1, self._ends_ns[:0]

    def _due(self) -> int:
        """How many of the marks that wait are done."""
        count = len(self._marks)
        is_due = (np.arange(count, 0, -1) > MOST_MARKS) | (self._marks["end_ns"] <= self._newest_start_ns)
        return count if is_due.all() else int(is_due.argmin())

    def _reduce_all(self, numbers: Ids, ends: Ids, masks: Ids) -> tuple[Rows, Rows]:
        """SELF and SAMPLE rows of the steps that end at ``ends`` (n,), rising."""
        begin_ns = ends[0] if self._begin_ns is None else self._begin_ns
        steps = _Steps(numbers, masks.astype(np.int64), np.concatenate([[begin_ns], ends[:-1]]), ends)
        # The first mark, or steps that count anew: how long this one took is not known.
        is_wanted = (ends > steps.begin_ns) & (numbers > np.concatenate([[self._last_step], numbers[:-1]]))
        is_wanted &= numbers % self._strides(ends) == 0
        samples = self._sample(steps, is_wanted)
        wanted = steps[is_wanted]
        rows = [np.zeros(0, SELF), *(self._reduce(wanted[part]) for part in self._shares(wanted))]
        is_kept = self._rows["end_ns"] > ends[-1]
        self._rows, self._ids, self._is_sampled = self._rows[is_kept], self._ids[is_kept], self._is_sampled[is_kept]
        self._begin_ns, self._last_step = int(ends[-1]), int(numbers[-1])
        return np.concatenate(rows), samples

    def _strides(self, ends: Ids) -> Ids:
        """Every how-manieth step is reduced at each of ``ends`` (n,): a power of two by the length of the last steps
        alone. Ranks of a job take equally long; where they differ by a little, and so in the power, half is shared."""
        known = np.concatenate([self._ends_ns, ends])
        self._ends_ns = known[-RATE_STEPS:]
        lengths_s = (known[RATE_STEPS:] - known[:-RATE_STEPS]) * _NS
        excess = np.maximum(RATE_STEPS / np.maximum(lengths_s, _NS) / STEPS_PER_SECOND, 1.0)
        strides = np.left_shift(1, np.ceil(np.log2(excess)).astype(np.int64))[-len(ends) :]
        # Where fewer steps are known than tell, all are reduced.
        return np.concatenate([np.ones(len(ends) - len(strides), np.int64), strides])

    def _shares(self, steps: _Steps) -> Iterator[slice]:
        """``steps`` in shares, so that an operation across many steps does not take memory for each at once."""
        first, last = steps.parts_of(self._rows["start_ns"], self._rows["end_ns"])
        size = len(steps.step)
        parts = np.cumsum(np.bincount(first, minlength=size + 1) - np.bincount(last, minlength=size + 1))[:size]
        share = np.cumsum(parts) // _MOST_PARTS
        edges = [0, *(np.flatnonzero(np.diff(share)) + 1).tolist(), size]
        yield from (slice(a, b) for a, b in pairwise(edges) if b > a)

    def _reduce(self, steps: _Steps) -> Rows:
        parts = _Parts.of_steps(steps, self._rows, self._ids)
        size = len(steps.step)
        gaps, of, before, after = parts.gaps()
        result = np.zeros(size, SELF)
        result["step"] = steps.step
        is_short = steps.begin_ns < self._dropped_until_ns
        result["mask"] = np.where(is_short, steps.mask | int(Mask.INCOMPLETE), steps.mask)
        result["length_s"] = (steps.end_ns - steps.begin_ns) * _NS
        result["self_s"] = np.bincount(of, gaps, size) * _NS
        waits = [parts.union(np.isin(parts.op, [int(op) for op in kind])) for kind in _KINDS]
        result["waits_s"] = np.stack(waits, axis=1).reshape(size, WAITS) * _NS
        names = [signature.name for signature in self._signatures.known]
        edges = np.searchsorted(of, np.arange(size + 1))
        gaps_s: Seconds = gaps.astype(np.float64) * _NS
        for at, (a, b) in enumerate(pairwise(edges.tolist())):
            result["gaps_s"][at] = self._positions.add(gaps_s[a:b], before[a:b], after[a:b], names)
        return result

    def _sample(self, steps: _Steps, is_wanted: Bools) -> Rows:
        """SAMPLE rows of the operations entered in the wanted steps; one that ends late is in the step it came in."""
        starts = self._rows["start_ns"]
        at = np.searchsorted(steps.end_ns, starts, "right")
        # Of all that was entered before the last mark nothing is sampled later.
        is_entered = (at < len(steps.step)) & ~self._is_sampled
        self._is_sampled |= is_entered
        entered = np.flatnonzero(is_entered)
        entered = entered[is_wanted[at[entered]]]
        rows = self._rows[entered]
        # What was over with the step before was forgotten with it.
        is_in = rows["end_ns"] > steps.begin_ns[at[entered]]
        rows, at = rows[is_in], at[entered[is_in]]
        order = np.argsort(at, kind="stable")
        rows, at = rows[order], at[order]
        is_taken = is_chosen(rows, at)
        rows, at = rows[is_taken], at[is_taken]
        result = np.zeros(len(rows), SAMPLE)
        for name in ("communicator", "op", "peer", "seq", "size_bytes"):
            result[name] = rows[name]
        result["step"] = steps.step[at]
        result["duration_s"] = np.maximum(rows["end_ns"] - rows["start_ns"], 0) * _NS
        return result


@dataclass(frozen=True, slots=True)
class _Parts:
    """The parts of operations that lie in each of some steps, by step and start, with the steps put one behind the
    other on one line that begins at 0. ``edges`` (steps + 1,): where they meet."""

    of: Ids  # step, as an index
    starts: Ids
    ends: Ids
    ids: Ids
    op: npt.NDArray[np.uint8]
    edges: Ids

    @classmethod
    def of_steps(cls, steps: _Steps, rows: Rows, ids: Ids) -> _Parts:
        first, last = steps.parts_of(rows["start_ns"], rows["end_ns"])
        chosen = np.flatnonzero(last > first)
        chosen = chosen[np.argsort(rows["start_ns"][chosen], kind="stable")]
        counts = last[chosen] - first[chosen]
        row = np.repeat(chosen, counts)
        of = np.repeat(first[chosen] - np.cumsum(counts) + counts, counts) + np.arange(len(row))
        order = np.argsort(of, kind="stable")
        row, of = row[order], of[order]
        edges = np.concatenate([[0], np.cumsum(steps.end_ns - steps.begin_ns)])
        shift = (edges[:-1] - steps.begin_ns)[of]
        starts = np.maximum(rows["start_ns"][row] + shift, edges[of])
        ends = np.minimum(rows["end_ns"][row] + shift, edges[of + 1])
        return cls(of, starts, ends, ids[row], rows["op"][row], edges)

    def union(self, chosen: Bools) -> npt.NDArray[np.float64]:
        """Length of the union of the chosen parts in each step, (steps,), in nanoseconds."""
        starts, ends = self.starts[chosen], self.ends[chosen]
        reached = np.maximum.accumulate(np.concatenate([[0], ends]))[:-1]
        lengths = np.maximum(ends - np.maximum(starts, reached), 0)
        return np.bincount(self.of[chosen], lengths, len(self.edges) - 1).astype(np.float64)

    def gaps(self) -> tuple[Ids, Ids, Ids, Ids]:
        """The gaps that the parts leave: their lengths, steps, the id entered last before each and the id entered next,
        -1 for the boundary of the step.

        Of operations in flight together the last entered counts as the one before: in which order they end differs from
        rank to rank, the order in which a program enters them does not.
        """
        # A boundary is a part without length before all others of its step; the last is the end of the line.
        places = np.searchsorted(self.of, np.arange(len(self.edges)))
        starts, ends = np.insert(self.starts, places, self.edges), np.insert(self.ends, places, self.edges)
        ids = np.insert(self.ids, places, _EDGE)
        of = np.insert(self.of, places, np.arange(len(self.edges)))
        gaps = starts[1:] - np.maximum.accumulate(ends)[:-1]
        is_gap = gaps > 0
        return gaps[is_gap], of[:-1][is_gap], ids[:-1][is_gap], ids[1:][is_gap]


def _joined(some: Rows, more: Rows) -> Rows:
    """Both, as bytes: arrays joined as such are copied field by field."""
    return np.frombuffer(some.tobytes() + more.tobytes(), some.dtype) if len(some) else more


def is_chosen(rows: Rows, steps: Ids) -> Bools:
    """Which of OPERATION ``rows`` (n,), entered in ``steps`` (n,), are sampled; (n,).

    Of c operations of a communicator and kind in a step, about every s-th by its seq, s the first power of two that is
    not below c / SAMPLES: all members count the same c, except where one of them saw an operation in another step, and
    then the samples at the greater stride are among those at the smaller. By the seq's fractional multiple of the
    golden ratio and not by seq mod s, for where two kinds take turns one would only have odd ones.
    """
    peers = np.where(np.isin(rows["op"], [int(op) for op in POINT_TO_POINT]), rows["peer"], -1).astype(np.int64)
    kinds = (rows["communicator"].astype(np.int64) << 32) + ((peers + 1) << 8) + rows["op"]
    kinds = np.unique(kinds, return_inverse=True)[1] * (int(steps.max(initial=0)) + 1) + steps
    _, inverse, counts = np.unique(kinds, return_inverse=True, return_counts=True)
    bits = np.ceil(np.log2(np.maximum(counts / SAMPLES, 1))).astype(np.uint64)[inverse]
    scattered = rows["seq"].astype(np.uint64) * _GOLDEN
    return np.asarray((scattered >> np.uint64(32)) >> (np.uint64(32) - bits) == 0)
