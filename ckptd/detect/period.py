"""Step boundaries of a program that marks none, from the sequence of its operations. Pure; below ``reduce``.

Invariants: what is found depends on the sequence of operations alone, never on how it was cut into batches, and a
boundary is an operation named by its signature: so ranks of the same program cut at the same operation without a word
between them. The period is the first lag at which the sequence agrees with itself (FALCON, "Pinpointing and Mitigating
Stragglers for Large-Scale Hybrid-Parallel Training": to 95 %) in which most of the signatures occur, and at which it
agrees as well as at any: programs repeat themselves within a step too, over layers and microbatches, only less well.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ckptd.detect.signature import Ids, Signature
from ckptd.format.timings import STEP, Mask, Rows

AGREEMENT: Final = 0.95
# A lag that agrees this much less than another is a pattern within the step.
_AGREES_ALIKE: Final = 0.0025
# This share of the signatures occurs at least once in a period.
COVERAGE: Final = 2 / 3
# A period can be seen when the sequence holds so many.
PERIODS: Final = 3
# It is settled when so many are there, it agrees so well and the look before found the same; or when the window is full
SETTLED_PERIODS: Final = 16
SETTLED_AGREEMENT: Final = 0.998
# Operations looked at: at most this, and again each time the count has doubled from the least.
MOST_OPERATIONS: Final = 1 << 14
LEAST_OPERATIONS: Final = 64
# The first steps compile, allocate and connect.
WARM_UP_STEPS: Final = 20
# So many boundaries in a row at another distance, or none for so many periods, and the program has changed.
CHANGES: Final = 3
# Signatures seen less often than this in the window are events (a checkpoint's barrier), not part of the step.
_LEAST_SEEN: Final = 3
_TOLERANCE: Final = 0.25

Table = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Period:
    """A step is ``operations`` long and ends with every ``occurrences``-th operation of signature ``anchor``.
    ``agreement``: the share of operations that are met again one period later, events and all."""

    operations: int
    anchor: int
    occurrences: int
    agreement: float = field(default=1.0, compare=False)


def find_period(sequence: Ids, known: list[Signature]) -> Period | None:
    """The period of ``sequence`` (n,), indices into ``known`` in program order; None: none, or too short to tell.

    Anchor: the rarest signature of the period; of several, the one whose members leave together and are most.
    """
    counts = np.bincount(sequence, minlength=len(known))
    kept = sequence[counts[sequence] >= _LEAST_SEEN]
    lag = _first_lag(kept)
    if not lag:
        return None
    per_period = np.rint(counts * lag / len(kept)).astype(np.int64)
    candidates = [i for i in np.flatnonzero(per_period).tolist() if counts[i] >= _LEAST_SEEN]
    anchor = min(candidates, key=lambda i: (per_period[i], *_reversed(known[i])))
    return Period(lag, anchor, int(per_period[anchor]), float((sequence[lag:] == sequence[:-lag]).mean()))


def _reversed(signature: Signature) -> tuple[Any, ...]:
    return tuple(-part if not isinstance(part, str) else part for part in signature.anchor_order)


def _first_lag(sequence: Ids) -> int:
    """The lag that is the period; 0: none."""
    most = len(sequence) // PERIODS
    if most < 1:
        return 0
    lags = np.arange(1, most + 1)
    signatures, counts = np.unique(sequence, return_counts=True)
    matches = np.zeros(most)
    for signature in signatures.tolist():
        matches += _autocorrelation((sequence == signature).astype(np.float64), most)
    agreement = matches / (len(sequence) - lags)
    # Half of the mean distance between two of a signature: a lag below holds it in less than half of the periods.
    agreement[lags < np.quantile(len(sequence) / counts / 2, COVERAGE)] = 0.0
    is_period = agreement >= max(AGREEMENT, agreement.max() - _AGREES_ALIKE)
    if not is_period.any():
        return 0
    # Near a period a sequence of many equal operations agrees almost as well as at it.
    first = int(is_period.argmax())
    return first + int(agreement[first : first + first // 2 + 1].argmax()) + 1


def _autocorrelation(values: npt.NDArray[np.float64], most: int) -> npt.NDArray[np.float64]:
    """Sum of values[i] * values[i + lag] for lags 1..most."""
    spectrum = np.fft.rfft(values, 2 * len(values))
    raw = np.fft.irfft(spectrum * spectrum.conj(), 2 * len(values))
    return np.rint(raw[1 : most + 1])


class PeriodFinder:
    """Makes the step marks of one rank out of its operations; steps count from 1, from the first boundary of all.

    No step is cut before the period is settled; then all that was waited with is cut, so that the count of steps does
    not depend on when that was: ranks of other programs (pipeline stages) count alike.
    """

    def __init__(self, known: list[Signature]) -> None:
        self._known = known
        self._period: Period | None = None  # settled
        self._candidate: Period | None = None
        self._window = np.zeros((0, 3), np.int64)  # signature, start, end
        self._due = LEAST_OPERATIONS
        self._step = 0
        self._seen = 0  # of the anchor, since the last boundary
        self._since: int | None = None  # operations since the last boundary; None before the first
        self._changes = 0

    def take(self, signatures: Ids, starts_ns: Ids, ends_ns: Ids) -> Rows:
        """STEP rows of the boundaries that ``signatures`` (n,), operations in order of their end, brought."""
        rows = np.stack([signatures, starts_ns, ends_ns], axis=1)
        marks: list[tuple[int, int, int]] = []
        while len(rows):
            rows = self._look(rows) if self._period is None else self._cut(rows, self._period, marks)
        return np.array(marks, STEP)

    def _look(self, rows: Table) -> Table:
        """Take operations up to the next count at which the window is judged; returns those to go on with."""
        missing = self._due - len(self._window)
        self._window = np.concatenate([self._window, rows[:missing]])
        left = rows[missing:]
        if len(self._window) < self._due:
            return left
        in_order = self._window[np.argsort(self._window[:, 1], kind="stable"), 0]
        # The first quarter may be how the program starts.
        found = find_period(in_order[len(in_order) // 4 :], self._known)
        if found is not None and self._is_settled(found):
            left = np.concatenate([self._window, left])
            self._period, self._seen, self._since, self._changes = found, 0, None, 0
            self._window = self._window[:0]
        elif len(self._window) >= MOST_OPERATIONS:
            self._window = self._window[MOST_OPERATIONS // 4 :]
        self._candidate = found
        self._due = min(max(2 * len(self._window), LEAST_OPERATIONS), MOST_OPERATIONS)
        return left

    def _is_settled(self, found: Period) -> bool:
        if len(self._window) >= MOST_OPERATIONS:
            return True
        is_plenty = len(self._window) >= SETTLED_PERIODS * found.operations
        return found.operations > 1 and is_plenty and found.agreement >= SETTLED_AGREEMENT and found == self._candidate

    def _cut(self, rows: Table, period: Period, marks: list[tuple[int, int, int]]) -> Table:
        """Cut ``rows`` at boundaries; returns what is left when the program turns out to have changed."""
        patience = (CHANGES + 1) * period.operations
        boundary = None if self._since is None else -1 - self._since
        for at in np.flatnonzero(rows[:, 0] == period.anchor).tolist():
            if boundary is not None and at - boundary > patience:
                break
            self._seen += 1
            if self._seen < period.occurrences:
                continue
            if boundary is not None:
                is_other = abs(at - boundary - period.operations) > max(1, _TOLERANCE * period.operations)
                self._changes = self._changes + 1 if is_other else 0
            self._seen, boundary = 0, at
            self._step += 1
            mask = Mask.WARM_UP if self._step <= WARM_UP_STEPS else Mask.NONE
            marks.append((self._step, int(rows[at, 2]), int(mask)))
            if self._changes >= CHANGES:
                self._period = None
                return rows[at + 1 :]
        if boundary is not None and len(rows) - 1 - boundary >= patience:
            self._period = None
            return rows[boundary + patience + 1 :]
        self._since = None if boundary is None else len(rows) - 1 - boundary
        return rows[:0]
