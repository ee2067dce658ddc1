"""A network for tests: rings and point-to-point over links of given rates, as the samples that ranks would send.

Seeded. Members arrive at different times and wait, so that their durations show it: a late rank's own is the shortest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ckptd.detect.records import Communicator, Timings
from ckptd.format.timings import SAMPLE, Op, Rows

RATE = 1e9  # bytes a second of a healthy link
LATENCY_S = 50e-6


@dataclass
class Network:
    """``node_of``: of each rank. ``links``: how many times slower the link between two nodes is, from ``since`` on;
    ``nics``: the same of all links of a node. ``late_s``: how much later a rank arrives than others, always."""

    node_of: Sequence[str]
    links: Mapping[tuple[str, str], float] = field(default_factory=dict)
    nics: Mapping[str, float] = field(default_factory=dict)
    late_s: Mapping[int, float] = field(default_factory=dict)
    since: int = 0
    noise: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        self.tables: dict[int, dict[int, Communicator]] = {rank: {} for rank in range(len(self.node_of))}
        self.rows: dict[int, list[tuple[int, int, int, int, int, int, float]]] = {r: [] for r in self.tables}
        self.counts: dict[tuple[str, int, int], int] = {}

    def slowdown(self, src: int, dst: int, step: int) -> float:
        a, b = self.node_of[src], self.node_of[dst]
        if a == b:
            return 0.1  # inside a node
        if step < self.since:
            return 1.0
        link = self.links.get((a, b), self.links.get((b, a), 1.0))
        return max(link, self.nics.get(a, 1.0), self.nics.get(b, 1.0))

    def collective(
        self, communicator: Communicator, step: int, size_bytes: int = 1 << 24, op: Op = Op.ALL_REDUCE
    ) -> None:
        """A ring: as slow as its slowest link."""
        members = communicator.members
        ring = zip(members, (*members[1:], members[0]), strict=True)
        worst = max(self.slowdown(a, b, step) for a, b in ring)
        seq = self._seq(communicator.id, -1, -1)
        moved = 2 * size_bytes * (len(members) - 1) / len(members)
        self._enter(communicator, step, seq, size_bytes, moved / RATE * worst, dict.fromkeys(members, (op, -1)))

    def send(self, communicator: Communicator, src: int, dst: int, step: int, size_bytes: int = 1 << 22) -> None:
        seq = self._seq(communicator.id, src, dst)
        took_s = size_bytes / RATE * self.slowdown(src, dst, step)
        self._enter(communicator, step, seq, size_bytes, took_s, {src: (Op.SEND, dst), dst: (Op.RECV, src)})

    def _seq(self, name: str, src: int, dst: int) -> int:
        self.counts[name, src, dst] = self.counts.get((name, src, dst), 0) + 1
        return self.counts[name, src, dst]

    def _enter(
        self, comm: Communicator, step: int, seq: int, size: int, took_s: float, ends: Mapping[int, tuple[Op, int]]
    ) -> None:
        took_s = (took_s + LATENCY_S) * self.random.lognormal(0, self.noise)
        arrivals = {r: self.random.exponential(2e-3) + self.late_s.get(r, 0.0) for r in ends}
        last = max(arrivals.values())
        for rank, (op, peer) in ends.items():
            table = self.tables[rank]
            row = next((row for row, known in table.items() if known.id == comm.id), len(table))
            table[row] = comm
            error_s = abs(self.random.normal(0, 20e-6))
            self.rows[rank].append((step, row, int(op), peer, seq, size, last - arrivals[rank] + took_s + error_s))

    def timings(self, ranks: Sequence[int] | None = None, keep: bool = False) -> Timings:
        """What was sampled since the last call (or, with ``keep``, remains to be called for again)."""
        chosen = self.rows if ranks is None else {rank: self.rows[rank] for rank in ranks}
        samples: dict[int, Rows] = {rank: np.array(rows, SAMPLE) for rank, rows in chosen.items() if rows}
        if not keep:
            for rank in chosen:
                self.rows[rank] = []
        nodes = tuple(self.node_of)
        return Timings(len(nodes), nodes, {}, samples, {rank: dict(self.tables[rank]) for rank in samples})


def group(name: str, *members: int, label: str = "") -> Communicator:
    return Communicator(name, members, label)
