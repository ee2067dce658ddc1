"""What nodes' kernels know of the links between them, answer by answer, as layers of the link matrix.

Layer: inside ``detect``, above ``links``. One answer alone says little: two in a row have to be bad before a pair is.
A pair is compared with the others, and with its own past, since by nature links differ. Invariants: a pair that was
found slow does not become normal for it; one without two figures in a row has none; pairs are bounded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from ckptd.detect.baseline import Bools, Floats, Ints, Numbering
from ckptd.detect.links import Layer

# With the least noise of a logarithm: round trips are of one moment, and mostly of queues.
_FIGURES: Final = (("delivery", "s/MiB", 0.1), ("round_trip", "s", 0.75), ("retransmits", "", 0.1))
_SENT_AGAIN_USUAL: Final = 0.02  # of the segments
_PAST: Final = 12  # answers
_PAST_LEAST: Final = 2
_SPREAD_LEAST: Final = 4  # answers
_PAIRS_MOST: Final = 1 << 17
_SIGMA_OF_MAD: Final = 1.4826
_BY_TWO: Final = 2 / 3  # twice four sigmas are as much as six at once, and noise has heavier tails


@dataclass(frozen=True, slots=True)
class PeerLink:
    """What a node's kernel knows of its connections to another node (TCP_INFO); ``None``: not known. ``src`` and
    ``dst`` are nodes as ``Timings.nodes`` names them; ``retransmit_share``: of the segments."""

    src: str
    dst: str
    rtt_s: float | None = None
    retransmit_share: float | None = None
    delivery_bytes_per_s: float | None = None


def _figures_of(peer: PeerLink) -> tuple[float, ...]:
    """Larger is worse; NaN where not known."""
    delivery = 2**20 / peer.delivery_bytes_per_s if peer.delivery_bytes_per_s else np.nan
    again = np.nan if peer.retransmit_share is None else 1 + peer.retransmit_share / _SENT_AGAIN_USUAL
    return delivery, peer.rtt_s or np.nan, again


class KernelLinks:
    """See the module. Rows are pairs; ``_now``: the last two answers; ``_past``: those before."""

    def __init__(self, places: tuple[str, ...]) -> None:
        self._places = places
        self._index = {name: at for at, name in enumerate(places)}
        self._forget()

    def _forget(self) -> None:
        self._numbers = Numbering()
        self._code: Ints = np.empty(0, np.int64)
        self._now = np.full((0, 2, len(_FIGURES)), np.nan)
        self._past = np.full((0, _PAST, len(_FIGURES)), np.nan)
        self._learnt: Ints = np.empty(0, np.int64)

    def take(self, peers: Iterable[PeerLink], slow: Ints) -> None:
        """A new answer. ``slow``: numbers of pairs, as ``pair`` gives them, that the last one showed to be slow."""
        at = self._index
        known = [peer for peer in peers if peer.src in at and peer.dst in at and peer.src != peer.dst]
        codes = np.array([self.pair(at[peer.src], at[peer.dst]) for peer in known], np.int64)
        if len(self._numbers) + codes.size > _PAIRS_MOST:
            self._forget()
        self._learn(np.isin(self._code, slow))
        rows = self._rows_of(codes)
        self._now[:, 0] = self._now[:, 1]
        self._now[:, 1] = np.nan
        self._now[rows, 1] = np.log(np.array([_figures_of(peer) for peer in known]).reshape(-1, len(_FIGURES)))

    def pair(self, src: int, dst: int) -> int:
        return src * len(self._places) + dst

    def _rows_of(self, codes: Ints) -> Ints:
        rows = self._numbers.of(codes)
        new = len(self._numbers) - self._code.size
        if new:
            self._code = np.concatenate([self._code, np.zeros(new, np.int64)])
            self._learnt = np.concatenate([self._learnt, np.zeros(new, np.int64)])
            self._now = np.concatenate([self._now, np.full((new, *self._now.shape[1:]), np.nan)])
            self._past = np.concatenate([self._past, np.full((new, *self._past.shape[1:]), np.nan)])
            self._code[rows] = codes
        return rows

    def _learn(self, is_slow: Bools) -> None:
        """What is two answers old becomes past."""
        rows = np.flatnonzero(~is_slow & np.isfinite(self._now[:, 0]).any(axis=1))
        self._past[rows, self._learnt[rows] % _PAST] = self._now[rows, 0]
        self._learnt[rows] += 1

    def layers(self) -> tuple[Layer, ...]:
        """Of each figure: as it is, and over the pair's own past."""
        layers = []
        for at, (figure, unit, least) in enumerate(_FIGURES):
            now = self._now[:, :, at].min(axis=1)  # the better of the two; NaN when one is
            past, spread, count = _middle(self._past[:, :, at])
            told = spread[count >= _SPREAD_LEAST]
            noise = _BY_TWO * (max(float(np.median(told)), least) if told.size else least)
            layers.append(self._layer(figure, unit, now, noise))
            past[count < _PAST_LEAST] = np.nan
            layers.append(replace(self._layer(f"{figure}_change", "", now - past, noise), is_relative=True))
        return tuple(layer for layer in layers if layer.values.size)

    def _layer(self, figure: str, unit: str, logs: Floats, noise: float) -> Layer:
        rows = np.flatnonzero(np.isfinite(logs))
        src, dst = np.divmod(self._code[rows], len(self._places))
        return Layer(figure, unit, self._places, src, dst, np.exp(logs[rows]), noise)


def _middle(values: Floats) -> tuple[Floats, Floats, Ints]:
    """Of each row the lower median, the spread as a standard deviation, and how many values are no NaN."""
    count = np.isfinite(values).sum(axis=1)
    row = np.arange(len(values))
    middle = np.sort(values, axis=1)[row, np.maximum(count - 1, 0) // 2]  # NaN come last
    away = np.sort(np.abs(values - middle[:, None]), axis=1)
    # The upper median: the value in the middle is away from itself by nothing, and few are left.
    return middle, _SIGMA_OF_MAD * away[row, np.minimum(count // 2, values.shape[1] - 1)], count
