"""What transfers take, out of samples of all ranks, and what is normal for each channel.

Layer: inside ``detect``. A channel is a communicator with an operation, or a directed pair of ranks. ``Assembly`` joins
the ranks' samples of one operation: the shortest duration is that of who arrived last, so it holds no waiting.
``Tracks`` holds windows of them by channel and size. Invariants: an operation counts once however often its samples
are handed over; a window found slow never becomes part of what is normal; both are bounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

WINDOW: Final = 20  # operations
WINDOW_LEAST: Final = 5  # samples of them, where ranks sample few of many
PAST: Final = 10  # windows: 200 operations
SLOW_RATIO: Final = 1.3
SLOW_SIGMAS: Final = 6.0
CLEAR_RATIO: Final = 2.0  # against siblings alone, which may differ by where they lie
LEAST_EXCESS_S: Final = 2e-4  # below, stamps are not to be trusted
BUCKETS: Final = 64

_SEQ_BITS: Final = 40
_LATE_STEPS: Final = 16  # a rank's samples may come this much after the first rank's
_PENDING_MOST: Final = 1 << 20  # samples
_DENSE: Final = 8  # cells a sample
_MISSING_SHARE: Final = 50  # one member in so many may be without a sample
_SCALED_FROM: Final = 20  # log2 bytes: from here on time is in proportion to bytes
_SIGMA_OF_MAD: Final = 1.4826
_SIGMA_OF_MEDIAN: Final = 1.2533
_FLOOR_OWN: Final = 0.02
_FLOOR_SIBLINGS: Final = 0.05
_SIBLINGS_FOR_SPREAD: Final = 4
_WINDOWS_FOR_SPREAD: Final = 4

# A channel and size: the open window, the medians and spreads of past ones, the last window and its verdict.
# ``noise_s``: the error of ``latest_s``. ``past_s`` and ``siblings_s``: what it was held against, 0 none.
# ``since``: the first step of the first window of the streak of slow ones.
TRACK: Final = np.dtype(
    [
        ("code", "<i8"),
        ("family", "<i8"),
        ("fill", "<i4"),
        ("seconds", "<f4", (WINDOW,)),
        ("seq", "<i8", (WINDOW,)),
        ("began", "<i8"),
        ("medians", "<f4", (PAST,)),
        ("spreads", "<f4", (PAST,)),
        ("windows", "<i8"),
        ("closed", "<i8"),
        ("latest_s", "<f8"),
        ("noise_s", "<f8"),
        ("past_s", "<f8"),
        ("siblings_s", "<f8"),
        ("is_above_past", "?"),
        ("is_above_siblings", "?"),
        ("streak", "<i4"),
        ("since", "<i8"),
    ]
)


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """Samples of ranks, or (without ``rank``) transfers: one value a row in each column."""

    channel: Ints
    seq: Ints
    step: Ints
    size_bytes: Ints
    seconds: Floats
    rank: Ints

    def pick(self, which: npt.NDArray[np.intp] | Bools) -> Columns:
        return Columns(*(getattr(self, name)[which] for name in self.__slots__))

    def join(self, other: Columns) -> Columns:
        return Columns(*(np.concatenate([getattr(self, name), getattr(other, name)]) for name in self.__slots__))

    @property
    def key(self) -> Ints:
        return (self.channel << _SEQ_BITS) | self.seq


def no_columns() -> Columns:
    none = np.empty(0, np.int64)
    return Columns(none, none, none, none, np.empty(0), none)


class Assembly:
    """Joins samples into transfers. Samples that wait for other members are held for some steps, then given up."""

    def __init__(self) -> None:
        self._pending = no_columns()
        self._settled: list[tuple[int, Ints]] = []  # newest step, keys
        self._newest = -1

    def take(self, samples: Columns, members: Ints) -> Columns:
        """The transfers that ``samples`` complete; ``members[channel]``: how many ranks sample each. The transfer's
        ``seconds`` is the shortest duration, its ``rank`` the rank that had it."""
        samples = self._fresh(samples)
        if not samples.seq.size:
            return no_columns()
        before, self._newest = self._newest, max(self._newest, int(samples.step.max()))
        rows = self._pending.join(samples) if self._pending.seq.size else samples
        group, count = _group(rows)
        example = np.empty(count, np.intp)  # of each group, the row with the shortest duration
        example[group] = np.arange(group.size)
        least = np.full(count, np.inf)
        np.minimum.at(least, group, rows.seconds)
        hits = np.flatnonzero(rows.seconds == least[group])
        example[group[hits]] = hits
        shortest = rows.pick(example)
        have, wanted = np.bincount(group, minlength=count), members[shortest.channel]
        is_old = self._is_settled(shortest, before)
        is_late = shortest.step <= self._newest - _LATE_STEPS
        is_done = ~is_old & ((have >= wanted) | (is_late & (have >= wanted - wanted // _MISSING_SHARE)))
        self._hold(rows, np.flatnonzero((~is_old & ~is_done & ~is_late)[group]))
        settled = shortest.pick(is_done)
        self._settled = [known for known in self._settled if known[0] > self._newest - _LATE_STEPS]
        self._settled.append((self._newest, settled.key))
        return settled

    def _fresh(self, samples: Columns) -> Columns:
        """Without those too old to be known again, and those that are pending already."""
        if self._newest < 0:
            return samples
        is_known = samples.step > self._newest - _LATE_STEPS
        samples = samples if is_known.all() else samples.pick(is_known)
        seen = np.flatnonzero(samples.step <= self._newest)
        if not seen.size or not self._pending.seq.size:
            return samples
        twice = np.isin(_pair(samples.key[seen], samples.rank[seen]), _pair(self._pending.key, self._pending.rank))
        return samples.pick(np.delete(np.arange(samples.seq.size), seen[twice]))

    def _is_settled(self, transfers: Columns, newest: int) -> Bools:
        is_old = np.zeros(transfers.seq.size, np.bool_)
        at = np.flatnonzero(transfers.step <= newest)  # none, where nothing is handed over twice
        if at.size:
            is_old[at] = np.isin(transfers.key[at], np.concatenate([keys for _, keys in self._settled]))
        return is_old

    def _hold(self, rows: Columns, which: npt.NDArray[np.intp]) -> None:
        kept = rows.pick(which)
        if kept.seq.size > _PENDING_MOST:
            kept = kept.pick(np.argsort(kept.step, kind="stable")[-_PENDING_MOST:])
        self._pending = kept


def _pair(key: Ints, rank: Ints) -> Ints:
    return key * np.int64(1_000_003) + rank  # wraps: a hash


def _group(rows: Columns) -> tuple[npt.NDArray[np.intp], int]:
    """A number for each row, the same for rows of one operation, and how many there are.

    Without a sort where numbers are dense: sorting is most of the cost at 10,240 ranks. Ranks sample each channel in
    steps of a power of two, which is divided out.
    """
    count = int(rows.channel.max()) + 1
    low = np.full(count, np.iinfo(np.int64).max)
    np.minimum.at(low, rows.channel, rows.seq)
    offset = rows.seq - low[rows.channel]
    bits = np.zeros(count, np.int64)
    np.bitwise_or.at(bits, rows.channel, offset)
    stride = np.maximum(bits & -bits, 1)
    width = bits // stride + 1  # at least the largest offset
    if int(width.sum()) > _DENSE * rows.seq.size:
        keys, group = np.unique(rows.key, return_inverse=True)
        return group, keys.size
    cell = (np.cumsum(width) - width)[rows.channel] + offset // stride[rows.channel]
    is_used = np.zeros(int(width.sum()), np.bool_)
    is_used[cell] = True
    return (np.cumsum(is_used) - 1)[cell], int(is_used.sum())


class Numbering:
    """Numbers codes from 0 by first appearance, and keeps them."""

    def __init__(self) -> None:
        self._codes: Ints = np.empty(0, np.int64)  # sorted
        self._numbers: Ints = np.empty(0, np.int64)

    def __len__(self) -> int:
        return self._codes.size

    def of(self, codes: Ints) -> Ints:
        at = np.minimum(np.searchsorted(self._codes, codes), max(len(self) - 1, 0))
        is_new = self._codes[at] != codes if len(self) else np.ones(codes.size, np.bool_)
        if is_new.any():
            new = np.unique(codes[is_new])
            numbers = np.concatenate([self._numbers, np.arange(self._codes.size, self._codes.size + new.size)])
            known = np.concatenate([self._codes, new])
            order = np.argsort(known)
            self._codes, self._numbers = known[order], numbers[order]
            at = np.searchsorted(self._codes, codes)
        return np.asarray(self._numbers[at])


class Tracks:
    """Windows of transfers by channel and size bucket, held against their own past and against their siblings."""

    def __init__(self) -> None:
        self.state: npt.NDArray[np.void] = np.zeros(0, TRACK)
        self._numbers = Numbering()

    @property
    def channels(self) -> Ints:
        return np.asarray(self.state["code"] // BUCKETS)

    @property
    def buckets(self) -> Ints:
        return np.asarray(self.state["code"] % BUCKETS)

    @property
    def is_slow(self) -> Bools:
        return np.asarray(self.state["streak"] > 0)

    @property
    def ratios(self) -> Floats:
        """The last window over what it is held against: its past, or its siblings where only they say it is slow."""
        state = self.state
        by_siblings = (state["is_above_siblings"] & ~state["is_above_past"]) | (state["past_s"] == 0)
        against = np.where(by_siblings, state["siblings_s"], state["past_s"])
        return np.asarray(np.divide(state["latest_s"], against, out=np.ones(against.size), where=against > 0))

    def take(self, transfers: Columns, families: Ints) -> None:
        """Adds transfers; those of one family (a number for each row) and one size bucket are siblings."""
        if not transfers.seq.size:
            return
        bucket = (np.frexp(np.maximum(transfers.size_bytes, 1).astype(np.float64))[1] - 1).astype(np.int64)
        code = transfers.channel * BUCKETS + bucket
        order = np.lexsort((transfers.seq, code))
        rows, starts = self._rows_of(code[order], (families * BUCKETS + bucket)[order])
        counts = np.diff(starts, append=order.size)
        scale = np.where(bucket >= _SCALED_FROM, np.exp2(bucket) / np.maximum(transfers.size_bytes, 1), 1.0)
        seconds = (transfers.seconds * scale)[order]
        seq, step = transfers.seq[order], transfers.step[order]
        while rows.size:
            used = self._fill(rows, starts, counts, seconds, seq, step)
            is_left = counts > used
            rows, starts, counts = rows[is_left], (starts + used)[is_left], (counts - used)[is_left]

    def _rows_of(self, codes: Ints, families: Ints) -> tuple[Ints, Ints]:
        """The rows of ``state`` of the distinct codes in ``codes`` (sorted), made where new, and where each begins."""
        starts = np.flatnonzero(np.diff(codes, prepend=-1))
        rows = self._numbers.of(codes[starts])
        is_new = rows >= self.state.size
        fresh = np.zeros(int(is_new.sum()), TRACK)
        at = rows[is_new] - self.state.size
        fresh["code"][at], fresh["family"][at], fresh["since"] = codes[starts][is_new], families[starts][is_new], -1
        self.state = np.concatenate([self.state, fresh]) if fresh.size else self.state
        return rows, starts

    def _fill(self, rows: Ints, starts: Ints, counts: Ints, seconds: Floats, seq: Ints, step: Ints) -> Ints:
        """Fills the open windows as far as the first that closes; how many transfers of each row that took."""
        state = self.state
        fill = state["fill"][rows].astype(np.int64)
        put = np.minimum(counts, WINDOW - fill)
        which = np.repeat(np.arange(rows.size), put)
        offset = np.arange(which.size) - np.repeat(np.cumsum(put) - put, put)
        column, source = fill[which] + offset, starts[which] + offset
        state["seconds"][rows[which], column] = seconds[source]
        state["seq"][rows[which], column] = seq[source]
        state["began"][rows] = np.where(fill == 0, step[starts], state["began"][rows])
        index = np.arange(WINDOW)
        numbers = state["seq"][rows]
        is_enough = (index >= WINDOW_LEAST - 1) & (numbers - numbers[:, :1] >= WINDOW - 1)
        is_end = (index < (fill + put)[:, None]) & (is_enough | (index == WINDOW - 1))
        closes = is_end.any(axis=1)
        length = np.argmax(is_end, axis=1) + 1
        state["fill"][rows] = np.where(closes, 0, fill + put)
        if closes.any():
            self._close(rows[closes], length[closes])
        return np.asarray(np.where(closes, length - fill, put))

    def _close(self, rows: Ints, length: Ints) -> None:
        state = self.state
        is_in = np.arange(WINDOW) < length[:, None]
        seconds = np.where(is_in, state["seconds"][rows], np.inf).astype(np.float64)
        median = (_low_median(seconds, length) + _low_median(seconds, length, at=length // 2)) / 2
        spread = _low_median(np.abs(seconds - median[:, None]), length)
        state["latest_s"][rows], state["noise_s"][rows] = median, _noise_of_median(spread, length)
        self._against_past(rows, median, length)
        self._against_siblings(rows, median)
        is_slow = state["is_above_past"][rows] | state["is_above_siblings"][rows]
        streak = state["streak"][rows]
        state["since"][rows] = np.where(is_slow, np.where(streak > 0, state["since"][rows], state["began"][rows]), -1)
        state["streak"][rows] = np.where(is_slow, streak + 1, 0)
        state["closed"][rows] += 1
        self._learn(rows[~is_slow], median[~is_slow], spread[~is_slow])

    def _learn(self, rows: Ints, median: Floats, spread: Floats) -> None:
        at = self.state["windows"][rows] % PAST
        self.state["medians"][rows, at] = median
        self.state["spreads"][rows, at] = spread
        self.state["windows"][rows] += 1

    def _against_past(self, rows: Ints, median: Floats, length: Ints) -> None:
        """Judges windows by their own past. The noise of a window's median is that which its operations make, or that
        seen between windows: operations that queue behind others differ much, their medians little."""
        state = self.state
        windows = np.minimum(state["windows"][rows], PAST)
        has_past = windows > 0
        is_in = np.arange(PAST) < windows[:, None]
        medians = np.where(is_in, state["medians"][rows], np.inf).astype(np.float64)
        spreads = np.where(is_in, state["spreads"][rows], np.inf)
        past = np.where(has_past, _low_median(medians, windows), 0.0)
        spread = np.where(has_past, _low_median(spreads, windows), 0.0)
        between = np.where(windows >= _WINDOWS_FOR_SPREAD, _low_median(np.abs(medians - past[:, None]), windows), 0.0)
        noise = np.maximum(_noise_of_median(spread, length), _SIGMA_OF_MAD * between)
        noise = noise * np.sqrt(1 + 1 / np.maximum(windows, 1))
        excess = median - past
        is_far = excess > np.maximum(SLOW_SIGMAS * np.maximum(noise, _FLOOR_OWN * past), LEAST_EXCESS_S)
        state["past_s"][rows] = past
        state["is_above_past"][rows] = has_past & (median > SLOW_RATIO * past) & is_far

    def _against_siblings(self, rows: Ints, median: Floats) -> None:
        """Judges windows by the last windows of their family; two or three siblings give no spread, so need more."""
        state = self.state
        known = np.flatnonzero(state["latest_s"] > 0)
        families, inverse = np.unique(state["family"][known], return_inverse=True)
        latest = state["latest_s"][known]
        middle = group_low_median(latest, inverse, families.size)
        spread = group_low_median(np.abs(latest - middle[inverse]), inverse, families.size)
        at = np.searchsorted(families, state["family"][rows])
        reference, count = middle[at], np.bincount(inverse, minlength=families.size)[at]
        has_spread = count >= _SIBLINGS_FOR_SPREAD
        sigma = np.maximum(np.where(has_spread, _SIGMA_OF_MAD * spread[at], 0.0), _FLOOR_SIBLINGS * reference)
        excess = median - reference
        is_far = excess > np.maximum(SLOW_SIGMAS * np.maximum(sigma, state["noise_s"][rows]), LEAST_EXCESS_S)
        ratio = np.where(has_spread, SLOW_RATIO, CLEAR_RATIO)
        state["siblings_s"][rows] = np.where(count > 1, reference, 0.0)
        state["is_above_siblings"][rows] = (count > 1) & (median > ratio * reference) & is_far


def _noise_of_median(spread: Floats, length: Ints) -> Floats:
    return np.asarray(_SIGMA_OF_MAD * _SIGMA_OF_MEDIAN * spread / np.sqrt(length))


def _low_median(values: Floats, length: Ints, at: Ints | None = None) -> Floats:
    """The lower median of each row's first ``length`` values in order; padding must be infinite."""
    index = np.maximum((length - 1) // 2 if at is None else at, 0)
    return np.asarray(np.sort(values, axis=1)[np.arange(values.shape[0]), index])


def group_low_median(values: Floats, groups: npt.NDArray[np.intp], count: int) -> Floats:
    """The lower median of each group's values: of two the smaller, so that one slow of two is not half the measure."""
    order = np.lexsort((values, groups))
    sizes = np.bincount(groups, minlength=count)
    starts = np.cumsum(sizes) - sizes
    return np.asarray(values[order][np.minimum(starts + np.maximum(sizes - 1, 0) // 2, max(values.size - 1, 0))])
