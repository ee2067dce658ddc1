"""Which snapshots a restore may use, best first. Pure.

Newest means: of the highest ordinal known, its highest complete step; else the snapshot it restored itself (its
recorded parent), and so on down the chain. So an abandoned branch never wins: when step 10 is restored on purpose after
step 20 was saved, step 20 is off the chain for ever. A snapshot from which three incarnations in a row made nothing
newer is distrusted, and the next older is tried before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from ckptd.model import Incarnation, SnapshotId

FAILED_RESUMES: Final = 3


@dataclass(frozen=True, slots=True)
class Available:
    """A complete snapshot: ``sources`` are "memory" and tier URLs, best first."""

    snapshot: SnapshotId
    world_size: int
    sources: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Ancestor:
    """An incarnation as far as restore cares: whether it decided, and what it restored."""

    is_decided: bool
    parent: SnapshotId | None


def order_candidates(
    available: Iterable[Available], ancestors: Mapping[Incarnation, Ancestor], asking: Incarnation
) -> list[Available]:
    """Every snapshot on the chain that ends before ``asking``, best first."""
    by_incarnation: dict[Incarnation, list[Available]] = {}
    for item in available:
        by_incarnation.setdefault(item.snapshot.incarnation, []).append(item)
    known = sorted({*by_incarnation, *ancestors} - {asking}, reverse=True)
    start = next((i for i in known if i in by_incarnation or _restored(ancestors, i)), None)
    chain: list[Available] = []
    limit: int | None = None
    seen: set[Incarnation] = set()
    while start is not None and start not in seen:
        seen.add(start)
        mine = sorted(by_incarnation.get(start, []), key=lambda a: a.snapshot.step, reverse=True)
        chain += [a for a in mine if limit is None or a.snapshot.step <= limit]
        parent = _restored(ancestors, start)
        start, limit = (parent.incarnation, parent.step) if parent else (None, None)
    return _distrust(chain, known, by_incarnation, ancestors)


def find_step(available: Iterable[Available], ordered: list[Available], step: int) -> list[Available]:
    """The snapshots of ``step``: those on the chain first, then abandoned branches, newest incarnation first."""
    on_chain = [a for a in ordered if a.snapshot.step == step]
    others = [a for a in available if a.snapshot.step == step and a not in on_chain]
    return on_chain + sorted(others, key=lambda a: a.snapshot, reverse=True)


def _restored(ancestors: Mapping[Incarnation, Ancestor], incarnation: Incarnation) -> SnapshotId | None:
    ancestor = ancestors.get(incarnation)
    return ancestor.parent if ancestor and ancestor.is_decided else None


def _distrust(
    chain: list[Available],
    newest_first: list[Incarnation],
    by_incarnation: Mapping[Incarnation, list[Available]],
    ancestors: Mapping[Incarnation, Ancestor],
) -> list[Available]:
    """Move a snapshot behind the next older one when the last three incarnations resumed from it and made nothing."""
    if len(chain) < 2:
        return chain
    failed = 0
    for incarnation in newest_first:
        if incarnation in by_incarnation or _restored(ancestors, incarnation) != chain[0].snapshot:
            break
        failed += 1
    return [chain[1], chain[0], *chain[2:]] if failed >= FAILED_RESUMES else chain
