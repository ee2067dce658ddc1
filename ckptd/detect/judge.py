"""Everything that is judged of one job, in one place: what is gone, what hangs, what is slow; with the log of faults.

The online analyst and the replay of recordings use it alike. Explicit state, explicit time: ``now_s`` is the caller's.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from ckptd.detect.actions import nodes_of
from ckptd.detect.compute_verdicts import with_places
from ckptd.detect.departures import judge_departures, was_ended_first
from ckptd.detect.faultlog import FAMILIES, Family, FaultLog
from ckptd.detect.hang import StallAlarm, judge_hang
from ckptd.detect.hang_desync import judge_desync
from ckptd.detect.health import Health, adjust
from ckptd.detect.history import History
from ckptd.detect.kernel_links import PeerLink
from ckptd.detect.layout import Layout, infer
from ckptd.detect.links import LinkMatrix
from ckptd.detect.records import Communicator, Confidence, Fault, Kind, RankState, Timings
from ckptd.detect.slow_comm import CommJudge
from ckptd.detect.slow_compute import ComputeJudge
from ckptd.format.timings import POINT_TO_POINT, SAMPLE, Mask, Rows

# What follows the first to go is at hand by then, so that the first are told from those.
SETTLE_S: Final = 1.0
_MOSTLY: Final = 0.5


class Judge:
    """See the module. ``nodes``: of each rank. ``layout`` None: inferred once the communicators have been used."""

    def __init__(self, nodes: Sequence[str], layout: Layout | None = None) -> None:
        self.nodes = tuple(nodes)
        self.log = FaultLog()
        self.history = History(len(self.nodes))
        self.layout = layout
        self._compute = ComputeJudge(layout, self.nodes) if layout else None
        self._communication = CommJudge(self.nodes)
        self._alarm = StallAlarm()
        # Somebody is gone, and it is too early to say who was first: look again in ``SETTLE_S``.
        self.is_unsettled = False
        self._checkpointed = [0.0] * len(self.nodes)  # share of a rank's newest steps
        self._samples: dict[int, list[Rows]] = {}
        self._tables: dict[int, Mapping[int, Communicator]] = {}
        self._with_p2p: set[str] = set()
        self._positions: dict[int, Sequence[str]] = {}

    # --- what is slow --------------------------------------------------------------------------------------------
    def take(self, rank: int, steps: Rows, samples: Rows, table: Mapping[int, Communicator]) -> None:
        """New SELF and SAMPLE rows of a rank; rows of ``samples`` name communicators of ``table``."""
        if len(steps):
            self.history.put(rank, self._unmasked(rank, steps))
        if len(samples):
            self._samples.setdefault(rank, []).append(samples)
            self._tables[rank] = table
            p2p = samples[np.isin(samples["op"], [int(op) for op in POINT_TO_POINT])]
            self._with_p2p |= {table[row].id for row in np.unique(p2p["communicator"]).tolist() if row in table}

    def name_positions(self, rank: int, names: Sequence[str]) -> None:
        """What the positions of the rank's steps are: (POSITIONS,), "" unknown."""
        self._positions[rank] = names

    def _unmasked(self, rank: int, steps: Rows) -> Rows:
        """Where most steps take a snapshot they are compared with one another: left out, nothing would be judged."""
        taken = (steps["mask"] & Mask.CHECKPOINT) != 0
        known = self._checkpointed[rank]
        kept = 0.9 ** len(steps)
        self._checkpointed[rank] = kept * known + (1 - kept) * float(taken.mean())
        if self._checkpointed[rank] <= _MOSTLY or not taken.any():
            return steps
        unmasked = steps.copy()
        unmasked["mask"] &= ~np.uint32(Mask.CHECKPOINT)
        return unmasked

    def lay_out(self, layout: Layout) -> None:
        """The peer sets to compare within, from now on; the same again, or fewer ranks with peers, change nothing."""
        known = self.layout
        if known is not None and not known.is_inferred and _with_peers(layout) <= _with_peers(known):
            return
        self.layout = layout
        self._compute = ComputeJudge(layout, self.nodes)

    def weigh(
        self,
        states: Sequence[RankState],
        communicators: Mapping[str, Communicator],
        now_s: float,
        health: Mapping[str, Health] | None = None,
        peers: Sequence[PeerLink] | None = None,
    ) -> bool:
        """Judge what is slow from the rows taken so far; True when the open faults changed. Not while the job stands
        still: what waits is not slow. ``health``: of nodes, raises or lowers confidence.
        ``peers``: a new answer of the nodes' kernels."""
        if self.is_stopped:
            self._samples = {}
            return False
        if self._compute is None:
            self._infer(states, communicators)
        has_changed = False
        if self._compute is not None:
            named = [self._with_places(fault) for fault in self._compute.judge(self.history)]
            found = self._adjusted(named, health)
            has_changed |= self.log.update(Family.COMPUTE, found, now_s)
        if self._samples or peers is not None:
            # Arrays joined as such are promoted field by field, which is most of the cost where ranks are many.
            samples = {
                rank: np.frombuffer(b"".join(part.tobytes() for part in rows), SAMPLE)
                for rank, rows in self._samples.items()
            }
            self._samples = {}
            self._communication.take(Timings(len(self.nodes), self.nodes, {}, samples, self._tables))
            found = self._adjusted(self._communication.judge(peers, self._slow_ranks), health)
            has_changed |= self.log.update(Family.COMMUNICATION, found, now_s)
        return has_changed

    def _with_places(self, fault: Fault) -> Fault:
        names = self._positions.get(fault.evidence.get("rank", -1))
        return with_places(fault, names) if names else fault

    @property
    def _slow_ranks(self) -> set[int]:
        """Those that are sure to be slow by themselves."""
        faults = [logged.fault for logged in self.log.open if logged.fault.confidence is not Confidence.SUSPECT]
        return {rank for fault in faults if FAMILIES[fault.kind] is Family.COMPUTE for rank in fault.ranks}

    @property
    def _slow_links(self) -> list[tuple[int, int]]:
        """Pairs of ranks on different nodes whose link was slow when last seen: it may have failed since."""
        ends = [logged.fault.ranks for logged in self.log.open if logged.fault.kind is Kind.SLOW_LINK]
        pairs = (pair for ranks in ends for pair in itertools.permutations(ranks, 2))
        return [(src, dst) for src, dst in pairs if self.nodes[src] != self.nodes[dst]]

    @property
    def matrices(self) -> tuple[LinkMatrix, ...]:
        """The link matrices of the last judgement."""
        return self._communication.matrices

    def _adjusted(self, found: Sequence[Fault], health: Mapping[str, Health] | None) -> list[Fault]:
        """With what the nodes themselves show, also of faults that name ranks only."""
        adjusted = []
        for fault in found:
            if "weakness" in fault.evidence:  # the judge itself says why it is no more than a suspect
                adjusted.append(fault)
                continue
            placed = replace(fault, nodes=nodes_of(fault, self.nodes))
            told = adjust(placed, health or {}, set(self.nodes))
            adjusted.append(replace(told, nodes=fault.nodes))
        return adjusted

    def _infer(self, states: Sequence[RankState], communicators: Mapping[str, Communicator]) -> None:
        """Peer sets from who talks to whom, once every rank has been through a few steps."""
        if not self.history.is_ready:
            return
        used: dict[str, int] = {}
        for state in states:
            for name, count in state.counts.items():
                used[name] = max(used.get(name, 0), count.enqueued)
        known = [(c, used[c.id], c.id in self._with_p2p) for c in communicators.values() if used.get(c.id)]
        self.lay_out(infer(known, len(self.nodes)))

    # --- what stands still ---------------------------------------------------------------------------------------
    @property
    def is_stopped(self) -> bool:
        return any(FAMILIES[logged.fault.kind] is Family.STOP for logged in self.log.open)

    def look(self, states: Sequence[RankState], communicators: Mapping[str, Communicator], now_s: float) -> bool:
        """Judge what is gone and what hangs at this moment; True when the open faults changed."""
        step = max((state.step for state in states), default=-1) + 1
        departures = [state.gone_s for state in states if state.gone_s is not None]
        still = self._alarm.look(states, self.history.step_p99_s, now_s)
        found: list[Fault] = []
        if departures:
            self.is_unsettled = not self.is_stopped and now_s - min(departures) < SETTLE_S
            if self.is_stopped or self.is_unsettled:
                return False  # who goes after a stop goes because of it
            # A mismatch kills whom it hits, and that is an innocent rank: gloo ends the one that gets too much. But of
            # what survivors of a killed rank enter on their way out nothing follows.
            if not was_ended_first(states):
                found = judge_desync(states, communicators, has_failed=True)
            found = found or judge_departures(states, step)
        if not found and still:
            found = judge_hang(still, communicators, slow_links=self._slow_links)
        return self.log.update(Family.STOP, found, now_s)


def _with_peers(layout: Layout) -> int:
    return int(((layout.program >= 0) | (layout.data >= 0)).sum())
