"""A probe: the nodes of a run measured against each other in two rounds of pairs, driven by the daemon that was asked.

Never begun by a daemon itself. Invariants: pairs that are measured at the same time have no node in common; what is
slow is measured again, alone, before it is said, and the best time counts, as a disturbance only ever slows; a node
that does not answer costs deadlines and is named; nothing begins after ``TOTAL_S``.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, TypeVar

from ckptd.detect.pairing import PairResult, PairVerdict, first_round, judge_pairs, second_round
from ckptd.serve.diagnosis.node_speed import NodeSpeed
from ckptd.serve.diagnosis.slow_cores import NodeVerdict, judge_speeds

TOTAL_S: Final = 60.0
_AT_ONCE: Final = 128
_AGAIN: Final = 2
# Below it a round trip is that of the call, and says more of processors than of the link.
_TRIP_OF_CALL_S: Final = 1e-3
Asked = TypeVar("Asked")
Got = TypeVar("Got")


@dataclass(frozen=True, slots=True)
class Measured:
    """Two nodes: bytes per second to ``a`` and to ``b``, and the longer of the round trips; None: not known. With a
    ``problem`` they do not reach each other."""

    a: str
    b: str
    to_a: float | None = None
    to_b: float | None = None
    round_trip_s: float | None = None
    problem: str = ""

    @property
    def result(self) -> PairResult:
        ways = [way for way in (self.to_a, self.to_b) if way is not None]
        if self.problem or not ways:
            return PairResult(self.a, self.b, None, None)
        return PairResult(self.a, self.b, min(ways), max(self.round_trip_s or 0.0, _TRIP_OF_CALL_S))

    def or_better(self, other: Measured) -> Measured:
        """What both times have in common: the link at its best."""
        if self.problem or other.problem:
            return other if self.problem else self
        trips = [trip for trip in (self.round_trip_s, other.round_trip_s) if trip is not None]
        to_a, to_b = _faster(self.to_a, other.to_a), _faster(self.to_b, other.to_b)
        return Measured(self.a, self.b, to_a, to_b, min(trips, default=None))


@dataclass(slots=True)
class Outcome:
    """What a probe has found so far. ``speeds``: by node, a text where there is a problem instead."""

    pairs: list[Measured] = field(default_factory=list)
    verdicts: list[PairVerdict] = field(default_factory=list)
    speeds: dict[str, NodeSpeed | str] = field(default_factory=dict)
    slow_nodes: list[NodeVerdict] = field(default_factory=list)
    not_measured: int = 0


class Probe:
    """One probe. ``measure_pair`` and ``measure_node`` ask for a measurement; both end by their own deadlines.
    ``now_s`` and ``until_s`` are of one clock."""

    def __init__(
        self,
        nodes: Sequence[str],
        measure_pair: Callable[[str, str], Measured],
        measure_node: Callable[[str], NodeSpeed | str],
        until_s: float,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.outcome = Outcome()
        self._nodes = tuple(nodes)
        self._measure_pair = measure_pair
        self._measure_node = measure_node
        self._until_s = until_s
        self._now_s = now_s

    def run(self, *, has_compute: bool) -> Generator[str, None, None]:
        """Yields what begins. InvalidRequest with fewer than two nodes, or one named twice."""
        wanted = first_round(self._nodes)
        with ThreadPoolExecutor(min(len(self._nodes), _AT_ONCE), thread_name_prefix="probe") as pool:
            if has_compute:
                yield from self._speeds(pool)
            yield from self._links(pool, wanted)

    def _links(self, pool: ThreadPoolExecutor, wanted: Sequence[tuple[str, str]]) -> Generator[str, None, None]:
        yield f"first round: {_count(wanted, 'pair')}"
        first = self._pairs(pool, wanted)
        wanted = second_round([pair.result for pair in first]) if first else []
        yield f"second round, with others: {_count(wanted, 'pair')}"
        second = self._pairs(pool, wanted)
        looks: Counter[tuple[str, str]] = Counter()
        while doubtful := [pair for pair, most in _doubtful(first, second) if looks[pair] < most]:
            looks.update(doubtful)
            yield f"what is slow again, one by one: {_count(doubtful, 'pair')}"
            again = {(pair.a, pair.b): pair for pair in self._measured(pool, [[pair] for pair in doubtful])}
            first, second = (
                [pair.or_better(again.get((pair.a, pair.b), pair)) for pair in pairs] for pairs in (first, second)
            )
        self.outcome.pairs = [*first, *second]
        self.outcome.verdicts = _judged(first, second)

    def _measured(self, pool: ThreadPoolExecutor, waves: Iterable[Sequence[tuple[str, str]]]) -> list[Measured]:
        return [got for _, got in self._each(pool, waves, lambda pair: self._measure_pair(*pair))]

    def _pairs(self, pool: ThreadPoolExecutor, wanted: Sequence[tuple[str, str]]) -> list[Measured]:
        found = self._measured(pool, _waves(wanted))
        self.outcome.not_measured += len(wanted) - len(found)
        return found

    def _speeds(self, pool: ThreadPoolExecutor) -> Generator[str, None, None]:
        yield f"cores of {_count(self._nodes, 'node')}"
        speeds = dict(self._each(pool, [self._nodes], self._measure_node))
        self.outcome.not_measured += len(self._nodes) - len(speeds)
        looks: Counter[str] = Counter()
        while doubtful := [slow.node for slow in judge_speeds(_known(speeds)) if looks[slow.node] < _AGAIN]:
            looks.update(doubtful)
            yield f"what is slow again, one by one: {_count(doubtful, 'node')}"
            for node, again in self._each(pool, [[node] for node in doubtful], self._measure_node):
                speeds[node] = _better(speeds[node], again)
        self.outcome.speeds = speeds
        self.outcome.slow_nodes = judge_speeds(_known(speeds))

    def _each(
        self, pool: ThreadPoolExecutor, waves: Iterable[Sequence[Asked]], measure: Callable[[Asked], Got]
    ) -> list[tuple[Asked, Got]]:
        """One wave after the other, each at once; those that would begin after the end are left out."""

        def unless_late(asked: Asked) -> tuple[Asked, Got] | None:
            return (asked, measure(asked)) if self._now_s() < self._until_s else None

        return [got for wave in waves for got in pool.map(unless_late, wave) if got is not None]


def _judged(first: Sequence[Measured], second: Sequence[Measured]) -> list[PairVerdict]:
    return judge_pairs([pair.result for pair in first], [pair.result for pair in second])


def _doubtful(first: Sequence[Measured], second: Sequence[Measured]) -> list[tuple[tuple[str, str], int]]:
    """The pairs of a verdict, and how often each is measured again at most: what failed, once, as that takes long."""
    blamed = [pair for verdict in _judged(first, second) for pair in verdict.pairs]
    return sorted({((pair.a, pair.b), 1 if pair.bytes_per_s is None else _AGAIN) for pair in blamed})


def _known(speeds: dict[str, NodeSpeed | str]) -> dict[str, NodeSpeed]:
    return {node: speed for node, speed in speeds.items() if isinstance(speed, NodeSpeed)}


def _better(one: NodeSpeed | str, other: NodeSpeed | str) -> NodeSpeed | str:
    if isinstance(one, NodeSpeed) and isinstance(other, NodeSpeed):
        return NodeSpeed(min(one.product_s, other.product_s), min(one.copy_s, other.copy_s))
    return one


def _faster(one: float | None, other: float | None) -> float | None:
    return max((way for way in (one, other) if way is not None), default=None)


def _waves(pairs: Iterable[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """All of ``pairs``, in as few sets as follow from taking each into the first where its nodes are not yet."""
    waves: list[list[tuple[str, str]]] = []
    busy: list[set[str]] = []
    for pair in pairs:
        at = next((at for at, nodes in enumerate(busy) if nodes.isdisjoint(pair)), len(waves))
        if at == len(waves):
            waves.append([])
            busy.append(set())
        waves[at].append(pair)
        busy[at].update(pair)
    return waves


def _count(things: Sequence[object], what: str) -> str:
    return f"{len(things)} {what}{'' if len(things) == 1 else 's'}"
