"""Who waits for whom, as data: one wait for each operation that ranks are held in, and the ranks that hold them.

Layer: inside ``detect``, pure. Invariants: a rank that has finished an operation never waits in it; the blockers of a
wait are those that did not enter, or that entered and are held by something older; time and memory are linear in the
pending operations plus the members of their communicators, so a wait of 10,240 ranks is one row and not a matrix.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from ckptd.detect.records import Communicator, Pending, RankState
from ckptd.format.timings import POINT_TO_POINT, SYNCHRONISING, Op

RANKS_SHOWN: Final = 16


class Why(StrEnum):
    """What holds a wait."""

    MISSING = "missing"  # blockers did not enter the operation, or run no longer
    PASSED = "passed"  # a member finished it, so what is missing is on the waiting ranks themselves
    HELD = "held"  # all entered; blockers are held in an operation that they entered before
    UNHEARD = "unheard"  # nothing is known of the blockers, and everybody else entered
    CLOSED = "closed"  # all entered, none finished, nobody is held elsewhere


@dataclass(frozen=True, slots=True)
class Wait:
    """Ranks that wait in one operation. ``waiting`` and ``blockers`` are global ranks, sorted; point-to-point has the
    one rank (CLOSED, HELD: both ends) in ``waiting``. ``blockers`` is empty for PASSED and CLOSED."""

    communicator: str
    seq: int
    op: Op
    why: Why
    waiting: tuple[int, ...]
    blockers: tuple[int, ...] = ()

    def to_json(self, label: str) -> dict[str, Any]:
        """For evidence; ``label`` is that of the communicator."""
        return {
            "communicator": self.communicator,
            "label": label,
            "seq": self.seq,
            "operation": self.op.label,
            "why": self.why.value,
            "waiting": shown(self.waiting),
            "blockers": shown(self.blockers),
        }


def shown(ranks: Sequence[int]) -> dict[str, Any]:
    """The first of ``ranks``, and how many there are."""
    return {"ranks": list(ranks[:RANKS_SHOWN]), "ranks_total": len(ranks)}


@dataclass(frozen=True, slots=True)
class Edge:
    """``victim`` waits for ``blocker`` in an operation."""

    victim: int
    blocker: int
    communicator: str
    seq: int
    op: Op


@dataclass(frozen=True, slots=True)
class WaitGraph:
    """All waits, and the oldest operation of each waiting rank in ``heads``."""

    waits: tuple[Wait, ...]
    heads: Mapping[int, Pending]

    def edges(self) -> Iterator[Edge]:
        """Victim by victim; as many as victims times blockers, so take no more of a large graph than is shown."""
        for wait in self.waits:
            for victim in wait.waiting:
                for blocker in wait.blockers:
                    if blocker != victim:
                        yield Edge(victim, blocker, wait.communicator, wait.seq, wait.op)

    def reach(self, roots: Iterable[int]) -> tuple[dict[int, int], list[Wait]]:
        """Which root each rank waits for, directly or through others, roots themselves included; and the waits that
        lead there, nearest first. A rank that waits for several is put to the one nearest."""
        held_by: dict[int, list[int]] = defaultdict(list)
        for index, wait in enumerate(self.waits):
            for rank in wait.waiting if wait.why is Why.CLOSED else wait.blockers:
                held_by[rank].append(index)
        origin = {root: root for root in roots}
        path, seen, front = [], set[int](), list(origin)
        first = set(front)
        for rank in front:
            for index in held_by[rank]:
                wait = self.waits[index]
                # Who shares a closed operation with a victim is not held by it; with a root it is.
                if index in seen or (wait.why is Why.CLOSED and rank not in first):
                    continue
                seen.add(index)
                path.append(wait)
                for victim in wait.waiting:
                    if victim not in origin:
                        origin[victim] = origin[rank]
                        front.append(victim)
        return origin, path


def wait_graph(
    states: Mapping[int, RankState],
    communicators: Mapping[str, Communicator],
    gone: Collection[int] = (),
    silent: Collection[int] = (),
) -> WaitGraph:
    """The graph of ``states`` by rank. Ranks that are gone hold every wait of their communicators, those that are
    silent every one that they had not finished when last heard; what they waited in then is no excuse. Operations of
    communicators that are not given are left out."""
    field = _Field(states, communicators, frozenset(gone), frozenset(silent))
    waits = [wait for held in field.collectives() for wait in field.waits_of(*held)]
    waits += field.point_to_point()
    return WaitGraph(tuple(waits), field.heads)


def in_order(state: RankState) -> list[Pending]:
    """What a rank waits in, oldest first. Of one age the order given counts: it is that of issue."""
    return sorted(state.pending, key=lambda pending: -pending.for_s)


class _Field:
    """How all ranks stand: what each entered and finished."""

    def __init__(
        self,
        states: Mapping[int, RankState],
        communicators: Mapping[str, Communicator],
        gone: frozenset[int],
        silent: frozenset[int],
    ) -> None:
        self.states = states
        self.communicators = communicators
        self.silent = silent
        self.stopped = gone | silent
        self.heads: dict[int, Pending] = {}
        self.pending: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
        self.peers: dict[tuple[str, int, int, Op], Pending] = {}
        for rank, state in states.items():
            # What a rank that does not run last said is old: it may still be told of as a blocker, but accuses nobody.
            for pending in in_order(state) if rank not in self.stopped else ():
                self._enter(rank, pending)

    def _enter(self, rank: int, pending: Pending) -> None:
        if pending.communicator not in self.communicators:
            return
        if pending.op not in POINT_TO_POINT:
            self.pending[pending.communicator][rank].add(pending.seq)
        elif pending.peer >= 0:
            self.peers.setdefault((pending.communicator, rank, pending.peer, pending.op), pending)
        else:
            return  # it receives from anyone: nobody in particular is waited for
        self.heads.setdefault(rank, pending)

    def collectives(self) -> Iterator[tuple[Communicator, int, Op, list[int]]]:
        """Communicator, seq, operation and ranks: of each rank the oldest that pends in each communicator."""
        ops = {
            (pending.communicator, pending.seq): pending.op
            for state in self.states.values()
            for pending in state.pending
            if pending.op not in POINT_TO_POINT
        }
        for name, ranks in self.pending.items():
            by_seq: dict[int, list[int]] = defaultdict(list)
            for rank, seqs in ranks.items():
                by_seq[min(seqs)].append(rank)
            for seq, waiting in sorted(by_seq.items()):
                yield self.communicators[name], seq, ops[name, seq], sorted(waiting)

    def waits_of(self, group: Communicator, seq: int, op: Op, waiting: Sequence[int]) -> Iterator[Wait]:
        """The wait of ``waiting`` in one collective, by the first that holds: a member that does not run, one that
        finished, one that did not enter, one held elsewhere, one never heard of."""
        held_in = self.pending[group.id]
        finished, missing, stopped, held, unheard = (list[int]() for _ in range(5))
        for rank in group.members:
            state = self.states.get(rank)
            seqs = held_in.get(rank, ())
            count = state.counts.get(group.id) if state else None
            is_done = count is not None and count.completed >= seq and seq not in seqs
            has_entered = seq in seqs or (count is not None and count.enqueued >= seq)
            if rank in self.stopped and not (is_done and rank in self.silent):
                stopped.append(rank)
            elif state is None:
                unheard.append(rank)
            elif is_done:
                finished.append(rank)
            elif not has_entered:
                missing.append(rank)
            elif not self._is_head(rank, group.id, seq):
                held.append(rank)
        # A rooted operation ends for some before all have entered; a synchronising one cannot.
        is_passed = bool(finished) and (op in SYNCHRONISING or not (missing or held or unheard))
        verdicts: tuple[tuple[Why, list[int], bool], ...] = (
            (Why.MISSING, stopped, bool(stopped)),
            (Why.PASSED, [], is_passed),
            (Why.MISSING, missing, bool(missing)),
            (Why.HELD, held, bool(held)),
            (Why.UNHEARD, unheard, bool(unheard)),
            (Why.CLOSED, [], True),
        )
        why, blockers = next((why, ranks) for why, ranks, holds in verdicts if holds)
        if stopped and missing:
            blockers = [*stopped, *missing]
        yield Wait(group.id, seq, op, why, tuple(waiting), tuple(sorted(blockers)))

    def point_to_point(self) -> Iterator[Wait]:
        """A send or a receive waits for its peer unless the peer is in the other half of it; that pair is then like a
        communicator of two. Numbers are not compared: dumps count by rank and not by pair."""
        for (name, rank, peer, op), pending in self.peers.items():
            other = Op.SEND if op is Op.RECV else Op.RECV
            match = self.peers.get((name, peer, rank, other))
            if match is None or peer in self.stopped:
                why = Why.UNHEARD if peer not in self.states and peer not in self.stopped else Why.MISSING
                yield Wait(name, pending.seq, op, why, (rank,), (peer,))
            elif op is Op.SEND:  # a pair is one wait, told by its sender
                ends = sorted((rank, peer))
                held = [end for end, own in ((rank, pending), (peer, match)) if self.heads[end] is not own]
                why = Why.HELD if held else Why.CLOSED
                yield Wait(name, pending.seq, op, why, tuple(ends), tuple(sorted(held)))

    def _is_head(self, rank: int, communicator: str, seq: int) -> bool:
        head = self.heads.get(rank)
        return (
            head is not None and head.communicator == communicator and head.seq == seq and head.op not in POINT_TO_POINT
        )
