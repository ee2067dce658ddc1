"""Faults over time: what was found again is one fault whose confidence grows, what is not found any more is resolved.

Judges look at different moments, each at faults of its own family; only what a judge could have found again is counted
as missed. Bounded: the newest resolved faults are kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

from ckptd.detect.records import Confidence, Fault, Kind

RANKING: Final = {Confidence.SUSPECT: 0, Confidence.CONFIRMED: 1, Confidence.VERIFIED: 2}
_MOST_RESOLVED: Final = 256


class Family(Enum):
    """Who finds a kind, and after how many looks without it the fault is over."""

    STOP = 1
    COMPUTE = 3
    COMMUNICATION = 2


FAMILIES: Final = {
    Kind.SLOW_COMPUTE: Family.COMPUTE,
    Kind.SLOW_LINK: Family.COMMUNICATION,
    Kind.SLOW_COMM: Family.COMMUNICATION,
    Kind.HANG: Family.STOP,
    Kind.COMM_HANG: Family.STOP,
    Kind.DESYNC: Family.STOP,
    Kind.DEATH: Family.STOP,
}


@dataclass(frozen=True, slots=True)
class Logged:
    """A fault and when it was there, in the caller's seconds; ``resolved_s`` None while it lasts."""

    fault: Fault
    first_seen_s: float
    resolved_s: float | None = None
    misses: int = 0


class FaultLog:
    """See the module. ``open`` are the faults that last, oldest first."""

    def __init__(self) -> None:
        self.open: list[Logged] = []
        self.resolved: deque[Logged] = deque(maxlen=_MOST_RESOLVED)

    def update(self, family: Family, found: Sequence[Fault], now_s: float) -> bool:
        """Take what one look at ``family`` found; True when what is open has changed in more than its evidence."""
        before = [_identity(logged.fault) for logged in self.open]
        left = list(found)
        kept: list[Logged] = []
        for logged in self.open:
            if FAMILIES[logged.fault.kind] is not family:
                kept.append(logged)
                continue
            again = next((fault for fault in left if _is_same(logged.fault, fault)), None)
            if again is not None:
                left.remove(again)
                kept.append(replace(logged, fault=_merged(logged.fault, again), misses=0))
            elif logged.misses + 1 < family.value:
                kept.append(replace(logged, misses=logged.misses + 1))
            else:
                self.resolved.append(replace(logged, resolved_s=now_s))
        self.open = kept + [Logged(fault, now_s) for fault in left]
        return before != [_identity(logged.fault) for logged in self.open]

    def verify(self, fault: Fault) -> bool:
        """A test said so: the open fault that ``fault`` is becomes verified; False when none is."""
        for at, logged in enumerate(self.open):
            if _is_same(logged.fault, fault):
                self.open[at] = replace(logged, fault=_merged(logged.fault, fault))
                return True
        return False


def _identity(fault: Fault) -> tuple[Kind, tuple[int, ...], tuple[str, ...], Confidence]:
    return fault.kind, fault.ranks, fault.nodes, fault.confidence


def _is_same(known: Fault, found: Fault) -> bool:
    """The same kind at the same place; a place that grew, a rank becoming its node, is the same."""
    if known.kind is not found.kind:
        return False
    if known.ranks and found.ranks:
        return not set(known.ranks).isdisjoint(found.ranks)
    if known.nodes and found.nodes:
        return not set(known.nodes).isdisjoint(found.nodes)
    return (known.ranks, known.nodes) == (found.ranks, found.nodes)


def _merged(known: Fault, found: Fault) -> Fault:
    """What was found last, with the higher confidence of the two and the earlier step."""
    steps = [fault.since_step for fault in (known, found) if fault.since_step >= 0]
    confidence = max(known.confidence, found.confidence, key=RANKING.__getitem__)
    # A weaker look does not widen what a stronger one had narrowed down.
    place = found if RANKING[found.confidence] >= RANKING[known.confidence] else known
    # What a test has shown stays with it.
    tested = {"probe": known.evidence["probe"]} if "probe" in known.evidence else {}
    return replace(
        found,
        ranks=place.ranks,
        nodes=place.nodes,
        confidence=confidence,
        since_step=min(steps, default=-1),
        evidence={**tested, **found.evidence},
    )
