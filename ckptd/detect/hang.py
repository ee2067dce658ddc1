"""Which ranks a job that stands still waits for: desync, death, hang, and communication hang.

Layer: inside ``detect``, pure. Invariants: a rank that waits is a victim and not named, however far behind it is; a
weaker argument is used only for ranks that a stronger one leaves unexplained; a desync evicts nobody. The wavefront
argument (C4, MegaScale): counts say how far a rank came, not who is at fault; at fault is who is waited for and waits
for nobody, or waits for what others have finished.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

from ckptd.detect.hang_desync import judge_desync
from ckptd.detect.hang_report import CERTAIN, Reason, by_node, stop_fault
from ckptd.detect.records import Communicator, Confidence, Fault, RankState
from ckptd.detect.wait_graph import Wait, Why, shown, wait_graph
from ckptd.format.timings import POINT_TO_POINT, Op

_WAITS_SHOWN: Final = 32
_COMM_HANGS: Final = 4  # more at one time have a common cause: the smallest speaks for all
_STALL_S: Final = 10.0
_STALL_STEPS: Final = 5.0
_AGAIN_S: Final = 0.9  # two looks, one a second
_LONG_S: Final = 60.0  # for so long one rank alone saves or evaluates without its saying so

_Position = tuple[str, int, Op]
_Moved = tuple[int, tuple[tuple[str, int, int], ...], tuple[tuple[str, int, Op, int], ...]]


@dataclass(frozen=True, slots=True)
class HangThresholds:
    """``silent_after_s``: a rank without a heartbeat for so long does not run, to be set below the 10 s of a stall;
    None where nobody sends any, as in dumps, so that whether a host runs must be told from its peers."""

    silent_after_s: float | None = 5.0


HEARTBEATS: Final = HangThresholds()
POST_MORTEM: Final = HangThresholds(silent_after_s=None)


class StallAlarm:
    """Whether a job stands still, and who does: ranks that wait and of which nothing has moved for max(10 s, 5 steps),
    seen twice. A rank that waits in one place and goes on in another, a side thread that saves or a receive that was
    posted early, does not stand still.

    A rank that is silent or gone raises nothing, since what it last said may be long past; who waits for it does.
    """

    def __init__(self) -> None:
        self._since_s: dict[int, tuple[_Moved, float]] = {}
        self._first_seen_s: float | None = None

    def look(self, states: Sequence[RankState], step_p99_s: float, now_s: float) -> list[RankState]:
        """The states to judge a hang by, [] while there is none: those that move are marked, and what they wait in is
        left out. To be called about once a second. ``now_s``: any clock that does not go back."""
        patience_s = max(_STALL_S, _STALL_STEPS * step_p99_s)
        since_s: dict[int, tuple[_Moved, float]] = {}
        for state in states:
            moved, before = _moved(state), self._since_s.get(state.rank)
            since_s[state.rank] = before if before and before[0] == moved else (moved, now_s)
        self._since_s = since_s
        waiting = [state for state in states if _is_waiting(state)]
        if not any(now_s - since_s[state.rank][1] >= patience_s for state in waiting):
            self._first_seen_s = None
            return []
        if self._first_seen_s is None:
            self._first_seen_s = now_s
        if now_s - self._first_seen_s < _AGAIN_S:
            return []
        return [state if self._is_still(state, now_s, patience_s) else _moving(state) for state in states]

    def _is_still(self, state: RankState, now_s: float, patience_s: float) -> bool:
        is_unable = _is_gone(state) or _is_silent(state, HEARTBEATS)
        return is_unable or now_s - self._since_s[state.rank][1] >= patience_s


def _moved(state: RankState) -> _Moved:
    """What changes when a rank gets on."""
    counts = tuple((name, count.enqueued, count.completed) for name, count in sorted(state.counts.items()))
    pairs = tuple(sorted((p.communicator, p.peer, p.op, p.seq) for p in state.pending if p.op in POINT_TO_POINT))
    return state.step, counts, pairs


def _is_waiting(state: RankState) -> bool:
    if _is_gone(state) or _is_silent(state, HEARTBEATS):
        return False
    return bool(state.pending) or any(count.enqueued > count.completed for count in state.counts.values())


def _moving(state: RankState) -> RankState:
    return replace(state, pending=(), is_moving=True)


def judge_hang(
    states: Sequence[RankState],
    communicators: Mapping[str, Communicator],
    thresholds: HangThresholds = HEARTBEATS,
    slow_links: Collection[tuple[int, int]] = (),
) -> list[Fault]:
    """The faults of a job that is known to stand still (``StallAlarm``), the most certain first.

    ``slow_links``: pairs of global ranks, source and destination, between which little or nothing moves; they narrow a
    communication hang. After a desync a number no longer means the same operation on all ranks, so only deaths are told
    beside it. Linear in pending operations and members: 10,240 ranks in one hang are a few passes.
    """
    judgement = _Judgement({state.rank: state for state in states}, communicators, thresholds)
    mismatches = judge_desync(states, communicators)
    if not mismatches:
        judgement.run()
    return mismatches + judgement.faults(slow_links)


class _Judgement:
    """One stall, judged argument by argument. ``roots``: why a rank is named; ``closed``: communicators at fault."""

    def __init__(
        self,
        states: Mapping[int, RankState],
        communicators: Mapping[str, Communicator],
        thresholds: HangThresholds,
    ) -> None:
        self.states = states
        self.communicators = communicators
        self.has_heartbeats = thresholds.silent_after_s is not None
        self.silent = {rank for rank, state in states.items() if _is_silent(state, thresholds)}
        gone = {rank for rank, state in states.items() if _is_gone(state)}
        self.graph = wait_graph(states, communicators, gone, self.silent)
        self.roots = {rank: Reason.DEAD for rank, state in states.items() if _is_gone(state) and not state.has_left}
        self.closed: list[Wait] = []
        self._reached: tuple[list[int], Mapping[int, int], Sequence[Wait]] | None = None

    def run(self) -> None:
        self._certain()
        for wait in self._unexplained(Why.UNHEARD):
            self.roots |= dict.fromkeys(wait.blockers, Reason.UNHEARD)
        self.closed += self._unexplained(Why.CLOSED)
        self._behind(self._unexplained(Why.MISSING), elsewhere=False)
        if not self.has_heartbeats and not self.closed:
            self._behind(self.graph.waits, elsewhere=True)
        while cycle := next(filter(None, map(self._cycle, self._unexplained())), None):
            self.roots |= dict.fromkeys(cycle, Reason.CYCLE)

    def _reach(self) -> tuple[Mapping[int, int], Sequence[Wait]]:
        """``WaitGraph.reach`` of all that is named so far; walked again only when more was named."""
        named = [*self.roots, *(rank for wait in self.closed for rank in wait.waiting)]
        if self._reached is None or self._reached[0] != named:
            self._reached = named, *self.graph.reach(named)
        return self._reached[1:]

    def _unexplained(self, why: Why | None = None) -> list[Wait]:
        """Waits with ranks that do not wait for one that is named, directly or through others. A closed operation is
        explained when any of its ranks is: it may be held by what that rank entered since."""
        waits = [wait for wait in self.graph.waits if why in (None, wait.why)]
        reached = self._reach()[0] if waits else {}
        quantifier = any if why is Why.CLOSED else all
        return [wait for wait in waits if not quantifier(rank in reached for rank in wait.waiting)]

    def _certain(self) -> None:
        for wait in self.graph.waits:
            if wait.why is Why.PASSED:
                self.roots |= {rank: Reason.STUCK for rank in wait.waiting if rank not in self.roots}
            for rank in wait.blockers if wait.why is Why.MISSING else ():
                if reason := self._why_missing(rank):
                    self.roots.setdefault(rank, reason)

    def _why_missing(self, rank: int) -> Reason | None:
        state = self.states.get(rank)
        if state is None:
            return None
        if state.has_left:
            return Reason.LEFT
        if rank in self.silent:
            return Reason.SILENT
        return None if state.pending or state.is_moving else Reason.ABSENT

    def _behind(self, waits: Iterable[Wait], elsewhere: bool) -> None:
        """Names those who miss an operation and whose own waits do not excuse it, since a member that came to that
        operation is in all of them as well. ``elsewhere``: only those with nothing pending in its communicator, since
        a host that reads a result (the rank that logs the loss) stops behind others within one communicator."""
        for wait in waits:
            if wait.why is not Why.MISSING or wait.op in POINT_TO_POINT:
                continue
            waiting, passed = set(wait.waiting), dict[frozenset[_Position], bool]()
            for rank in wait.blockers:
                state = self.states[rank]
                if rank in self.roots or (
                    elsewhere and any(p.communicator == wait.communicator for p in state.pending)
                ):
                    continue
                at = self._places(state)
                if at not in passed:
                    passed[at] = bool(waiting.intersection(*sorted((self._holders[place] for place in at), key=len)))
                if passed[at]:
                    self.roots[rank] = Reason.BEHIND

    @cached_property
    def _holders(self) -> Mapping[_Position, set[int]]:
        holders: dict[_Position, set[int]] = defaultdict(set)
        for rank, state in self.states.items():
            for place in self._places(state):
                holders[place].add(rank)
        return holders

    def _places(self, state: RankState) -> frozenset[_Position]:
        return frozenset((self._name(p.communicator), p.seq, p.op) for p in state.pending)

    def _name(self, communicator: str) -> str:
        """A name that siblings share: all tensor groups of a job have one label."""
        group = self.communicators.get(communicator)
        return group.label if group and group.label else communicator

    def _cycle(self, wait: Wait) -> list[int]:
        """Ranks that wait for each other, met by walking from ``wait`` to what holds it; none where the walk ends at a
        rank that waits in something unknown."""
        walk, rank = dict[int, int](), wait.waiting[0]
        while rank not in walk and rank in self._holds:
            walk[rank] = len(walk)
            rank = self._holds[rank]
        return [met for met, place in walk.items() if place >= walk[rank]] if rank in walk else []

    @cached_property
    def _holds(self) -> Mapping[int, int]:
        """One of those that hold each rank, in the oldest operation it waits in where that has any."""
        holds: dict[int, int] = {}
        for wait in self.graph.waits:
            for rank in wait.waiting:
                head = self.graph.heads[rank]
                is_oldest = (head.communicator, head.seq, head.op) == (wait.communicator, wait.seq, wait.op)
                blocker = next((blocker for blocker in wait.blockers if blocker != rank), None)
                if blocker is not None and (is_oldest or rank not in holds):
                    holds[rank] = blocker
        return holds

    def faults(self, slow_links: Collection[tuple[int, int]]) -> list[Fault]:
        origin, path = self._reach()
        victims = Counter(origin.values())
        leads: dict[int, list[Wait]] = defaultdict(list)
        for wait in path:
            leads[origin[wait.waiting[0]]].append(wait)
        faults = []
        for reason, ranks in by_node(self.roots, self.states):
            evidence = self._evidence(ranks, victims, leads)
            waits_s = max((wait_s for rank in ranks for wait_s in self._waits_s(leads.get(rank, ()))), default=0.0)
            is_certain = self._is_certain(reason, ranks, waits_s)
            faults.append(stop_fault(reason, ranks, self.states, evidence, is_certain))
        return sorted(faults, key=lambda fault: fault.confidence is Confidence.SUSPECT) + [
            self._comm_hang(wait, slow_links, self._evidence(wait.waiting, victims, leads)) for wait in self._smallest()
        ]

    def _waits_s(self, waits: Iterable[Wait]) -> Iterator[float]:
        """How long those that wait in ``waits`` have done so."""
        for rank in {rank for wait in waits for rank in wait.waiting}:
            yield from (pending.for_s for pending in self.states[rank].pending)

    def _is_certain(self, reason: Reason, ranks: Sequence[int], waits_s: float) -> bool:
        """A rank that is absent and alive may be at something that only it does: it saves, evaluates, compiles. Beside
        a death others may be in the middle of dying, and enter nothing for that."""
        if reason is not Reason.ABSENT:
            return reason in CERTAIN
        is_excused = self.has_heartbeats and any(self.states[rank].mask for rank in ranks)
        is_early = self.has_heartbeats and waits_s < _LONG_S
        return not (is_excused or is_early or Reason.DEAD in self.roots.values())

    def _smallest(self) -> list[Wait]:
        closed = sorted(self.closed, key=lambda wait: (len(wait.waiting), wait.waiting))
        return closed if len(closed) <= _COMM_HANGS else closed[:1]

    def _comm_hang(self, wait: Wait, slow_links: Collection[tuple[int, int]], evidence: Mapping[str, Any]) -> Fault:
        links = [link for link in slow_links if set(link) <= set(wait.waiting)]
        ranks = sorted({rank for link in links for rank in link}) or list(wait.waiting)
        more = {
            "communicator": wait.communicator,
            "label": self.communicators[wait.communicator].label,
            "members": shown(wait.waiting),
            "closed_total": len(self.closed),
            "links": [list(link) for link in links],
        }
        return stop_fault(Reason.CLOSED, ranks, self.states, {**evidence, **more}, False)

    @cached_property
    def _unknown(self) -> list[int]:
        members = {rank for group in self.communicators.values() for rank in group.members}
        return sorted(members.difference(self.states))

    def _evidence(
        self, ranks: Sequence[int], victims: Mapping[int, int], leads: Mapping[int, Sequence[Wait]]
    ) -> dict[str, Any]:
        """The waits that lead to ``ranks``, nearest first. ``victims``: ranks by root, the root itself among them."""
        waits = [wait for rank in ranks for wait in leads.get(rank, ())]
        return {
            **({"unheard": shown(self._unknown)} if self._unknown else {}),
            "victims_total": sum(victims.get(rank, 0) for rank in ranks) - len(ranks),
            "waits_total": len(waits),
            "waits": [wait.to_json(self.communicators[wait.communicator].label) for wait in waits[:_WAITS_SHOWN]],
        }


def _is_gone(state: RankState) -> bool:
    return state.is_dead or state.has_left or state.gone_s is not None


def _is_silent(state: RankState, thresholds: HangThresholds) -> bool:
    return thresholds.silent_after_s is not None and state.silent_s >= thresholds.silent_after_s
