"""Every metric of a daemon, defined once; docs/METRICS.md is printed by ``python -m ckptd.metrics``.

Layer: above ``errors``, used by ``serve`` and what it wires. Names follow Prometheus: base units, ``_total`` for
counters. Invariants: an instance per daemon with a registry of its own, so two in one process never share a count;
labels are bounded: ``run`` (shown from ``begin_run`` to ``forget_run``), a class of ``ckptd.errors``, a method, a node
at fault; never a step, a tensor, a path or every peer. What is not known is NaN here and absent from the page.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Iterator
from itertools import product
from typing import Final, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    Metric,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector

import ckptd
from ckptd.format import index, manifest, slot

M = TypeVar("M", bound=MetricWrapperBase)
disable_created_metrics()  # type: ignore[no-untyped-call]  # a third of all series, and nobody asks when a counter began

# A stall is to be milliseconds; the upper half is there to show how bad it was when it was not.
_STALL_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_RPC_BUCKETS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0)
_BULK_BUCKETS: Final = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0)

_OPENMETRICS: Final = "application/openmetrics-text"

# A counter that first appears as 1 did not rise in the eyes of increase(): what an alert counts begins at 0.
_FROM_ZERO: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "corrupt_total": {"place": ("memory", "parity", "tier")},
    "repaired_total": {"kind": ("slot", "parity")},
    "commits_total": {"result": ("committed", "failed")},
    "skips_total": {
        "reason": ("NoSlot", "CaptureBusy", "DaemonUnreachable", "CoordinatorUnreachable", "StepDead", "Torn")
    },
    "dead_steps_total": {},
    "torn_total": {},
    "protect_retries_total": {},
    "timing_dropped_total": {},
    "faults_total": {"kind": ("slow_compute", "slow_link", "slow_comm", "hang", "comm_hang", "desync", "death")},
    "fault_actions_total": {"result": ("done", "failed", "killed", "refused")},
    "restore_seconds": {"source": ("memory", "peer", "reconstruction", "tier")},
}


class Metrics:
    """The metrics of one daemon; an attribute each. Safe to use from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._all: list[tuple[MetricWrapperBase, list[str]]] = []
        self._runs: set[str] = set()
        self._lock = threading.Lock()
        self._define_snapshots()
        self._define_redundancy()
        self._define_drains()
        self._define_memory()
        self._define_failures()
        self._define_restores()
        self._define_faults()
        self._define_node_health()
        self._define_daemon()

    def _define_snapshots(self) -> None:
        self.stall_seconds = self._histogram(
            "ckptd_stall_seconds", "Time one snapshot blocked the training loop of a rank.", ["run"], _STALL_BUCKETS
        )
        self.step_seconds = self._gauge(
            "ckptd_step_seconds", "Time of a training step of the slowest rank of this node.", ["run"]
        )
        self.snapshot_step = self._gauge(
            "ckptd_snapshot_step", "Newest step at a level: staged, protected or durable.", ["run", "level"]
        )
        self.snapshot_timestamp_seconds = self._gauge(
            "ckptd_snapshot_timestamp_seconds",
            "Unix time at which the newest step reached the level.",
            ["run", "level"],
        )
        self.snapshot_interval_seconds = self._gauge(
            "ckptd_snapshot_interval_seconds",
            "Usual time from one step to the next that reaches the level: the median of the last ones.",
            ["run", "level"],
        )
        self.capture_seconds = self._histogram(
            "ckptd_capture_seconds",
            "Time to copy one rank's state into its slot, beside training.",
            ["run"],
            _BULK_BUCKETS,
        )
        self.seal_seconds = self._histogram(
            "ckptd_seal_seconds", "From a rank's call of seal to the sealed slot.", ["run"], _BULK_BUCKETS
        )
        self.bytes_total = self._counter(
            "ckptd_bytes",
            "Payload bytes moved, by direction: captured (into slots), protected (pulled to encode parity), served (to "
            "peers), drained, restored, verified, scrubbed; and by tier: scope and scheme, as shared-file, or memory.",
            ["run", "direction", "tier"],
        )

    def _define_redundancy(self) -> None:
        self.losses_tolerated = self._gauge(
            "ckptd_losses_tolerated",
            "Nodes that may still be lost, whichever they are, with the newest protected snapshot whole; negative: it "
            "is not whole now.",
            ["run"],
        )
        self.losses_planned = self._gauge(
            "ckptd_losses_planned", "Nodes that may be lost once a snapshot is protected, by the run's code.", ["run"]
        )
        self.protect_seconds = self._histogram(
            "ckptd_protect_seconds", "Time to make this node's parity of one snapshot.", ["run"], _BULK_BUCKETS
        )
        self.transfer_seconds = self._histogram(
            "ckptd_transfer_seconds",
            "Of making one fragment of parity: time spent on pulling pieces.",
            ["run"],
            _BULK_BUCKETS,
        )
        self.encode_seconds = self._histogram(
            "ckptd_encode_seconds",
            "Of making one fragment of parity: time spent on encoding and checksums.",
            ["run"],
            _BULK_BUCKETS,
        )
        self.protect_retries_total = self._counter(
            "ckptd_protect_retries", "Pulls for protection that failed and were tried again.", ["run"]
        )
        self.parity_queued = self._gauge(
            "ckptd_parity_queued", "Fragments of parity that are not made yet: waiting or under way.", []
        )
        self.repaired_total = self._counter(
            "ckptd_repaired",
            "Corrupt or lost copies in memory that were made again, by kind: slot or parity.",
            ["run", "kind"],
        )

    def _define_drains(self) -> None:
        self.drain_seconds = self._histogram(
            "ckptd_drain_seconds", "Time to write one rank's shard to a tier.", ["run"], _BULK_BUCKETS
        )
        self.drains_queued = self._gauge(
            "ckptd_drains_queued", "Shards whose drain has not ended: waiting or under way.", []
        )
        self.drain_oldest_seconds = self._gauge(
            "ckptd_drain_oldest_seconds", "Age of the oldest drain that has not ended; 0: there is none.", []
        )
        self.commits_total = self._counter(
            "ckptd_commits",
            "Checkpoints committed in the shared tiers, and those given up, by result.",
            ["run", "result"],
        )
        self.commit_timestamp_seconds = self._gauge(
            "ckptd_commit_timestamp_seconds",
            "Unix time of the last commit in the shared tiers, by result; failed after committed: the last failed.",
            ["run", "result"],
        )
        self.tier_ready = self._gauge(
            "ckptd_tier_ready",
            "1: the tier answered when it was last asked; 0: not, or not in time. By scope and scheme; the worst.",
            ["tier"],
        )

    def _define_memory(self) -> None:
        self.slots = self._gauge("ckptd_slots", "Slots in the arena, by state.", ["state"])
        self.memory_used_bytes = self._gauge("ckptd_memory_used_bytes", "Memory that the arena holds.", [])
        self.memory_budget_bytes = self._gauge("ckptd_memory_budget_bytes", "Memory that the arena may hold.", [])

    def _define_failures(self) -> None:
        self.skips_total = self._counter(
            "ckptd_skips", "Due steps not taken, by reason (a class of ckptd.errors).", ["run", "reason"]
        )
        self.dead_steps_total = self._counter(
            "ckptd_dead_steps", "Due steps that will never be staged, as the coordinator counts them.", ["run"]
        )
        self.torn_total = self._counter(
            "ckptd_torn", "Captures discarded because their source changed while it was copied.", ["run"]
        )
        self.corrupt_total = self._counter(
            "ckptd_corrupt", "Copies found corrupt, by place: memory, parity or tier.", ["run", "place"]
        )

    def _define_restores(self) -> None:
        self.restore_seconds = self._histogram(
            "ckptd_restore_seconds",
            "Time to bring one rank's shard into memory and check it, by source: memory, peer, reconstruction, tier.",
            ["run", "source"],
            _BULK_BUCKETS,
        )

    def _define_faults(self) -> None:
        self.fault = self._gauge(
            "ckptd_fault",
            "1 for each fault that lasts, by kind, node and confidence; on the daemon that judges the run.",
            ["run", "kind", "node", "confidence"],
        )
        self.faults_total = self._counter(
            "ckptd_faults", "Faults found, once each, by kind; on the daemon that judges the run.", ["run", "kind"]
        )
        self.fault_actions_total = self._counter(
            "ckptd_fault_actions", "Runs of --on-fault, by result: done, failed, killed or refused.", ["run", "result"]
        )
        self.progress_lag_steps = self._gauge(
            "ckptd_progress_lag_steps",
            "Steps that the slowest rank is behind the fastest; on the daemon that judges the run.",
            ["run"],
        )
        self.timing_ranks = self._gauge(
            "ckptd_timing_ranks", "Ranks whose timings the daemon that judges the run hears of.", ["run"]
        )
        self.timing_coverage_ratio = self._gauge(
            "ckptd_timing_coverage_ratio",
            "Of all ranks, those every operation of which is seen; on the daemon that judges the run.",
            ["run"],
        )
        self.timing_dropped_total = self._counter(
            "ckptd_timing_dropped", "Operations that ranks of this node could not keep until they were sent.", ["run"]
        )

    def _define_node_health(self) -> None:
        self.node_health_score = self._gauge(
            "ckptd_node_health_score",
            "How far this node is from its own normal: 0 well, from 0.5 unwell, at most 1.",
            [],
        )
        self.node_health_severity = self._gauge(
            "ckptd_node_health_severity", "Of a family of figures, from 0 to 1: 0.5 is out of line.", ["figure"]
        )
        self.node_health_learned = self._gauge(
            "ckptd_node_health_learned", "1 once enough was seen of this node to say what is normal for it.", []
        )
        self.node_health_age_seconds = self._gauge(
            "ckptd_node_health_age_seconds", "Since the figures of this node were last read.", []
        )
        self.node_cpu_steal_ratio = self._gauge("ckptd_node_cpu_steal_ratio", "CPU time taken by the hypervisor.", [])
        self.node_pressure_ratio = self._gauge(
            "ckptd_node_pressure_ratio", "Time in which tasks waited for a resource: cpu, memory, io.", ["resource"]
        )
        self.node_memory_available_ratio = self._gauge(
            "ckptd_node_memory_available_ratio", "Memory that programs can still have, of all.", []
        )
        self.node_disk_latency_seconds = self._gauge(
            "ckptd_node_disk_latency_seconds", "Mean time of a request to a disk.", ["device"]
        )
        self.node_tcp_retransmit_ratio = self._gauge(
            "ckptd_node_tcp_retransmit_ratio", "TCP segments sent again, of all sent.", []
        )
        self.node_peer_round_trip_seconds = self._gauge(
            "ckptd_node_peer_round_trip_seconds", "TCP round trip to peers: to the farthest, and in the median.", ["of"]
        )
        self.gpu_temperature_celsius = self._gauge("ckptd_gpu_temperature_celsius", "Temperature of a GPU.", ["gpu"])
        self.gpu_clock_hertz = self._gauge("ckptd_gpu_clock_hertz", "Clock of the multiprocessors of a GPU.", ["gpu"])
        self.gpu_trouble = self._gauge(
            "ckptd_gpu_trouble",
            "1 while a GPU throttles for heat, and for an hour after it lost memory or contact or logged an Xid.",
            ["gpu", "sign"],
        )

    def _define_daemon(self) -> None:
        self.ranks = self._gauge("ckptd_ranks", "Ranks of this node that are joined to the run.", ["run"])
        self.coordinates = self._gauge("ckptd_coordinates", "1 on the daemon that coordinates the run.", ["run"])
        self.coordinator_silent_seconds = self._gauge(
            "ckptd_coordinator_silent_seconds", "Since the run's coordinator last answered this daemon.", ["run"]
        )
        self.reports_queued = self._gauge(
            "ckptd_reports_queued", "Reports of progress that the run's coordinator has not taken yet.", ["run"]
        )
        self.sessions = self._gauge("ckptd_sessions", "Sessions given out since the daemon started.", [])
        self.rpc_seconds = self._histogram(
            "ckptd_rpc_seconds", "Time of a call, by method and gRPC code.", ["method", "code"], _RPC_BUCKETS
        )
        self.build = self._info("ckptd_build", "Version of ckptd and of the formats it writes.")
        self.build.info(
            {
                "version": ckptd.__version__,
                "slot_format": str(slot.VERSION),
                "index_format": str(index.VERSION),
                "manifest_format": str(manifest.VERSION),
            }
        )
        self.node = self._info("ckptd_node", "The daemon's node, as faults name it, and its advertised address.")
        ProcessCollector(registry=self.registry)

    # --- kinds ---------------------------------------------------------------------------------------------------
    def _counter(self, name: str, text: str, labels: list[str]) -> Counter:
        return self._add(Counter(name, text, labels, registry=self.registry), labels)

    def _gauge(self, name: str, text: str, labels: list[str]) -> Gauge:
        return self._add(Gauge(name, text, labels, registry=self.registry), labels)

    def _histogram(self, name: str, text: str, labels: list[str], buckets: tuple[float, ...]) -> Histogram:
        return self._add(Histogram(name, text, labels, registry=self.registry, buckets=buckets), labels)

    def _info(self, name: str, text: str) -> Info:
        return self._add(Info(name, text, registry=self.registry), [])

    def _add(self, metric: M, labels: list[str]) -> M:
        self._all.append((metric, labels))
        return metric

    # --- use -----------------------------------------------------------------------------------------------------
    def render(self, accept: str = "") -> tuple[bytes, str]:
        """The body of /metrics and its content type: OpenMetrics for who asks for it (``accept``), else plain text."""
        # Whatever else is asked of a format (a version, an escaping) is not looked at: it cannot make this fail.
        encode, content_type = choose_encoder(_OPENMETRICS if _OPENMETRICS in accept.lower() else "")
        with self._lock:
            shown = frozenset(self._runs)
        return encode(_Page(self.registry, shown)), content_type

    def begin_run(self, run: str) -> None:
        """Show the series of a run from now on; the counters that alerts watch begin at 0. Nothing of before it shows:
        what came late of the run's last start is dropped."""
        with self._lock:
            if run in self._runs:
                return
            self._drop(run)
            self._runs.add(run)
        for name, labels in _FROM_ZERO.items():
            for values in product(*labels.values()):
                getattr(self, name).labels(run, *values)

    def forget_run(self, run: str) -> None:
        """Drop every series of a run that has ended: a name that comes back starts from zero."""
        with self._lock:
            self._runs.discard(run)
            self._drop(run)

    def _drop(self, run: str) -> None:
        for metric, labels in self._all:
            if "run" not in labels:
                continue
            series = {
                tuple(sample.labels[label] for label in labels)
                for family in metric.collect()
                for sample in family.samples
                if sample.labels["run"] == run
            }
            for values in series:
                metric.remove(*values)

    def markdown(self) -> str:
        """docs/METRICS.md."""
        rows = []
        for metric, names in self._all:
            (family,) = metric.describe()
            suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
            labels = ", ".join(f"`{label}`" for label in names) or "none"
            rows.append(f"| `{family.name}{suffix}` | {family.type} | {labels} | {family.documentation} |")
        return "\n".join(
            [
                "<!-- Printed by `python -m ckptd.metrics`; change ckptd/metrics.py instead. -->",
                "# Metrics of `ckptd serve`",
                "",
                "Served by `--http` at `/metrics`, as OpenMetrics to who asks for it, else as plain text. Series of a",
                "run come with its first rank and go when it ends: every rank called `close()` and its drains are",
                "over, or `ckptd prune`. A figure that is not known has no series.",
                "",
                "| name | type | labels | meaning |",
                "| --- | --- | --- | --- |",
                *rows,
                "",
            ]
        )


class _Page(Collector):
    """What is in ``registry``, of runs only those that are ``shown``, without what is not known."""

    def __init__(self, registry: CollectorRegistry, shown: frozenset[str]) -> None:
        self._registry = registry
        self._shown = shown

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            family.samples = [s for s in family.samples if not math.isnan(s.value) and self._is_shown(s.labels)]
            yield family

    def _is_shown(self, labels: dict[str, str]) -> bool:
        return "run" not in labels or labels["run"] in self._shown


if __name__ == "__main__":
    sys.stdout.write(Metrics().markdown())
