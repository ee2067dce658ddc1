"""Who waits for whom in a job that stands still, as data for a graph: groups of ranks in one state, and edges.

Layer: inside ``detect``, pure, below ``pictures``. Invariants: a rank that a fault names is never in one group with one
that waits for it; what is left out, because a graph of more is not read, is what lies farthest from the roots.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Final

from ckptd.detect.faultlog import FAMILIES, Family
from ckptd.detect.hang import HEARTBEATS
from ckptd.detect.records import Communicator, Fault, RankState
from ckptd.detect.wait_graph import Wait, WaitGraph, shown, wait_graph

MOST_GROUPS: Final = 24
_LEGIBLE_GROUPS: Final = 12
_MOST_EDGES: Final = 96
_FAR_HOPS: Final = 3
_NAMES_SHOWN: Final = 4
_WHERE_CHARACTERS: Final = 200
_LIBRARIES: Final = ("/torch/", "/ckptd_client/")

_Groups = dict[int, int]  # group by rank
_Key = tuple[int, int, str, str, str]  # of edges: the victim's group, the blocker's, label, operation and why


def picture_of_waits(
    states: Sequence[RankState], communicators: Mapping[str, Communicator], faults: Sequence[Fault]
) -> dict[str, Any] | None:
    """JSON values; None unless one of ``faults`` is a hang, a desync or a death: what waits is not stuck."""
    stops = [fault for fault in faults if FAMILIES[fault.kind] is Family.STOP]
    if not stops:
        return None
    reasons = {rank: str(fault.evidence.get("reason", fault.kind.value)) for fault in stops for rank in fault.ranks}
    return _Drawing({state.rank: state for state in states}, communicators, reasons).to_json()


class _Drawing:
    """``reasons``: why a rank is named, by rank."""

    def __init__(
        self, states: Mapping[int, RankState], communicators: Mapping[str, Communicator], reasons: Mapping[int, str]
    ) -> None:
        self.states, self.communicators, self.reasons = states, communicators, reasons
        gone = {rank for rank, state in states.items() if _is_gone(state)}
        silent = {rank for rank, state in states.items() if _is_silent(state)} - gone
        self.graph: WaitGraph = wait_graph(states, communicators, gone, silent)
        self.waits_of = self._waits_of()
        self.victims: dict[int, list[int]] = defaultdict(list)  # by wait
        for rank, waits in self.waits_of.items():
            for at in waits:
                self.victims[at].append(rank)
        self.conditions = self._conditions()
        self.hops = self._hops()

    def _waits_of(self) -> dict[int, list[int]]:
        """By rank what it waits in: the oldest operation, and only where nobody in particular holds that, others."""
        heads: dict[int, list[int]] = defaultdict(list)
        others: dict[int, list[int]] = defaultdict(list)
        for at, wait in enumerate(self.graph.waits):
            for rank in wait.waiting:
                head = self.graph.heads[rank]
                is_head = (head.communicator, head.seq) == (wait.communicator, wait.seq)
                (heads if is_head and (wait.blockers or rank in self.reasons) else others)[rank].append(at)
        return {rank: heads.get(rank) or others[rank] for rank in {*heads, *others}}

    def _conditions(self) -> dict[int, str]:
        members = {rank for wait in self.graph.waits for rank in (*wait.waiting, *wait.blockers)}
        conditions = {}
        for rank in sorted({*self.states, *members, *self.reasons}):
            state = self.states.get(rank)
            if state is None:
                conditions[rank] = "unheard"
            elif _is_gone(state):
                conditions[rank] = "left" if state.has_left else "dead"
            elif _is_silent(state):
                conditions[rank] = "silent"
            else:
                conditions[rank] = "waiting" if rank in self.graph.heads else "running"
        return conditions

    def _hops(self) -> dict[int, int]:
        """How many waits lie between a rank and the nearest root; ranks that lead to none are left out."""
        held_by: dict[int, list[int]] = defaultdict(list)
        victims = dict(self.victims)
        for at in victims:
            for rank in self.graph.waits[at].blockers:
                held_by[rank].append(at)
        hops = dict.fromkeys(sorted(self.reasons), 0)
        front = list(hops)
        for rank in front:
            for at in held_by[rank]:
                for victim in victims.pop(at, ()):
                    if victim not in hops:
                        hops[victim] = hops[rank] + 1
                        front.append(victim)
        return hops

    # --- groups --------------------------------------------------------------------------------------------------
    def _grouped(self) -> _Groups:
        """Ranks in one state and as far from a root are one group. In a large job communicators of one label are taken
        for one; where that does not do, neither do numbers of operations count, nor how far away what is far is."""
        for detail in range(3):
            groups = self._grouped_by([self._key(wait, at, detail) for at, wait in enumerate(self.graph.waits)], detail)
            if max(groups.values(), default=0) < _LEGIBLE_GROUPS:
                break
        return groups

    def _key(self, wait: Wait, at: int, detail: int) -> Hashable:
        if detail == 0:
            return at
        return (self._label(wait), wait.seq if detail == 1 else 0, wait.op, wait.why)

    def _label(self, wait: Wait) -> str:
        group = self.communicators[wait.communicator]
        return group.label or (
            "world" if len(group.members) == len(self.conditions) else f"group of {len(group.members)}"
        )

    def _grouped_by(self, keys: Sequence[Hashable], detail: int) -> _Groups:
        roles: dict[int, set[tuple[str, Hashable]]] = defaultdict(set)
        for rank, waits in self.waits_of.items():
            roles[rank].update(("waits", keys[at]) for at in waits)
        for at in self.victims:
            for rank in self.graph.waits[at].blockers:
                roles[rank].add(("holds", keys[at]))
        far = _FAR_HOPS if detail == 2 else len(self.conditions)
        numbers: dict[Hashable, int] = {}
        groups = {}
        for rank, condition in self.conditions.items():
            hops = min(self.hops[rank], far) if rank in self.hops else -1
            state = (condition, self.reasons.get(rank), hops, frozenset(roles[rank]))
            groups[rank] = numbers.setdefault(state, len(numbers))
        return groups

    def _edges(self, groups: _Groups) -> Mapping[_Key, list[Wait]]:
        edges: dict[_Key, list[Wait]] = defaultdict(list)
        for at, ranks in self.victims.items():
            wait = self.graph.waits[at]
            what = (self._label(wait), wait.op.label, wait.why.value)
            blockers = {groups[rank] for rank in wait.blockers}
            for victim in {groups[rank] for rank in ranks}:
                for blocker in blockers if set(wait.blockers) != set(ranks) else ():
                    edges[(victim, blocker, *what)].append(wait)
        return edges

    # --- as JSON -------------------------------------------------------------------------------------------------
    def to_json(self) -> dict[str, Any]:
        groups = self._grouped()
        edges = self._edges(groups)
        members: dict[int, list[int]] = defaultdict(list)
        for rank, group in groups.items():
            members[group].append(rank)
        far = len(groups)
        order = sorted(members, key=lambda group: (self.hops.get(members[group][0], far), members[group]))
        kept = {group: at for at, group in enumerate(order[:MOST_GROUPS])}
        drawn = [(key, waits) for key, waits in edges.items() if key[0] in kept and key[1] in kept]
        return {
            "groups": [self._group(kept[group], members[group]) for group in kept],
            "groups_total": len(members),
            "ranks_left_out_total": sum(len(members[group]) for group in order[MOST_GROUPS:]),
            "edges": [_edge(kept[key[0]], kept[key[1]], key[2:], waits) for key, waits in drawn[:_MOST_EDGES]],
            "edges_total": len(edges),
        }

    def _group(self, number: int, ranks: Sequence[int]) -> dict[str, Any]:
        states = [self.states[rank] for rank in ranks if rank in self.states]
        first = self.graph.waits[self.waits_of[ranks[0]][0]] if self.waits_of.get(ranks[0]) else None
        nodes = sorted({state.node for state in states if state.node})
        head = self.graph.heads.get(ranks[0])
        return {
            "id": number,
            **shown(ranks),
            "nodes": nodes[:_NAMES_SHOWN],
            "nodes_total": len(nodes),
            "condition": self.conditions[ranks[0]],
            "reason": self.reasons.get(ranks[0]),
            "hops_from_root": self.hops.get(ranks[0]),
            "step": max((state.step for state in states), default=-1),
            "silent_s": max((state.silent_s for state in states), default=0.0),
            "waits_in": None
            if first is None
            else {
                "label": self._label(first),
                "communicator": first.communicator,
                "operation": first.op.label,
                "seq": first.seq,
                "why": first.why.value,
                "for_s": round(head.for_s, 3) if head else 0.0,
            },
            "where": _where(states) or (head.where if head else "")[-_WHERE_CHARACTERS:],
        }


def _edge(victim: int, blocker: int, what: tuple[str, str, str], waits: Sequence[Wait]) -> dict[str, Any]:
    names = sorted({wait.communicator for wait in waits})
    label, operation, why = what
    return {
        "victim": victim,
        "blocker": blocker,
        "label": label,
        "communicators": names[:_NAMES_SHOWN],
        "communicators_total": len(names),
        "operation": operation,
        "seq": min(wait.seq for wait in waits),
        "why": why,
    }


def _where(states: Sequence[RankState]) -> str:
    """The innermost line of a stack that is of the program itself."""
    frames = next((state.stack.strip().splitlines() for state in states if state.stack.strip()), [""])
    own = [frame for frame in frames if not any(folder in frame for folder in _LIBRARIES)]
    return (own or frames)[-1][-_WHERE_CHARACTERS:]


def _is_gone(state: RankState) -> bool:
    return state.is_dead or state.has_left or state.gone_s is not None


def _is_silent(state: RankState) -> bool:
    return HEARTBEATS.silent_after_s is not None and state.silent_s >= HEARTBEATS.silent_after_s
