"""Ranks without torch that report timings: a step is compute of their own, then an all-reduce that all leave together.

Time is made up: steps take no time at all to make, and what the daemons are told is what a rank's own clock would have
said. One communicator, "world", of all ranks.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress

import numpy as np
from shard_ranks import ShardJob

from ckptd.errors import CkptdError
from ckptd.format.timings import OPERATION, STEP, Op, pack
from ckptd_api.convert import incarnation_to_pb
from ckptd_api.v1 import node_pb2, timings_pb2

BYTES = 1 << 20
MOVE_S = 0.005  # what the operation itself takes
NS = 1_000_000_000


class TimingJob(ShardJob):
    """``compute_s[rank]`` is how long a rank computes in a step; 0.1 s unless it is told."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.at_step = 0
        self._now_ns = [rank * 10 * NS for rank in range(len(self.ranks))]  # clocks that agree on nothing
        self._random = np.random.default_rng(7)

    def run_steps(self, count: int, compute_s: Mapping[int, float] | None = None) -> None:
        """``count`` steps, reported by every rank with a heartbeat that says that all is done."""
        world = len(self.ranks)
        base = np.full(world, 0.1)
        for rank, seconds in (compute_s or {}).items():
            base[rank] = seconds
        operations = [np.zeros(count, OPERATION) for _ in range(world)]
        marks = [np.zeros(count, STEP) for _ in range(world)]
        for at in range(count):
            step = self.at_step + at + 1
            own_s = base * (1 + 0.005 * self._random.standard_normal(world))
            for rank in range(world):
                begin = self._now_ns[rank] + round(own_s[rank] * NS)
                end = self._now_ns[rank] + round((own_s.max() + MOVE_S) * NS)
                operations[rank][at] = (0, Op.ALL_REDUCE, -1, step, BYTES, begin, end)
                marks[rank][at] = (step, end, 0)
                self._now_ns[rank] = end
        self.at_step += count
        for rank in range(world):
            self.report(rank, pack(operations[rank]), pack(marks[rank]))

    def report(self, rank: int, operations: bytes = b"", marks: bytes = b"", *, pending: bool = False) -> None:
        """A rank's report; ``pending``: it waits in the operation of the step that is under way."""
        done, member = self.at_step, self.ranks[rank]
        heartbeat = timings_pb2.Heartbeat(step=done)
        heartbeat.counts.add(communicator=0, enqueued=done + pending, completed=done)
        if pending:
            heartbeat.pending.add(communicator=0, seq=done + 1, op=Op.ALL_REDUCE, size_bytes=BYTES, peer=-1)
        world = timings_pb2.CommunicatorEntry(row=0, id="world", members=range(len(self.ranks)))
        request = node_pb2.ReportTimingsRequest(
            run=self.run,
            incarnation=incarnation_to_pb(self.incarnation),
            rank=rank,
            communicators=[world],
            operations=operations,
            steps=marks,
            heartbeat=heartbeat,
            coverage=timings_pb2.Coverage(source="dispatcher"),
        )
        member.call("ReportTimings", request)

    @contextmanager
    def beating(self, *, waiting: Collection[int], silent: Collection[int] = ()) -> Iterator[None]:
        """Heartbeats twice a second while the block runs: ``waiting`` are in the operation of the step under way, the
        others in none, ``silent`` say nothing."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(0.5):
                for rank in set(range(len(self.ranks))) - set(silent):
                    with suppress(CkptdError, ValueError):  # of a daemon that was killed, of a channel that is closed
                        self.report(rank, pending=rank in waiting)

        thread = threading.Thread(target=beat)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
