"""Who holds what of a run, and what can be made of it: which shards are there, which can be reconstructed. Pure.

Layer: ``erasure``. Places are found by content: an image is wherever one daemon holds the shards of all its ranks, a
parity fragment wherever it lies. So it does not matter whether a daemon is the one that the roster once named, and a
node that comes back with old memory counts for what it holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ckptd.erasure.stripes import Stripes
from ckptd.model import Geometry, SnapshotId


@dataclass(frozen=True, slots=True)
class ParityHeld:
    """Parity of one group on one node: ``group`` is the key of its record, ``images`` the ranks of each member's image
    by position, ``fragments`` the (stripe, row) held."""

    snapshot: SnapshotId
    group: int
    geometry: Geometry
    images: tuple[tuple[int, ...], ...]
    fragments: frozenset[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Holder:
    """One daemon and what it holds: ranks by snapshot, world size by snapshot, parity. ``is_at_fault``: the detector
    has named its node; it serves only what the others cannot."""

    node_id: str
    address: str
    ranks: Mapping[SnapshotId, frozenset[int]] = field(default_factory=dict)
    world_sizes: Mapping[SnapshotId, int] = field(default_factory=dict)
    parity: tuple[ParityHeld, ...] = ()
    is_at_fault: bool = False


def world_sizes(holders: Iterable[Holder]) -> dict[SnapshotId, int]:
    """Every snapshot of which anything is held as shards, and how many ranks it has."""
    return {snapshot: size for holder in holders for snapshot, size in holder.world_sizes.items()}


def ranks_held(holders: Iterable[Holder], snapshot: SnapshotId) -> set[int]:
    """The ranks whose shards of ``snapshot`` some daemon holds."""
    return {rank for holder in holders for rank in holder.ranks.get(snapshot, ())}


def groups_of(holders: Iterable[Holder], snapshot: SnapshotId) -> dict[int, ParityHeld]:
    """The groups of ``snapshot`` of which any parity is held, by key; ``fragments`` are those of all daemons."""
    found: dict[int, ParityHeld] = {}
    for parity in (p for holder in holders for p in holder.parity if p.snapshot == snapshot):
        known = found.get(parity.group)
        fragments = parity.fragments | (known.fragments if known else frozenset())
        found[parity.group] = ParityHeld(snapshot, parity.group, parity.geometry, parity.images, fragments)
    return found


def holder_of_image(holders: Iterable[Holder], snapshot: SnapshotId, ranks: Sequence[int]) -> Holder | None:
    """A daemon that holds the whole image that ``ranks`` make."""
    return next((h for h in holders if set(ranks) <= h.ranks.get(snapshot, frozenset())), None)


def holder_of_fragment(holders: Iterable[Holder], group: int, stripe: int, row: int) -> Holder | None:
    """A daemon that holds that parity fragment."""
    return next((h for h in holders for p in h.parity if p.group == group and (stripe, row) in p.fragments), None)


def reconstructible(holders: Sequence[Holder], group: ParityHeld) -> bool:
    """Whether every image of ``group`` is there or can be made of what is."""
    stripes = Stripes(group.geometry, 1)
    whole = {i for i, ranks in enumerate(group.images) if holder_of_image(holders, group.snapshot, ranks)}
    for stripe in range(stripes.n):
        data = sum(position in whole for position, _ in stripes.data_of(stripe))
        parity = sum((stripe, row) in group.fragments for row in range(group.geometry.m))
        if data + parity < group.geometry.k:
            return False
    return True


def lost_ranks(holders: Sequence[Holder], snapshot: SnapshotId, world_size: int) -> set[int]:
    """The ranks of ``snapshot`` that are neither held nor can be reconstructed; empty: it is complete."""
    lost = set(range(world_size)) - ranks_held(holders, snapshot)
    if lost:
        for group in groups_of(holders, snapshot).values():
            ranks = {rank for image in group.images for rank in image}
            if ranks & lost and reconstructible(holders, group):
                lost -= ranks
    return lost
