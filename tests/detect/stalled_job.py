"""A small job of dp x pp x tp ranks that runs until it stands still: what its ranks then say of themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from ckptd.detect.records import Communicator, Count, Pending, RankState
from ckptd.format.timings import POINT_TO_POINT, Op


@dataclass(frozen=True)
class Call:
    """One operation of a rank's program; ``seq`` as its communicator counts."""

    communicator: str
    op: Op
    seq: int
    peer: int = -1

    @property
    def is_p2p(self) -> bool:
        return self.op in POINT_TO_POINT


@dataclass
class Job:
    """``stops``: after how many operations a rank's host stops. ``ahead``: how many a host may have open, 1 blocks."""

    dp: int = 2
    pp: int = 2
    tp: int = 2
    steps: int = 3
    ahead: int = 1
    stops: Mapping[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.world = self.dp * self.pp * self.tp
        groups = [Communicator("world", tuple(range(self.world)), "world")]
        for rank in range(self.world):
            d, p, t = self.place(rank)
            groups.append(Communicator(f"tp{d}{p}", tuple(self.rank(d, p, i) for i in range(self.tp)), "tp"))
            groups.append(Communicator(f"dp{p}{t}", tuple(self.rank(i, p, t) for i in range(self.dp)), "dp"))
            groups.append(Communicator(f"pp{d}{t}", tuple(self.rank(d, i, t) for i in range(self.pp)), "pp"))
        self.communicators = {group.id: group for group in groups}
        self.programs = {rank: self._program(rank) for rank in range(self.world)}
        self.entered = dict.fromkeys(range(self.world), 0)
        self._run()

    def place(self, rank: int) -> tuple[int, int, int]:
        return rank // (self.pp * self.tp), rank // self.tp % self.pp, rank % self.tp

    def rank(self, d: int, p: int, t: int) -> int:
        return (d * self.pp + p) * self.tp + t

    def _program(self, rank: int) -> list[Call]:
        d, p, t = self.place(rank)
        seqs: Counter[tuple[str, Op, int]] = Counter()
        calls: list[Call] = []

        def call(name: str, op: Op, peer: int = -1) -> None:
            key = (name, op, peer) if op in POINT_TO_POINT else (name, Op.OTHER, -1)
            seqs[key] += 1
            calls.append(Call(name, op, seqs[key], peer))

        for _ in range(self.steps):
            if p > 0:
                call(f"pp{d}{t}", Op.RECV, self.rank(d, p - 1, t))
            call(f"tp{d}{p}", Op.ALL_GATHER)
            call(f"tp{d}{p}", Op.REDUCE_SCATTER)
            if p + 1 < self.pp:
                call(f"pp{d}{t}", Op.SEND, self.rank(d, p + 1, t))
            call(f"dp{p}{t}", Op.ALL_REDUCE)
            call("world", Op.BARRIER)
        return calls

    def is_done(self, call: Call, rank: int) -> bool:
        """Everybody it needs has entered it."""
        if call.is_p2p:
            other = Op.SEND if call.op is Op.RECV else Op.RECV
            twin = Call(call.communicator, other, call.seq, rank)
            return twin in self.programs[call.peer][: self.entered[call.peer]]
        members = self.communicators[call.communicator].members
        return all(call in self.programs[member][: self.entered[member]] for member in members)

    def open_calls(self, rank: int) -> list[Call]:
        return [call for call in self.programs[rank][: self.entered[rank]] if not self.is_done(call, rank)]

    def _run(self) -> None:
        moved = True
        while moved:
            moved = False
            for rank, program in self.programs.items():
                end = min(self.stops.get(rank, len(program)), len(program))
                while self.entered[rank] < end and len(self.open_calls(rank)) < self.ahead:
                    self.entered[rank] += 1
                    moved = True

    def state(self, rank: int, silent_s: float = 0.0) -> RankState:
        done: Counter[str] = Counter()
        entered: Counter[str] = Counter()
        for call in self.programs[rank][: self.entered[rank]]:
            if not call.is_p2p:
                entered[call.communicator] += 1
                done[call.communicator] += self.is_done(call, rank)
        counts = {name: Count(entered[name], done[name]) for name, c in self.communicators.items() if rank in c.members}
        pending = tuple(
            Pending(call.communicator, call.seq, call.op, 64, call.peer, 20.0) for call in self.open_calls(rank)
        )
        return RankState(rank, f"n{rank // 2}", counts, pending, silent_s=silent_s, step=1)

    def states(self, silent: bool = False) -> list[RankState]:
        return [self.state(rank, 60.0 if silent and rank in self.stops else 0.0) for rank in range(self.world)]

    def waited_for(self, by_running_only: bool = False) -> set[int]:
        """Stopped ranks that somebody waits for in an operation they did not enter."""
        found: set[int] = set()
        for rank in set(range(self.world)) - (set(self.stops) if by_running_only else set()):
            for call in self.open_calls(rank):
                others = [call.peer] if call.is_p2p else self.communicators[call.communicator].members
                for other in set(others) & set(self.stops):
                    twin = Call(call.communicator, Op.SEND if call.op is Op.RECV else Op.RECV, call.seq, rank)
                    needed = twin if call.is_p2p else call
                    if needed not in self.programs[other][: self.entered[other]]:
                        found.add(other)
        return found
