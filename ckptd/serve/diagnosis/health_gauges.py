"""How the node is, as Prometheus sees it: the figures of the newest sample, and what was made of them.

Layer: ``serve``, called by the diagnosis thread. Invariants: what the sample does not hold is absent, never zero: the
series of a device or GPU that is gone goes; an event lasts as long as the judge counts it, so that no scrape misses it;
of peers only the farthest and the median are told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from statistics import median
from typing import Final

from prometheus_client import Gauge

from ckptd.detect.health import HELD, split_name
from ckptd.health.monitor import INTERVAL_S, Snapshot
from ckptd.metrics import Metrics

_HELD_S: Final = HELD * INTERVAL_S
_PRESSURES: Final = {"cpu": "cpu_pressure_share", "memory": "memory_pressure_share", "io": "io_pressure_share"}
# What gpu_trouble calls a family of figures, and whether it is an event: one sample tells it, and it counts on.
_SIGNS: Final = {
    "gpu_thermal_throttle": ("thermal_throttle", False),
    "gpu_ecc_uncorrected_per_s": ("ecc_uncorrected", True),
    "gpu_lost": ("lost", True),
    "gpu_xid": ("xid", True),
}
Series = tuple[str, ...]


class HealthGauges:
    """See the module. ``now_s`` is monotonic."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._newest = Snapshot()
        self._began_s: float | None = None
        self._events_until_s: dict[Series, float] = {}
        self._shown: dict[Gauge, set[Series]] = {}
        for gauge in (
            metrics.node_cpu_steal_ratio,
            metrics.node_memory_available_ratio,
            metrics.node_tcp_retransmit_ratio,
        ):
            gauge.set(math.nan)

    def show(self, snapshot: Snapshot, now_s: float) -> None:
        """Set what has changed. Before the first sample its age is that of this."""
        self._began_s = now_s if self._began_s is None else self._began_s
        self._metrics.node_health_age_seconds.set(now_s - max(snapshot.at_s, self._began_s))
        if snapshot is not self._newest:
            self._newest = snapshot
            self._show_judgement(snapshot)
            self._show_node(snapshot.figures)
            self._show_gpus(snapshot.figures, now_s)

    def _show_judgement(self, snapshot: Snapshot) -> None:
        health, metrics = snapshot.health, self._metrics
        metrics.node_health_score.set(health.score)
        metrics.node_health_learned.set(health.is_learned)
        self._set(metrics.node_health_severity, {(family,): value for family, value in health.severities.items()})

    def _show_node(self, figures: Mapping[str, float]) -> None:
        metrics = self._metrics
        metrics.node_cpu_steal_ratio.set(figures.get("cpu_steal_share", math.nan))
        metrics.node_memory_available_ratio.set(figures.get("memory_available_share", math.nan))
        metrics.node_tcp_retransmit_ratio.set(figures.get("tcp_retransmit_share", math.nan))
        pressures: dict[Series, float] = {
            (resource,): figures[name] for resource, name in _PRESSURES.items() if name in figures
        }
        self._set(metrics.node_pressure_ratio, pressures)
        self._set(metrics.node_disk_latency_seconds, _by_label(figures, "disk_latency_s"))
        trips_s = _by_label(figures, "tcp_peer_rtt_s").values()
        of: dict[str, Callable[..., float]] = {"farthest": max, "median": median}
        trips: dict[Series, float] = {(which,): pick(trips_s) for which, pick in of.items()} if trips_s else {}
        self._set(metrics.node_peer_round_trip_seconds, trips)

    def _show_gpus(self, figures: Mapping[str, float], now_s: float) -> None:
        self._set(self._metrics.gpu_temperature_celsius, _by_label(figures, "gpu_temperature_c"))
        self._set(self._metrics.gpu_clock_hertz, _by_label(figures, "gpu_clock_hz"))
        troubles: dict[Series, float] = {}
        for family, (sign, is_event) in _SIGNS.items():
            for (label,), value in _by_label(figures, family).items():
                series = (label.rpartition(" on GPU ")[2], sign)  # an Xid: "79 on GPU 0000:3b:00"
                troubles[series] = max(troubles.get(series, 0.0), float(value > 0))
                if is_event and value > 0:
                    self._events_until_s[series] = now_s + _HELD_S
        self._events_until_s = {series: until for series, until in self._events_until_s.items() if until > now_s}
        self._set(self._metrics.gpu_trouble, troubles | dict.fromkeys(self._events_until_s, 1.0))

    def _set(self, gauge: Gauge, values: Mapping[Series, float]) -> None:
        for series in self._shown.get(gauge, set()) - values.keys():
            gauge.remove(*series)
        for series, value in values.items():
            gauge.labels(*series).set(value)
        self._shown[gauge] = set(values)


def _by_label(figures: Mapping[str, float], wanted: str) -> dict[Series, float]:
    """The figures of one family."""
    split = ((split_name(name), value) for name, value in figures.items())
    return {(label,): value for (family, label), value in split if family == wanted}
