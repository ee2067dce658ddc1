"""Which nodes or links are slow, by measuring pairs of nodes in two rounds.

Layer: inside ``detect``. DLRover's node check: in the first round every node is measured with some other, in
the second the slow with the fast. Invariants: a pair that is fast clears both its nodes; a node is blamed
with certainty only when it is slow with two others, one of them cleared, so a slow link alone never blames a node.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import inf
from statistics import median_low
from typing import Final

from ckptd.errors import InvalidRequest

FACTOR: Final = 1.3
_TRIP_EXCESS_S: Final = 2e-4  # a round trip that differs by less is as good
_PARTNERS_LEAST: Final = 2


class Blame(StrEnum):
    NODE = "node"
    LINK = "link"


@dataclass(frozen=True, slots=True)
class PairResult:
    """What was measured between ``a`` and ``b``; ``None``: it failed, they do not reach each other."""

    a: str
    b: str
    bytes_per_s: float | None
    round_trip_s: float | None


@dataclass(frozen=True, slots=True)
class PairVerdict:
    """``nodes``: the slow node, or the two ends of a slow link. ``is_certain``: False where the pairs measured leave it
    open whether it is the link or one of its ends. ``slowdown``: against the median node, None when unreachable."""

    blame: Blame
    nodes: tuple[str, ...]
    is_certain: bool
    slowdown: float | None
    pairs: tuple[PairResult, ...]


def first_round(nodes: Sequence[str]) -> list[tuple[str, str]]:
    """Neighbours in ``nodes``; of an odd count the last is paired with the first, which is measured twice.

    InvalidRequest with fewer than two nodes, or one named twice.
    """
    if len(nodes) < 2 or len(set(nodes)) < len(nodes):
        raise InvalidRequest(
            f"{len(nodes)} nodes to pair, {len(set(nodes))} of them different", "name two or more, once"
        )
    pairs = list(zip(nodes[::2], nodes[1::2], strict=False))
    return pairs if len(nodes) % 2 == 0 else [*pairs, (nodes[-1], nodes[0])]


def second_round(results: Sequence[PairResult]) -> list[tuple[str, str]]:
    """The slower half of the nodes with the faster half: with four nodes or more nobody meets a partner again, as
    partners are next to each other in the order of cost. Of an odd count, who was measured twice is so again, and with
    a third node: it would otherwise meet one of its two partners."""
    partners, cost = _partners(results), _best(results)
    twice = max(partners, key=lambda node: len(partners[node])) if len(partners) % 2 else None
    order = sorted((node for node in partners if node != twice), key=lambda node: cost[node])
    half = len(order) // 2
    pairs = list(zip(order[:half], order[half:], strict=True))
    if twice is not None:
        pairs.append((next((node for node in order if node not in partners[twice]), order[0]), twice))
    return pairs


def judge_pairs(
    round1: Sequence[PairResult], round2: Sequence[PairResult], factor: float = FACTOR
) -> list[PairVerdict]:
    """Slow or unreachable nodes and links, certain ones first. A pair is slow when it fails, or takes more than
    ``factor`` of the median node's best, in time a byte or in round trips. Two nodes are only found unreachable:
    there is nothing to compare with."""
    results = (*round1, *round2)
    slow = [
        (result, slowdown)
        for result, slowdown in zip(results, _slowdowns(results), strict=True)
        if slowdown is None or slowdown > factor
    ]
    slow_pairs = [result for result, _ in slow]
    is_slow = set(slow_pairs)
    cleared = {node for result in results if result not in is_slow for node in (result.a, result.b)}
    partners = _partners(slow_pairs)
    guilty = [
        node
        for node, others in partners.items()
        if node not in cleared and len(others) >= _PARTNERS_LEAST and others & cleared
    ]
    links = dict.fromkeys(tuple(sorted((r.a, r.b))) for r in slow_pairs if {r.a, r.b}.isdisjoint(guilty))
    verdicts = [_verdict(Blame.NODE, (node,), True, slow) for node in guilty]
    verdicts += [_verdict(Blame.LINK, ends, cleared.issuperset(ends), slow) for ends in links]
    return sorted(verdicts, key=lambda verdict: (not verdict.is_certain, verdict.blame is Blame.LINK, verdict.nodes))


def _verdict(
    blame: Blame, nodes: tuple[str, ...], is_certain: bool, slow: Sequence[tuple[PairResult, float | None]]
) -> PairVerdict:
    own = [(result, slowdown) for result, slowdown in slow if {result.a, result.b}.issuperset(nodes)]
    known = [slowdown for _, slowdown in own if slowdown is not None]
    slowdown = max(known) if len(known) == len(own) else None
    return PairVerdict(blame, nodes, is_certain, slowdown, tuple(result for result, _ in own))


def _partners(results: Iterable[PairResult]) -> dict[str, set[str]]:
    partners: dict[str, set[str]] = {}
    for result in results:
        partners.setdefault(result.a, set()).add(result.b)
        partners.setdefault(result.b, set()).add(result.a)
    return partners


def _costs(results: Iterable[PairResult]) -> list[tuple[float, float]]:
    """Seconds a byte, and of a round trip; infinite where the pair failed."""
    return [
        (1 / r.bytes_per_s, r.round_trip_s) if r.bytes_per_s and r.round_trip_s is not None else (inf, inf)
        for r in results
    ]


def _best(results: Sequence[PairResult]) -> dict[str, tuple[float, float]]:
    """The least cost of each node, each measure by itself."""
    best: dict[str, tuple[float, float]] = {}
    for result, cost in zip(results, _costs(results), strict=True):
        for node in (result.a, result.b):
            byte_s, trip_s = best.get(node, (inf, inf))
            best[node] = (min(byte_s, cost[0]), min(trip_s, cost[1]))
    return best


def _slowdowns(results: Sequence[PairResult]) -> list[float | None]:
    """How much slower than the median node's best each pair is, by its worse measure; None where it failed."""
    best = _best(results).values()
    if not best:
        return []
    usual_byte_s, usual_trip_s = (median_low(measure) for measure in zip(*best, strict=True))
    slowdowns: list[float | None] = []
    for byte_s, trip_s in _costs(results):
        by_trip = trip_s / usual_trip_s if trip_s - usual_trip_s > _TRIP_EXCESS_S else 1.0
        slowdowns.append(None if byte_s == inf else max(byte_s / usual_byte_s, by_trip))
    return slowdowns
