"""Faults as Prometheus sees them: one series a fault that lasts, gone when it is over or another daemon judges.

Beside them, what the daemon that judges hears of the ranks: how many, how far apart they are, how much of them is seen.
"""

from __future__ import annotations

from ckptd.detect.actions import nodes_of
from ckptd.detect.records import Fault
from ckptd.metrics import Metrics
from ckptd.model import Incarnation
from ckptd.serve.diagnosis.analyst import Analyst

Series = tuple[str, str, str]


class Gauges:
    """Of the runs that this daemon judges. Called by the diagnosis thread only."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._shown: dict[str, set[Series]] = {}
        self._newest: dict[str, Incarnation] = {}
        self._counted: dict[str, set[tuple[str, tuple[int, ...], tuple[str, ...]]]] = {}

    def show(self, analyst: Analyst) -> None:
        if self._newest.get(analyst.run, analyst.incarnation) > analyst.incarnation:
            return  # that of an older start, which drains: the series are the new one's
        self._newest[analyst.run] = analyst.incarnation
        open_faults = [logged.fault for logged in analyst.faults(has_resolved=False)]
        node_of_rank = [entry.node_id for entry in analyst.roster.entries]
        series = {line for fault in open_faults for line in _series(fault, node_of_rank)}
        self._set(analyst.run, series)
        self._metrics.timing_ranks.labels(analyst.run).set(analyst.ranks_heard())
        self._metrics.progress_lag_steps.labels(analyst.run).set(analyst.lag_steps)
        self._metrics.timing_coverage_ratio.labels(analyst.run).set(analyst.coverage_ratio)
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
