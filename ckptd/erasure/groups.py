"""Which nodes protect each other: parity groups as a pure function of a roster.

Layer: inside ``erasure``, beside ``stripes``. Invariants: nothing but the ranks, labels and caps of the nodes decides,
never a node_id, an address or an order of entries; so a node that takes over the ranks and labels of another takes its
position too, and every daemon finds the same groups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from ckptd.model import LARGEST_GROUP, Geometry, Roster

CLUSTER_LABEL: Final = "nic"  # groups stay inside one network; members spread over the domains of every other label
_AUTO_SIZE: Final = 10  # so one group below 20 nodes, then groups of 10 to 15
_AUTO_DOUBLE_FROM: Final = 4  # nodes: below, half of the memory or more would go to a second parity


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
    """A node as placement sees it; ``place`` is its position in the order of lowest ranks."""

    place: int
    node_id: str
    labels: Mapping[str, str]
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
    return [
        _Node(place, node_id, dict(entry.domains), entry.protect_max)
        for place, (node_id, entry) in enumerate(ordered.nodes.items())
    ]


def _clusters(nodes: Sequence[_Node]) -> list[list[_Node]]:
    """The nodes by network, none alone where there are others; each cluster in the order of places."""
    by_network: dict[str | None, list[_Node]] = {}
    for node in nodes:
        by_network.setdefault(node.labels.get(CLUSTER_LABEL), []).append(node)
    clusters = list(by_network.values())
    while len(clusters) > 1 and (single := next((c for c in clusters if len(c) == 1), None)):
        clusters.remove(single)
        min(clusters, key=len).extend(single)
    return [sorted(cluster, key=lambda node: node.place) for cluster in clusters]


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
    with the fewest nodes of its domains, then to the smallest.
    """
    sizes = Counter(domain for node in cluster for domain in _domains(node))
    full, larger = divmod(len(cluster), count)
    groups: list[list[_Node]] = [[] for _ in range(count)]
    held: list[Counter[tuple[str, str]]] = [Counter() for _ in range(count)]
    for node in _domain_by_domain(cluster, sizes):
        domains = _domains(node)
        room = full + (sum(len(group) > full for group in groups) < larger)
        chosen = min(
            (at for at in range(count) if len(groups[at]) < room),
            key=lambda at: (
                sum(held[at][domain] >= -(-sizes[domain] // count) for domain in domains),
                sum(held[at][domain] for domain in domains),
                len(groups[at]),
                at,
            ),
        )
        groups[chosen].append(node)
        held[chosen].update(domains)
    return [sorted(group, key=lambda node: node.place) for group in groups]


def _domains(node: _Node) -> list[tuple[str, str]]:
    return [domain for domain in node.labels.items() if domain[0] != CLUSTER_LABEL]


def _domain_by_domain(cluster: Sequence[_Node], sizes: Mapping[tuple[str, str], int]) -> list[_Node]:
    """Nodes of one domain next to each other, the largest domains first; of several labels the coarsest decides."""
    labels = sorted({label for label, _ in sizes}, key=lambda label: (sum(key == label for key, _ in sizes), label))
    first: dict[tuple[str, str], int] = {}
    for node in cluster:
        for domain in _domains(node):
            first.setdefault(domain, node.place)

    def order(node: _Node) -> list[tuple[int, int]]:
        domains = [(label, node.labels[label]) if label in node.labels else None for label in labels]
        return [(-sizes[d], first[d]) if d else (-1, node.place) for d in domains] + [(0, node.place)]

    return sorted(cluster, key=order)
