"""How far each rank is from its peers: one number a rank and window, medians and spreads of peer sets.

Layer: ``detect``, pure; vectorised over all ranks. Invariants: NaN means not known and never spreads to a peer; a rank
with two or three peers, itself included, is compared with the others and has no z.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ckptd.detect.layout import Ids

Values = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

MANY: Final = 4  # ranks from which on their spread is worth something
_TRIM: Final = 0.2
_SIGMA: Final = 1.4826
# The MAD of n values is too large by a share of 2 / sqrt(n), or less, in nearly all cases.
_CHANCE: Final = 2.0
# What the MAD of n normal values is to be multiplied with besides (Croux and Rousseeuw 1992).
_SMALL: Final = np.array([1, 1, 1.196, 1.495, 1.363, 1.206, 1.200, 1.140, 1.129, 1.107])


@dataclass(frozen=True, slots=True)
class PeerSets:
    """Sets of ranks to compare. ``blocks``: for each size, one row of ranks a set. ``size``: of each rank's own set."""

    blocks: tuple[Ids, ...]
    size: Ids

    @classmethod
    def of(cls, ids: Ids) -> PeerSets:
        """From an id for each rank; -1 is in no set."""
        order = np.argsort(ids, kind="stable")
        numbers, starts, sizes = np.unique(ids[order], return_index=True, return_counts=True)
        size = np.zeros(len(ids), np.int64)
        blocks = []
        for n in np.unique(sizes):
            chosen = starts[(sizes == n) & (numbers >= 0)]
            if n < 2 or not len(chosen):
                continue
            block = order[chosen[:, None] + np.arange(n)]
            size[block] = n
            blocks.append(block)
        return cls(tuple(blocks), size)

    def around(self, rank: int) -> Ids:
        """The ranks of ``rank``'s set without itself."""
        for block in self.blocks:
            if len(rows := np.flatnonzero((block == rank).any(axis=1))):
                others: Ids = block[rows[0]][block[rows[0]] != rank]
                return others
        return np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True)
class Scores:
    """By rank; NaN where not known. ``reference``: what the peers do, in the unit of the values; ``rho``: share above
    it; ``spread``: robust standard deviation of rho among peers; ``z``: rho in units of it, or of the floor."""

    reference: Values
    rho: Values
    spread: Values
    z: Values
    peers: Ids


def score(values: Values, sets: PeerSets, floor: Values | float) -> Scores:
    """``floor``: the least difference that counts as one standard deviation, in the unit of ``values``.

    The spread of a set is never taken as smaller than what is usual in all sets together, and as larger only as far as
    it is not by chance: among a handful of peers it is too small or too large too often.
    """
    reference, own = np.full((2, len(values)), np.nan)
    peers = np.zeros(len(values), np.int64)
    apart = np.full(len(values), np.nan)
    for block in sets.blocks:
        rows = values[block]
        medians, counts = _middle(rows)
        medians[medians <= 0] = np.nan  # nothing is a share of nothing
        peers[block] = counts[:, None]
        reference[block] = np.where(counts[:, None] < MANY, _others(rows), medians[:, None])
        away = np.abs(rows - medians[:, None]) / medians[:, None]
        factor = _factor(counts)
        surely = factor * _middle(away)[0] / (1 + _CHANCE / np.sqrt(np.maximum(counts, 1)))
        own[block] = np.where(counts >= MANY, surely, np.nan)[:, None]
        apart[block] = np.where(counts[:, None] >= MANY, away * factor[:, None], np.nan)
    usual = _middle(apart[None])[0][0]
    spread = np.where(np.isfinite(own), np.fmax(own, usual), np.nan)
    reference[reference <= 0] = np.nan
    rho = (values - reference) / reference
    with np.errstate(invalid="ignore", divide="ignore"):
        z = rho / np.fmax(spread, floor / reference)
    z[~np.isfinite(spread)] = np.nan
    return Scores(reference, rho, spread, z, peers)


def window_values(self_s: npt.NDArray[Any], is_fast: bool) -> Values:
    """One self time a rank, from ranks x steps. Fast: the shortest step. Else the mean without the fifth that is
    longest and the fifth that is shortest, so that a stall is not taken for slowness. NaN when half is missing."""
    if is_fast:
        return np.asarray(self_s.min(axis=1), np.float64)
    ordered = np.sort(self_s, axis=1)
    steps = self_s.shape[1]
    counts = steps - np.isnan(ordered).sum(axis=1) if np.isnan(ordered[:, -1]).any() else np.full(len(ordered), steps)
    values = np.full(len(ordered), np.nan)
    for count in np.unique(counts[2 * counts > steps]):
        cut = int(count * _TRIM)
        rows = slice(None) if count == steps and (counts == steps).all() else counts == count
        values[rows] = ordered[rows, cut : count - cut].mean(axis=1)
    return values


def median_of(rows: npt.NDArray[Any]) -> Values:
    """The median of each row, NaN left out."""
    return _middle(rows)[0]


def _middle(rows: npt.NDArray[Any]) -> tuple[Values, Ids]:
    """(median of each row without NaN, how many values it is of)."""
    ordered = np.sort(rows, axis=1)
    counts = ordered.shape[1] - np.isnan(ordered).sum(axis=1)
    at = np.arange(len(ordered))
    # counts 0 reads the last and the first, which both are NaN.
    return (0.5 * (ordered[at, (counts - 1) // 2] + ordered[at, counts // 2 - (counts == 0)])).astype(float), counts


def _others(rows: Values) -> Values:
    """For each value the median of the others of its row; only where few are known."""
    if rows.shape[1] >= 2 * MANY:
        return np.full(rows.shape, np.nan)
    without = [_middle(np.delete(rows, at, axis=1))[0] for at in range(rows.shape[1])]
    return np.stack(without, axis=1)


def _factor(counts: Ids) -> Values:
    large = counts / np.maximum(counts - 0.8, 1)
    return np.asarray(_SIGMA * np.where(counts < len(_SMALL), _SMALL[np.minimum(counts, len(_SMALL) - 1)], large))
