"""States of ranks that wait, or do not, in one communicator."""

from __future__ import annotations

from ckptd.detect.records import Communicator, Count, Pending, RankState
from ckptd.format.timings import Op

PAIR = {"g": Communicator("g", (0, 1), "dp")}
FOUR = {"g": Communicator("g", (0, 1, 2, 3), "dp")}


def waits(rank: int, seq: int = 5, op: Op = Op.ALL_REDUCE, size_bytes: int = 64, group: str = "g") -> RankState:
    pending = (Pending(group, seq, op, size_bytes, for_s=12.0, where=f"train.py:{rank}"),)
    return RankState(rank, f"n{rank}", {group: Count(seq, seq - 1)}, pending, step=7)


def idle(rank: int, count: int = 4, group: str = "g") -> RankState:
    return RankState(rank, f"n{rank}", {group: Count(count, count)}, step=7)


def p2p(rank: int, op: Op, peer: int, seq: int = 3) -> RankState:
    return RankState(rank, f"n{rank}", {}, (Pending("g", seq, op, 64, peer, 12.0),))
