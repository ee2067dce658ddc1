"""The link matrix: which link, which side of a node or which node is slow, out of figures between pairs of places.

Layer: inside ``detect``. A place is a node or a rank; a ``Layer`` is one figure (larger is worse) for the directed
pairs in use. A two-way median polish on the logarithm splits it into a level, what all cells of a source share, what
all of a destination share, and what is left to the cell (C4D's delay matrix). Invariants: lower medians, so that of two
cells one slow one is a cell and not half a row; a row or column of one cell takes no blame; no figure, no cell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np

from ckptd.detect.baseline import (
    SLOW_RATIO,
    SLOW_SIGMAS,
    Bools,
    Floats,
    Ints,
    group_low_median,
)

_SWEEPS: Final = 3
_SIGMA_FLOOR: Final = 0.05  # of a logarithm: 5 %
_SIGMA_OF_MAD: Final = 1.4826
TINY: Final = 3  # places: no other to compare with once one is slow
_MANY: Final = 12  # cells or places: the spread of fewer says little
_WHOLE_SHARE: Final = 0.75  # of a node's cells: the node and not its links
_Effects = Mapping[int, tuple[float, float]]  # of places


class Side(StrEnum):
    """What of a place is slow; of a LINK the two places are its ends, and which of them cannot be told from here."""

    LINK = "link"
    SENDING = "sending"
    RECEIVING = "receiving"
    BOTH = "both"


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One figure of directed pairs. ``places``: their names; ``src`` and ``dst`` index them; ``values`` are positive,
    in ``unit``, each with an error of ``noise``, a share of it. ``is_relative``: 1.0 is known to be normal, so that a
    pair needs no other to be compared with."""

    figure: str
    unit: str
    places: tuple[str, ...]
    src: Ints
    dst: Ints
    values: Floats
    noise: float = 0.0
    is_relative: bool = False
    is_of_ranks: bool = False


@dataclass(frozen=True, slots=True)
class Slow:
    """What a layer shows. ``places``: indexes, one or a link's two; ``cells``: the pairs concerned. ``ratio``: to what
    is normal; ``z``: the same in robust sigmas. ``is_separable``: other pairs say that it is this and nothing else."""

    side: Side
    places: tuple[int, ...]
    ratio: float
    z: float
    cells: tuple[int, ...]
    is_separable: bool


@dataclass(frozen=True, slots=True, eq=False)
class LinkMatrix:
    """A layer judged, as data for a picture: one entry a used pair in ``src``, ``dst``, ``values`` and ``is_slow``."""

    layer: Layer
    is_slow: Bools
    findings: tuple[Slow, ...]

    def dense(self) -> Floats:
        """``values`` by source and destination; NaN where no pair is."""
        table = np.full((len(self.layer.places),) * 2, np.nan)
        table[self.layer.src, self.layer.dst] = self.layer.values
        return table


def link_matrix(layer: Layer) -> LinkMatrix:
    """``layer`` with its slow cells and what explains them."""
    rows, columns, rest = _polish(layer)
    sources, sinks = _effects(rows, layer.src, layer.noise), _effects(columns, layer.dst, layer.noise)
    cells, z = _cells(rest, layer.noise)
    findings = [_side(layer, place, sources, sinks) for place in sorted({*sources, *sinks})]
    explained = {cell for found in findings for cell in found.cells}
    findings += _links(layer, [cell for cell in cells.tolist() if cell not in explained], rest, z)
    is_slow = np.zeros(layer.values.size, np.bool_)
    for found in findings:
        is_slow[list(found.cells)] = True
    return LinkMatrix(layer, is_slow, tuple(sorted(findings, key=lambda found: -found.ratio)))


def by_node(layer: Layer, node_of: Ints, nodes: tuple[str, ...]) -> Layer:
    """``layer`` of ranks as one of nodes: of the pairs between two nodes the lower median."""
    code = node_of[layer.src] * len(nodes) + node_of[layer.dst]
    distinct, group = np.unique(code, return_inverse=True)
    src, dst = np.divmod(distinct, len(nodes))
    values = group_low_median(layer.values, group, distinct.size)
    return Layer(layer.figure, layer.unit, nodes, src, dst, values, layer.noise, layer.is_relative)


def _polish(layer: Layer) -> tuple[Floats, Floats, Floats]:
    """Of the logarithms: the effects of sources and of destinations, and what is left to each cell."""
    count = len(layer.places)
    rest = np.log(layer.values)
    rows, columns = np.zeros(count), np.zeros(count)
    if not rest.size or (layer.is_relative and places_used(layer) <= TINY):
        return rows, columns, rest
    rest = rest - _low(rest)
    # The usual case, and most of the cost. The spread of the cells is no measure here: a node may be a third of them.
    if np.abs(rest).max() <= SLOW_SIGMAS * max(layer.noise, _SIGMA_FLOOR):
        return rows, columns, rest
    for _ in range(_SWEEPS):
        for ends, effects in ((layer.src, rows), (layer.dst, columns)):
            shared = group_low_median(rest, ends, count)
            shared[np.bincount(ends, minlength=count) < 2] = 0.0
            effects += shared
            rest = rest - shared[ends]
    return rows, columns, rest - _low(rest)


def places_used(layer: Layer) -> int:
    return int(np.unique(np.concatenate([layer.src, layer.dst])).size)


def _low(values: Floats) -> float:
    return float(np.sort(values)[(values.size - 1) // 2])


def _sigma(values: Floats, centre: float, noise: float) -> float:
    """The spread of ``values``, not below the noise put in, since a polish of few cells a row fits part of it away;
    that alone where a fault may touch half of them."""
    is_told = values.size > (_MANY if noise else TINY)
    return max(_SIGMA_OF_MAD * _low(np.abs(values - centre)) if is_told else 0.0, noise, _SIGMA_FLOOR)


def _effects(effects: Floats, ends: Ints, noise: float) -> _Effects:
    """Places whose effect stands out: their excess over the usual one, and that in sigmas."""
    used = np.flatnonzero(np.bincount(ends, minlength=effects.size) >= 2)
    if not used.size:
        return {}
    usual = _low(effects[used])
    excess = effects[used] - usual
    z = excess / _sigma(effects[used], usual, noise)
    is_out = (excess > np.log(SLOW_RATIO)) & (z > SLOW_SIGMAS)
    return {int(used[at]): (float(excess[at]), float(z[at])) for at in np.flatnonzero(is_out)}


def _cells(rest: Floats, noise: float) -> tuple[Ints, Floats]:
    if not rest.size:
        return np.empty(0, np.int64), rest
    z = rest / _sigma(rest, 0.0, noise)
    return np.flatnonzero((rest > np.log(SLOW_RATIO)) & (z > SLOW_SIGMAS)), z


def _side(layer: Layer, place: int, sources: _Effects, sinks: _Effects) -> Slow:
    sends, receives = place in sources, place in sinks
    side = Side.BOTH if sends and receives else Side.SENDING if sends else Side.RECEIVING
    excess, z = max(found[place] for found in (sources, sinks) if place in found)
    concerned = ((layer.src == place) & sends) | ((layer.dst == place) & receives)
    return Slow(side, (place,), float(np.exp(excess)), z, tuple(np.flatnonzero(concerned).tolist()), True)


def _links(layer: Layer, cells: Sequence[int], rest: Floats, z: Floats) -> list[Slow]:
    """Slow cells as links; as a node where nearly all cells of one, to two others or more, are slow."""
    left, found = set(cells), []
    for place in _by_slow_cells(layer, cells):
        own = np.flatnonzero((layer.src == place) | (layer.dst == place))
        slow = [int(cell) for cell in own if int(cell) in left]
        others = {int(layer.src[cell] + layer.dst[cell]) - place for cell in slow}
        if len(others) >= 2 and len(slow) >= _WHOLE_SHARE * own.size:
            found.append(_slow(Side.BOTH, (place,), slow, rest, z, places_used(layer) > TINY))
            left -= set(slow)
    pairs: dict[tuple[int, int], list[int]] = {}
    for cell in sorted(left):
        ends = sorted((int(layer.src[cell]), int(layer.dst[cell])))
        pairs.setdefault((ends[0], ends[1]), []).append(cell)
    is_healthy = np.ones(layer.values.size, np.bool_)
    is_healthy[np.array(cells, np.int64)] = False
    sends = np.bincount(layer.src[is_healthy], minlength=len(layer.places)) > 0
    receives = np.bincount(layer.dst[is_healthy], minlength=len(layer.places)) > 0
    for ends_, own_cells in pairs.items():
        is_apart = bool((sends[layer.src[own_cells]] & receives[layer.dst[own_cells]]).all())
        found.append(_slow(Side.LINK, ends_, own_cells, rest, z, is_apart))
    return found


def _by_slow_cells(layer: Layer, cells: Sequence[int]) -> list[int]:
    """Places with two slow cells or more, those with most first."""
    at = np.array(cells, np.int64)
    count = np.bincount(np.concatenate([layer.src[at], layer.dst[at]]), minlength=len(layer.places))
    return [int(place) for place in np.argsort(-count, kind="stable") if count[place] > 1]


def _slow(side: Side, places: tuple[int, ...], at: list[int], rest: Floats, z: Floats, is_separable: bool) -> Slow:
    return Slow(side, places, float(np.exp(rest[at].max())), float(z[at].max()), tuple(at), is_separable)
