"""Which nodes protect each other: parity groups as a pure function of a roster.

Layer: inside ``erasure``, beside ``stripes``. Invariants: nothing but the ranks, labels and caps of the nodes decides,
never a node_id, an address or an order of entries; so a node that takes over the ranks and labels of another takes its
position too, and every daemon finds the same groups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heapreplace
from itertools import groupby
from typing import Final

import numpy as np
import numpy.typing as npt

from ckptd.model import LARGEST_GROUP, Geometry, Roster

CLUSTER_LABEL: Final = "nic"  # groups stay inside one network; members spread over the domains of every other label
_AUTO_SIZE: Final = 10  # so one group below 20 nodes, then groups of 10 to 15
_AUTO_DOUBLE_FROM: Final = 4  # nodes: below, half of the memory or more would go to a second parity

_Domain = tuple[str, str]  # label and value
_Costs = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Group:
    """Nodes that protect each other: any ``tolerance`` of them may be lost. ``members`` are in stripe order."""

    tolerance: int
    members: tuple[str, ...]

    @property
    def n(self) -> int:
        return len(self.members)

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.n - self.tolerance, self.tolerance)

    def position(self, node_id: str) -> int:
        """The index of ``node_id`` in stripe order; ValueError when it is no member."""
        return self.members.index(node_id)


@dataclass(frozen=True, slots=True)
class _Node:
    """A node as placement sees it; ``place`` is its position in the order of lowest ranks, ``domains`` are sorted."""

    place: int
    node_id: str
    network: str | None
    domains: tuple[_Domain, ...]
    protect_max: str


@dataclass(frozen=True, slots=True)
class _Shape:
    """How the nodes of a cluster are divided: ``count`` groups of ``tolerance``, sizes differing by at most 1."""

    tolerance: int
    count: int


def plan_groups(roster: Roster) -> tuple[Group, ...]:
    """The groups of ``roster``, ordered by their lowest rank; ``()`` with protection off and on a single node.

    ``protect="k+m"`` fixes the tolerance m and the wished size g = k + m: N nodes make max(1, N // g) groups. ``auto``
    wishes m = 1 below 4 nodes, else 2, and g = 10. A group of n <= m nodes takes m = n - 1. A node's ``protect_max``
    "k+m" bounds the tolerance and the memory, m/k of an image: groups are made larger for it, and where there are too
    few nodes the tolerance is lowered; nodes for which even one parity is too much are in no group.

    Nodes with different ``nic`` labels (or one without) are planned apart, each network by its own number of nodes. One
    that would be alone joins the smallest other network, since slow parity is better than none. Any other label names
    failure domains: a group gets no more members of a domain than an even deal leaves it. With one label, or labels
    that nest (rack in power), that is the best there is; labels that cross are weighed against each other node by node,
    which may miss the best.

    Raises:
        InvalidRequest: ``protect`` or a cap is no geometry.
    """
    groups: list[list[_Node]] = []
    tolerances: list[int] = []
    for cluster in _clusters(_nodes(roster)) if roster.protect != "off" else ():
        shape = _shape(roster.protect, cluster)
        if shape is not None:
            groups += _deal(cluster, shape.count)
            tolerances += [shape.tolerance] * shape.count
    planned = sorted(zip(groups, tolerances, strict=True), key=lambda pair: pair[0][0].place)
    return tuple(Group(tolerance, tuple(node.node_id for node in members)) for members, tolerance in planned)


def explain(roster: Roster) -> str | None:
    """What the wish came to, in one line, when it could not be met: "2+2 asked, 2 nodes: tolerance 1"."""
    if roster.protect == "off":
        return None
    nodes = _nodes(roster)
    unprotected, tolerances, sizes = 0, [], []
    for cluster in _clusters(nodes):
        wish, shape = _wish(roster.protect, len(cluster)), _shape(roster.protect, cluster)
        if shape is None:
            unprotected += len(cluster)
        elif shape.tolerance < wish.m:
            tolerances.append(shape.tolerance)
        elif roster.protect != "auto" and len(cluster) // shape.count < sum(wish):
            sizes.append(len(cluster) // shape.count)
    outcomes = ["no parity" if unprotected == len(nodes) else f"no parity for {unprotected} of them"] * (
        unprotected > 0
    )
    if tolerances:
        outcomes.append(f"tolerance {min(tolerances)}")
    elif sizes:
        outcomes.append(f"a group of {min(sizes)}")
    if not outcomes:
        return None
    caps = sorted({node.protect_max for node in nodes if node.protect_max})
    circumstances = f"{len(nodes)} node{'s' * (len(nodes) > 1)}" + (f", at most {' and '.join(caps)}" if caps else "")
    return f"{roster.protect} asked, {circumstances}: {', '.join(outcomes)}"


def losses_tolerated(groups: Iterable[Group], dead: Collection[str]) -> int:
    """How many more nodes may be lost, wherever they are, when those of ``dead`` are; 0 without groups.

    Negative when a group has lost more than its parity can replace.
    """
    lost = frozenset(dead)
    return min((group.tolerance - len(lost.intersection(group.members)) for group in groups), default=0)


def group_of(groups: Iterable[Group], node_id: str) -> Group | None:
    """The group that ``node_id`` is a member of."""
    return next((group for group in groups if node_id in group.members), None)


# --- the nodes ----------------------------------------------------------------------------------------------------
def _nodes(roster: Roster) -> list[_Node]:
    ordered = replace(roster, entries=tuple(sorted(roster.entries, key=lambda entry: entry.rank)))
    nodes = []
    for place, (node_id, entry) in enumerate(ordered.nodes.items()):
        labels = dict(entry.domains)
        network = labels.pop(CLUSTER_LABEL, None)
        nodes.append(_Node(place, node_id, network, tuple(sorted(labels.items())), entry.protect_max))
    return nodes


def _clusters(nodes: Sequence[_Node]) -> list[list[_Node]]:
    """The nodes by network, none alone where there are others; each cluster in the order of places."""
    by_network: dict[str | None, list[_Node]] = {}
    for node in nodes:
        by_network.setdefault(node.network, []).append(node)
    heap = [(len(cluster), at, cluster) for at, cluster in enumerate(by_network.values())]
    heapify(heap)
    while len(heap) > 1 and heap[0][0] == 1:
        _, _, single = heappop(heap)
        size, at, smallest = heap[0]
        heapreplace(heap, (size + 1, at, smallest + single))
    return [sorted(cluster, key=lambda node: node.place) for _, _, cluster in heap]


# --- how many groups, of what tolerance ---------------------------------------------------------------------------
def _wish(protect: str, nodes: int) -> Geometry:
    if protect != "auto":
        return Geometry.parse(protect)
    m = 1 if nodes < _AUTO_DOUBLE_FROM else 2
    return Geometry(_AUTO_SIZE - m, m)


def _shape(protect: str, cluster: Sequence[_Node]) -> _Shape | None:
    """The highest tolerance up to the wished one that size and caps allow; None when not even 1 is."""
    wish = _wish(protect, len(cluster))
    caps = [Geometry.parse(cap) for cap in {node.protect_max for node in cluster} if cap]
    for m in range(min(wish.m, *(cap.m for cap in caps), len(cluster)), 0, -1):
        least_k = max((-(-m * cap.k // cap.m) for cap in caps), default=1)
        count = max(1, len(cluster) // max(sum(wish), least_k + m), -(-len(cluster) // LARGEST_GROUP))
        if len(cluster) // count - m >= least_k:
            return _Shape(m, count)
    return None


# --- who goes where -----------------------------------------------------------------------------------------------
def _deal(cluster: Sequence[_Node], count: int) -> list[list[_Node]]:
    """``count`` groups of equal size but 1, the members of each in the order of places.

    Nodes are dealt domain by domain, each to the group where the fewest of its domains are overfull, then to the one
    with the fewest nodes of its domains, then to the smallest, then to the first. All groups are compared only where
    the domains change. For a run of nodes alike, the cost of a group changes when it gets one, and only grows: those to
    choose from are as many of the cheapest as there are nodes, in a heap.
    """
    sizes = Counter(domain for node in cluster for domain in node.domains)
    shared = [domain for domain, size in sizes.items() if size > 1]  # a domain of one node decides nothing
    row = {domain: at for at, domain in enumerate(shared)}
    most = np.array([-(-sizes[domain] // count) for domain in shared], np.int64)
    held = np.zeros((len(shared), count), np.uint8)  # nodes of each domain in each group
    filled = np.zeros(count, np.int64)
    full, larger = divmod(len(cluster), count)
    groups: list[list[_Node]] = [[] for _ in range(count)]

    def rows_of(node: _Node) -> list[int]:
        return [row[domain] for domain in node.domains if domain in row]

    for rows, alike in groupby(_domain_by_domain(cluster, sizes), rows_of):
        share, overfull = _weights(len(rows), count)
        waiting = list(alike)[::-1]
        while waiting:
            room = full + (larger > 0)
            heap = _cheapest(_costs(held[rows], most[rows], filled)[filled < room], len(waiting))
            while waiting and room == full + (larger > 0):
                cost = heap[0]
                at = cost % count
                groups[at].append(waiting.pop())
                filled[at] += 1
                for domain in rows:
                    held[domain, at] += 1
                    cost += share + overfull * bool(held[domain, at] == most[domain])
                larger -= len(groups[at]) > full
                if len(groups[at]) == room:
                    heappop(heap)
                else:
                    heapreplace(heap, cost + count)
    return [sorted(group, key=lambda node: node.place) for group in groups]


def _weights(domains: int, count: int) -> tuple[int, int]:
    """Of ``count`` groups, what each node of one of ``domains`` domains adds to the cost of a group, and what each
    overfull domain adds: they are digits of one number, (overfull domains, nodes of the domains, members, index)."""
    share = (LARGEST_GROUP + 1) * count
    return share, share * (LARGEST_GROUP * domains + 1)


def _costs(held: npt.NDArray[np.uint8], most: npt.NDArray[np.int64], filled: npt.NDArray[np.int64]) -> _Costs:
    """What each group costs a node of some domains, no two the same; ``held`` (domains, groups) and ``most`` (domains)
    are of those domains, ``filled`` is the members of each group."""
    count = len(filled)
    share, overfull = _weights(len(most), count)
    nodes, violations = held.sum(axis=0, dtype=np.int64), (held >= most[:, None]).sum(axis=0, dtype=np.int64)
    costs: _Costs = violations * overfull + nodes * share + filled * count + np.arange(count)
    return costs


def _cheapest(costs: _Costs, wanted: int) -> list[int]:
    """The lowest ``wanted`` of ``costs``, or all, in ascending order: a heap."""
    some = np.partition(costs, wanted)[:wanted] if wanted < len(costs) else costs
    cheapest: list[int] = np.sort(some).tolist()
    return cheapest


def _domain_by_domain(cluster: Sequence[_Node], sizes: Mapping[_Domain, int]) -> list[_Node]:
    """Nodes of one domain next to each other, the largest domains first; of several labels the coarsest decides."""
    domains_of = Counter(label for label, _ in sizes)
    labels = sorted(domains_of, key=lambda label: (domains_of[label], label))
    standing: dict[_Domain, tuple[int, int]] = {}
    for node in cluster:
        for domain in node.domains:
            standing.setdefault(domain, (-sizes[domain], node.place))

    def order(node: _Node) -> list[tuple[int, int]]:
        standings = {domain[0]: standing[domain] for domain in node.domains}
        return [standings.get(label, (-1, node.place)) for label in labels]

    return sorted(cluster, key=order)
