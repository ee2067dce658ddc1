"""A closer look at a rank that is above its peers: in most steps, and in all of the program or in one place?

Layer: ``detect``, pure. A slow device lengthens all gaps between communications in proportion; logging, garbage
collection or a synchronisation that nobody recorded lengthens one.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np

from ckptd.detect.compute_scores import PeerSets, Scores, Values, median_of
from ckptd.detect.compute_thresholds import Thresholds
from ckptd.detect.history import History
from ckptd.detect.layout import Ids

# Enough for a median; looking at thousands of peers for each suspect would cost more than finding it.
_PEERS_LOOKED_AT: Final = 32
_STEPS_LOOKED_AT: Final = 40
_POSITIONS_SHOWN: Final = 3
_STEPS_OF_NOISE: Final = 160
_FEWEST_OF_NOISE: Final = 10
_SIGMA: Final = 1.4826


class Cause(StrEnum):
    """What a finding looks like."""

    DEVICE = "slow device"
    DRIFT = "gradual drift"
    LOCALISED = "localised excess"
    DATA = "data imbalance"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Scores of one kind of peers in a window. ``unit``: what the self time of each rank was divided by to make ranks
    comparable. ``expected_by``: whose gaps tell what a rank's own should be, None: its own of before."""

    name: str
    sets: PeerSets
    unit: Values
    scores: Scores
    expected_by: PeerSets | None


@dataclass(frozen=True, slots=True)
class Place:
    """Self time at one gap position, seconds a step: the rank's and what its peers lead one to expect."""

    position: int
    self_s: float
    expected_s: float


@dataclass(frozen=True, slots=True)
class Finding:
    """A rank above its peers in one window. ``spread``: share of the compute that is slower, NaN not known.
    ``weakness``: why it can be a suspect only, or "" ; ``caution``: what makes it less certain than others."""

    rank: int
    cause: Cause
    peers: str
    peer_count: int
    window_steps: int
    first_step: int
    last_step: int
    z: float
    rho: float
    self_s: float
    median_s: float
    spread: float
    places: tuple[Place, ...]
    weakness: str = ""
    caution: str = ""

    @property
    def excess_s(self) -> float:
        return self.self_s - self.median_s


def steady_share(history: History, steps: Ids, rank: int, comparison: Comparison, rho: float) -> float:
    """Share of the window's steps in which the rank is more than rho / 2 above its peers."""
    ratio = _step_by_step(history, steps, rank, comparison)
    return float((ratio > 1 + rho / 2).mean()) if len(ratio) else 0.0


def z_in_time(history: History, steps: Ids, rank: int, comparison: Comparison) -> float:
    """rho against how much the rank and its peers differ from step to step, where there are too few of them to tell
    from each other; NaN when too few steps are known. Differences between neighbours, so that a change of level, which
    is what is looked for, does not count as noise."""
    judged = history.judged_steps()
    ratio = _step_by_step(history, judged[judged <= steps[-1]][-_STEPS_OF_NOISE:], rank, comparison)
    if len(ratio) < _FEWEST_OF_NOISE:
        return float("nan")
    noise = _SIGMA * float(np.median(np.abs(np.diff(ratio)))) / 2**0.5
    return float(comparison.scores.rho[rank] * np.sqrt(len(steps)) / max(noise, 1e-6))


def spread_of(
    history: History, steps: Ids, rank: int, comparison: Comparison, thresholds: Thresholds
) -> tuple[float, tuple[Place, ...]]:
    """(share of the compute, weighted by what peers spend there, that is slower; where the excess is largest)."""
    recent = steps[-_STEPS_LOOKED_AT:]
    own = _typical_gaps(history, recent, np.array([rank]))[:, 0]
    scores = comparison.scores
    if comparison.expected_by is None:
        judged = history.judged_steps()
        before = judged[judged < steps[0]][:_STEPS_LOOKED_AT]
        if not len(before):
            return float("nan"), ()
        expected = _typical_gaps(history, before, np.array([rank]))[:, 0] * scores.reference[rank]
        usual_s = comparison.unit[rank] * scores.reference[rank]
        if abs(expected.sum() - usual_s) > scores.rho[rank] / 2 * usual_s:
            return float("nan"), ()  # what is left of the past is no longer how it was
    else:
        others = _sample(comparison.expected_by.around(rank))
        expected = median_of(_typical_gaps(history, recent, others))
        if comparison.expected_by is not comparison.sets:
            expected = expected * scores.reference[rank]
    if not np.isfinite(expected).all() or not np.isfinite(own).all() or expected.sum() <= 0:
        return float("nan"), ()
    is_slower = own > expected * (1 + min(thresholds.spread_rho, float(scores.rho[rank]) / 2))
    worst = np.argsort(expected - own)[:_POSITIONS_SHOWN]
    places = tuple(Place(int(p), float(own[p]), float(expected[p])) for p in worst if own[p] > expected[p])
    return float(expected[is_slower].sum() / expected.sum()), places


def _step_by_step(history: History, steps: Ids, rank: int, comparison: Comparison) -> Values:
    """The rank against the median of its peers, for each step in which both are known."""
    others = _sample(comparison.sets.around(rank))
    own = history.self_s(steps, np.array([rank]))[0] / comparison.unit[rank]
    usual = median_of((history.self_s(steps, others) / comparison.unit[others, None]).T)
    known = np.isfinite(own) & (usual > 0)
    return np.asarray(own[known] / usual[known], np.float64)


def _typical_gaps(history: History, steps: Ids, ranks: Ids) -> Values:
    """Median over the steps, positions x ranks."""
    gaps = history.gaps_s(steps, ranks)
    return median_of(gaps.reshape(-1, gaps.shape[2])).reshape(gaps.shape[:2])


def _sample(ranks: Ids) -> Ids:
    return ranks[:: -(-len(ranks) // _PEERS_LOOKED_AT)] if len(ranks) else ranks
