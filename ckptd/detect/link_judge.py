"""Faults of links and of nodes' network sides, out of point-to-point transfers and of figures of kernels.

Layer: inside ``detect``, above ``links`` and ``kernel_links``. Invariants: kernels alone confirm nothing, since figures
of theirs may be bad while nothing that the job does takes longer: they tell where it is that transfers are slow. Of a
node that is found, and a link that ends there, the node is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ckptd.detect.baseline import (
    BUCKETS,
    CLEAR_RATIO,
    LEAST_EXCESS_S,
    SLOW_RATIO,
    Columns,
    Ints,
    Tracks,
)
from ckptd.detect.kernel_links import KernelLinks, PeerLink
from ckptd.detect.links import TINY, Layer, LinkMatrix, Side, Slow, by_node, link_matrix, places_used
from ckptd.detect.records import Confidence, Fault, Kind

_FEW_CELLS: Final = 6
_PAIRS_MOST: Final = 16  # in the evidence
_EXPLAINED: Final = 0.75  # of a link's excess, by logarithm
_DOMINANT: Final = 0.5  # of the largest excess
_LASTING: Final = 3  # answers of kernels after the first, where no transfer is slow
_SIDES: Final = {Side.SENDING: "the sending side", Side.RECEIVING: "the receiving side", Side.BOTH: "the network side"}

_Proof = tuple[Layer, Slow]
_Findings = dict[tuple[str, ...], list[_Proof]]  # by the nodes that they name


@dataclass(frozen=True, slots=True)
class _Seen:
    """Since when a finding is made: the windows its pairs had closed by then, a mean, and kernels' answers since."""

    windows: float
    answers: int
    since_step: int


class LinkJudge:
    """See the module. A finding of transfers is confirmed when it holds while its pairs close another window; never, in
    a job of more than two places, where it could as well be something else."""

    def __init__(self, places: tuple[str, ...], place_of: Ints) -> None:
        """``places``: names of nodes; ``place_of``: the index of each rank's."""
        self.places, self.place_of = places, place_of
        self.tracks = Tracks()
        self.matrices: tuple[LinkMatrix, ...] = ()
        self._ranks = tuple(f"rank {rank}" for rank in range(place_of.size))
        self._kernels = KernelLinks(places)
        self._of_kernels: tuple[Layer, ...] = ()
        self._seen: dict[tuple[str, ...], _Seen] = {}

    def take(self, transfers: Columns, src: Ints, dst: Ints) -> None:
        """Adds point-to-point transfers from ranks ``src`` to ``dst``. Those inside a node are no network."""
        between = self.place_of[src] != self.place_of[dst]
        pairs = replace(transfers, channel=src * self.place_of.size + dst).pick(between)
        self.tracks.take(pairs, np.zeros(pairs.seq.size, np.int64))

    def judge(
        self, peers: Sequence[PeerLink] | None = None, slow: Sequence[Ints] = (), firm: Sequence[Ints] = ()
    ) -> list[Fault]:
        """The faults as they are now, the worst first. ``peers``: a new answer of the kernels, or None. ``slow``: the
        places of each slow communicator; within those, kernels are believed at once. ``firm``: of those that are slow
        in two windows, which confirm what stands out there."""
        if peers is not None:
            self._kernels.take(peers, self._slow_pairs())
            self._of_kernels = self._kernels.layers()
        by_rank = self._pair_layers()
        layers = [by_node(layer, self.place_of, self.places) for layer in by_rank]
        layers += self._of_kernels
        layers += by_rank if len(self.places) < self.place_of.size else []
        self.matrices = tuple(link_matrix(layer) for layer in layers if layer.values.size)
        found = self._found()
        self._seen = {key: self._count(key, proofs, peers is not None) for key, proofs in found.items()}
        told = {key: proofs for key, proofs in found.items() if self._is_told(key, proofs, slow)}
        least = _DOMINANT * max((_ratio(proofs) - 1 for proofs in told.values()), default=0.0)
        # Where a link is slow others are used in another rhythm, and their figures change a little.
        told = {key: of for key, of in told.items() if self._has_transfers(of) or _ratio(of) - 1 >= least}
        faults = [self._fault(key, proofs, self._is_within(key, firm)) for key, proofs in told.items()]
        return sorted(faults, key=lambda fault: -fault.evidence["ratio"])

    def _slow_pairs(self) -> Ints:
        """The pairs that kernels' figures show to be slow."""
        matrices = [matrix for matrix in self.matrices if matrix.layer in self._of_kernels]
        codes = [m.layer.src[m.is_slow] * len(self.places) + m.layer.dst[m.is_slow] for m in matrices]
        return np.concatenate([np.empty(0, np.int64), *codes])

    def _is_told(self, key: tuple[str, ...], proofs: Sequence[_Proof], slow: Sequence[Ints]) -> bool:
        """Kernels alone are believed where transfers are slow, or once they have said the same for long; never of two
        nodes, between which there is nothing to narrow down."""
        if self._has_transfers(proofs):
            return True
        if len(self.places) < TINY:
            return False
        is_felt = self._is_within(key, slow) or bool(self._concerned(key)["streak"].any())
        return is_felt or self._seen[key].answers >= _LASTING

    def _is_within(self, key: tuple[str, ...], communicators: Sequence[Ints]) -> bool:
        at = [self.places.index(node) for node in key]
        return any(np.isin(at, places).all() for places in communicators)

    def _has_transfers(self, proofs: Sequence[_Proof]) -> bool:
        return any(layer not in self._of_kernels for layer, _ in proofs)

    def _pair_layers(self) -> list[Layer]:
        """The last windows of pairs of ranks, of the size that takes most time: as such, and over their own past."""
        state = self.tracks.state
        rows = np.flatnonzero(state["closed"] > 0)
        if not rows.size:
            return []
        buckets = self.tracks.buckets[rows]
        rows = rows[buckets == np.argmax(np.bincount(buckets, weights=state["latest_s"][rows]))]
        src, dst = np.divmod(self.tracks.channels[rows], self.place_of.size)
        latest, past, is_above = (state[name][rows] for name in ("latest_s", "past_s", "is_above_past"))
        has = past > 0
        noise = 2 * float(np.median(state["noise_s"][rows] / latest))  # of a difference between sums of cells
        change = np.divide(latest, past, out=np.ones(rows.size), where=has)
        change = np.where(is_above, change, np.minimum(change, SLOW_RATIO))
        of_all = Layer("transfer", "s", self._ranks, src, dst, latest, noise, is_of_ranks=True)
        of_known = replace(of_all, src=src[has], dst=dst[has], values=change[has], is_relative=True)
        return [of_all, replace(of_known, figure="change", unit="")]

    def _found(self) -> _Findings:
        """Findings by the nodes they name; those between ranks where no finding between nodes says as much."""
        found: _Findings = {}
        weak: _Findings = {}
        for is_of_ranks in (False, True):
            named = {node for key in found for node in key}
            for matrix in self.matrices:
                for slow in matrix.findings if matrix.layer.is_of_ranks == is_of_ranks else ():
                    at = [self.place_of[place] if is_of_ranks else place for place in slow.places]
                    names = self.places if is_of_ranks else matrix.layer.places
                    key = tuple(sorted(names[place] for place in at))
                    if _is_worth(matrix, slow) and not named & set(key):
                        where = weak if self._is_weak(matrix.layer) else found
                        where.setdefault(key, []).append((matrix.layer, slow))
        return _merged(_with_nodes(found, weak) if found else weak)

    def _is_weak(self, layer: Layer) -> bool:
        """Kernels' figures as they are, over the pair's past not: flows that share a link slow one another down."""
        return layer in self._of_kernels and not layer.is_relative

    def _concerned(self, key: tuple[str, ...]) -> npt.NDArray[np.void]:
        """The tracks of the pairs between two nodes, or from and to one."""
        src, dst = (self.place_of[ends] for ends in np.divmod(self.tracks.channels, self.place_of.size))
        at = [self.places.index(node) for node in key]
        of_src, of_dst = np.isin(src, at), np.isin(dst, at)
        return np.asarray(self.tracks.state[of_src & of_dst if len(at) > 1 else of_src | of_dst])

    def _count(self, key: tuple[str, ...], proofs: Sequence[_Proof], is_new_answer: bool) -> _Seen:
        tracks = self._concerned(key)
        since = tracks["since"][tracks["streak"] > 0] if tracks["streak"].any() else tracks["began"]
        fresh = _Seen(_mean(tracks["closed"]), 0, int(since.min()) if since.size else -1)
        seen = self._seen.get(key, fresh)
        is_again = key in self._seen and is_new_answer and any(layer in self._of_kernels for layer, _ in proofs)
        return replace(seen, answers=seen.answers + is_again)

    def _fault(self, key: tuple[str, ...], proofs: Sequence[_Proof], is_borne_out: bool) -> Fault:
        own = [proof for proof in proofs if (proof[1].side is Side.LINK) == (len(key) > 1)]
        layer, slow = max(own, key=lambda proof: proof[1].ratio)
        seen, tracks = self._seen[key], self._concerned(key)
        is_again = _mean(tracks["closed"]) >= seen.windows + 1 and self._has_transfers(proofs)
        is_repeated = is_again or _mean(tracks["streak"][tracks["streak"] > 0] > 1) >= 0.5
        is_separable = any(proof.is_separable for _, proof in own)
        is_firm = is_repeated and (is_separable or len(self.places) == 2)
        is_firm |= is_borne_out and is_separable and not all(self._is_weak(layer) for layer, _ in proofs)
        where = f"the link between {' and '.join(key)}" if len(key) > 1 else f"{_SIDES[slow.side]} of {key[0]}"
        doubt = "" if is_separable else "; it may as well be one end of it" if len(key) > 1 else "; or links of it"
        return Fault(
            Kind.SLOW_LINK,
            self._ends(key, layer, slow),
            key,
            Confidence.CONFIRMED if is_firm else Confidence.SUSPECT,
            seen.since_step,
            {
                "summary": f"{where} is {slow.ratio:.1f} times slower than is normal{doubt}",
                "side": slow.side.value,
                "ratio": round(slow.ratio, 3),
                "z": round(slow.z, 1),
                "is_separable": is_separable,
                "figures": {proof[0].figure: round(proof[1].ratio, 3) for proof in proofs},
                "pairs": [
                    [layer.places[layer.src[at]], layer.places[layer.dst[at]]] for at in slow.cells[:_PAIRS_MOST]
                ],
            },
        )

    def _ends(self, key: tuple[str, ...], layer: Layer, slow: Slow) -> tuple[int, ...]:
        """The ranks at the ends: those that the pairs name, else all of the nodes."""
        if layer.is_of_ranks:
            return slow.places
        of_nodes = np.flatnonzero(np.isin(self.place_of, [self.places.index(node) for node in key]))
        used = np.concatenate(np.divmod(self._concerned(key)["code"] // BUCKETS, self.place_of.size))
        named = of_nodes[np.isin(of_nodes, used)]
        return tuple((named if named.size else of_nodes).tolist())


def _with_nodes(found: _Findings, weak: _Findings) -> _Findings:
    """``found``; and of links that could as well be one of their ends, the end that is shown weakly, when one only is
    and it explains the link."""
    chosen: _Findings = {}
    for key, proofs in found.items():
        if len(key) > 1 and not any(slow.is_separable for _, slow in proofs):
            least = _ratio(proofs) ** _EXPLAINED
            ends: _Findings = {
                at: weak[at] for at in ((node,) for node in key) if at in weak and _ratio(weak[at]) > least
            }
            chosen |= ends if len(ends) == 1 else {}
    return {**chosen, **found}


def _ratio(proofs: Sequence[_Proof]) -> float:
    return max(slow.ratio for _, slow in proofs)


def _merged(found: _Findings) -> _Findings:
    """Without links of a node that is surely found: what shows those shows the node."""
    sure = {key[0] for key, proofs in found.items() if len(key) == 1 and any(slow.is_separable for _, slow in proofs)}
    merged = {key: list(proofs) for key, proofs in found.items() if len(key) == 1 or sure.isdisjoint(key)}
    for key in found.keys() - merged.keys():
        for node in sure & set(key):
            merged[node,] += found[key]
    return merged


def _mean(values: npt.NDArray[Any]) -> float:
    return float(values.mean()) if values.size else 0.0


def _is_worth(matrix: LinkMatrix, slow: Slow) -> bool:
    """False for what is too little to be told from the error of a stamp, or has too few to be compared with."""
    layer, values = matrix.layer, matrix.layer.values
    if layer.is_relative:
        return True
    if places_used(layer) < TINY or (values.size < _FEW_CELLS and slow.ratio < CLEAR_RATIO):
        return False
    return layer.unit != "s" or float(values[list(slow.cells)].max()) * (1 - 1 / slow.ratio) > LEAST_EXCESS_S
