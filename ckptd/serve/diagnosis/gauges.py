"""Faults as Prometheus sees them: one series a fault that lasts, gone when it is over or another daemon judges.

Beside them, what the daemon that judges hears of the ranks: how many, how far apart they are, how much of them is seen.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

from ckptd.detect.actions import nodes_of
from ckptd.detect.records import Fault
from ckptd.metrics import Metrics
from ckptd.model import Incarnation
from ckptd.serve.diagnosis.analyst import Analyst
from ckptd_api.convert import incarnation_from_pb
from ckptd_api.v1 import coordinator_pb2 as pb

Series = tuple[str, str, str]
Key = tuple[str, Incarnation]


@dataclass(frozen=True, slots=True)
class _Rank:
    """What was last told of a rank: the last step it finished, None unknown; all that it does is seen."""

    step: int | None
    is_seen: bool


class _Ranks:
    """The ranks of one start of a run, but those that are gone."""

    def __init__(self) -> None:
        self._known: dict[int, _Rank] = {}
        self._gone: set[int] = set()
        self._lock = threading.Lock()

    def take(self, request: pb.ReportRanksRequest) -> None:
        with self._lock:
            for item in request.ranks:
                if item.is_dead or item.has_left or item.error:
                    self._known.pop(item.rank, None)
                    self._gone.add(item.rank)
                    continue
                step = item.heartbeat.step if item.HasField("heartbeat") else None
                is_seen = item.coverage.source not in ("", "none") and not item.coverage.problem
                self._known[item.rank] = _Rank(step, is_seen)
                self._gone.discard(item.rank)

    @property
    def lag_steps(self) -> float:
        """Of the slowest behind the fastest; not a number before any has told a step."""
        with self._lock:
            steps = [rank.step for rank in self._known.values() if rank.step is not None and rank.step >= 0]
        return max(steps) - min(steps) if steps else math.nan

    def coverage(self, world_size: int) -> float:
        """Of those that are not gone, the share that is seen; not a number when all are gone, or none tells anything:
        then nobody asked for timings."""
        with self._lock:
            if all(rank.step is None for rank in self._known.values()):
                return math.nan
            left, seen = world_size - len(self._gone), sum(rank.is_seen for rank in self._known.values())
        return seen / left if left > 0 else math.nan


class Gauges:
    """Of the runs that this daemon judges. Called by the diagnosis thread only, but for ``take``."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._shown: dict[str, set[Series]] = {}
        self._ranks: dict[Key, _Ranks] = {}
        self._newest: dict[str, Incarnation] = {}
        self._counted: dict[str, set[tuple[str, tuple[int, ...], tuple[str, ...]]]] = {}

    def take(self, request: pb.ReportRanksRequest) -> None:
        """A node's report to the analyst here; from any thread."""
        key = (request.run, incarnation_from_pb(request.incarnation))
        self._ranks.setdefault(key, _Ranks()).take(request)

    def show(self, analyst: Analyst) -> None:
        if self._newest.get(analyst.run, analyst.incarnation) > analyst.incarnation:
            return  # that of an older start, which drains: the series are the new one's
        self._newest[analyst.run] = analyst.incarnation
        open_faults = [logged.fault for logged in analyst.faults(has_resolved=False)]
        node_of_rank = [entry.node_id for entry in analyst.roster.entries]
        series = {line for fault in open_faults for line in _series(fault, node_of_rank)}
        self._set(analyst.run, series)
        ranks = self._ranks.get((analyst.run, analyst.incarnation), _Ranks())
        self._metrics.timing_ranks.labels(analyst.run).set(analyst.ranks_heard())
        self._metrics.progress_lag_steps.labels(analyst.run).set(ranks.lag_steps)
        self._metrics.timing_coverage_ratio.labels(analyst.run).set(ranks.coverage(analyst.roster.world_size))
        known = {(fault.kind.value, fault.ranks, fault.nodes) for fault in open_faults}
        for kind, _, _ in known - self._counted.get(analyst.run, set()):
            self._metrics.faults_total.labels(analyst.run, kind).inc()
        self._counted[analyst.run] = known

    def hide(self, analyst: Analyst) -> None:
        run = analyst.run
        if run in self._shown and self._newest.get(run) == analyst.incarnation:
            self._set(run, set())
            del self._shown[run]
            for gauge in (
                self._metrics.timing_ranks,
                self._metrics.progress_lag_steps,
                self._metrics.timing_coverage_ratio,
            ):
                gauge.remove(run)

    def forget(self, analyst: Analyst) -> None:
        """That start of the run is over. A run that is forgotten begins anew with its first incarnation, which must not
        look older than what is left here."""
        self.hide(analyst)
        self._ranks.pop((analyst.run, analyst.incarnation), None)
        if self._newest.get(analyst.run) == analyst.incarnation:
            del self._newest[analyst.run]
            self._counted.pop(analyst.run, None)

    def _set(self, run: str, series: set[Series]) -> None:
        before = self._shown.setdefault(run, set())
        for line in before - series:
            self._metrics.fault.remove(run, *line)
        for line in series:
            self._metrics.fault.labels(run, *line).set(1)
        self._shown[run] = series


def _series(fault: Fault, node_of_rank: list[str]) -> list[Series]:
    nodes = nodes_of(fault, node_of_rank) or ("",)
    return [(fault.kind.value, node, fault.confidence.value) for node in nodes]
