"""Every metric of a daemon, defined once; docs/METRICS.md is printed by ``python -m ckptd.metrics``.

Layer: above ``errors``, used by ``serve`` and what it wires. Names follow Prometheus: base units, ``_total`` for
counters. Invariants: an instance per daemon with a registry of its own, so two in one process never share a count;
labels are bounded: ``run`` (dropped by ``forget_run``), a class of ``ckptd.errors``, a method; never a step, a tensor
or a path.
"""

from __future__ import annotations

import sys
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST, generate_latest

import ckptd
from ckptd.format import index, manifest, slot

# A stall is to be milliseconds; the upper half is there to show how bad it was when it was not.
_STALL_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_RPC_BUCKETS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0)
_BULK_BUCKETS: Final = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0)


class Metrics:
    """The metrics of one daemon; an attribute each. Safe to use from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._all: list[tuple[MetricWrapperBase, list[str]]] = []

        self.stall_seconds = self._histogram(
            "ckptd_stall_seconds", "Time one snapshot blocked the training loop of a rank.", ["run"], _STALL_BUCKETS
        )
        self.snapshot_step = self._gauge(
            "ckptd_snapshot_step", "Newest step at a level: staged, protected or durable.", ["run", "level"]
        )
        self.snapshot_timestamp_seconds = self._gauge(
            "ckptd_snapshot_timestamp_seconds",
            "Unix time at which the newest step reached the level.",
            ["run", "level"],
        )
        self.bytes_total = self._counter(
            "ckptd_bytes",
            "Payload bytes moved, by direction: captured (into slots), protected (pulled to encode parity), served (to "
            "peers), drained (to tiers), restored, verified, scrubbed.",
            ["run", "direction"],
        )
        self.losses_tolerated = self._gauge(
            "ckptd_losses_tolerated",
            "Nodes that may still be lost, whichever they are, with the newest protected snapshot whole; negative: it "
            "is not whole now.",
            ["run"],
        )
        self.protect_seconds = self._histogram(
            "ckptd_protect_seconds", "Time to make this node's parity of one snapshot.", ["run"], _BULK_BUCKETS
        )
        self.protect_retries_total = self._counter(
            "ckptd_protect_retries", "Pulls for protection that failed and were tried again.", ["run"]
        )
        self.repaired_total = self._counter(
            "ckptd_repaired",
            "Corrupt or lost copies in memory that were made again, by kind: slot or parity.",
            ["run", "kind"],
        )
        self.drain_seconds = self._histogram(
            "ckptd_drain_seconds", "Time to write one rank's shard to a tier.", ["run"], _BULK_BUCKETS
        )
        self.drains_queued = self._gauge(
            "ckptd_drains_queued", "Shards whose drain has not ended: waiting or under way.", []
        )
        self.commits_total = self._counter(
            "ckptd_commits", "Checkpoints committed in a tier, and those given up, by result.", ["run", "result"]
        )
        self.seal_seconds = self._histogram(
            "ckptd_seal_seconds", "From a rank's call of seal to the sealed slot.", ["run"], _BULK_BUCKETS
        )
        self.slots = self._gauge("ckptd_slots", "Slots in the arena, by state.", ["state"])
        self.memory_used_bytes = self._gauge("ckptd_memory_used_bytes", "Memory that the arena holds.", [])
        self.memory_budget_bytes = self._gauge("ckptd_memory_budget_bytes", "Memory that the arena may hold.", [])
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
        self.restore_seconds = self._histogram(
            "ckptd_restore_seconds",
            "Time to bring one rank's shard into memory and check it, by source: memory, peer, reconstruction, tier.",
            ["run", "source"],
            _BULK_BUCKETS,
        )
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
        self.timing_ranks = self._gauge(
            "ckptd_timing_ranks", "Ranks whose timings the daemon that judges the run hears of.", ["run"]
        )
        self.timing_dropped_total = self._counter(
            "ckptd_timing_dropped", "Operations that ranks of this node could not keep until they were sent.", ["run"]
        )
        self.rpc_seconds = self._histogram(
            "ckptd_rpc_seconds", "Time of a call, by method and gRPC code.", ["method", "code"], _RPC_BUCKETS
        )
        self.sessions = self._gauge("ckptd_sessions", "Sessions open with trainers and operators.", [])
        self.ranks = self._gauge("ckptd_ranks", "Ranks of this node that are joined to the run.", ["run"])
        self._describe_build()

    def _describe_build(self) -> None:
        self.build = Info("ckptd_build", "Version of ckptd and of the formats it writes.", registry=self.registry)
        self._all.append((self.build, []))
        self.build.info(
            {
                "version": ckptd.__version__,
                "slot_format": str(slot.VERSION),
                "index_format": str(index.VERSION),
                "manifest_format": str(manifest.VERSION),
            }
        )

    def _counter(self, name: str, text: str, labels: list[str]) -> Counter:
        metric = Counter(name, text, labels, registry=self.registry)
        self._all.append((metric, labels))
        return metric

    def _gauge(self, name: str, text: str, labels: list[str]) -> Gauge:
        metric = Gauge(name, text, labels, registry=self.registry)
        self._all.append((metric, labels))
        return metric

    def _histogram(self, name: str, text: str, labels: list[str], buckets: tuple[float, ...]) -> Histogram:
        metric = Histogram(name, text, labels, registry=self.registry, buckets=buckets)
        self._all.append((metric, labels))
        return metric

    def render(self) -> tuple[bytes, str]:
        """The body of /metrics and its content type (OpenMetrics)."""
        body: bytes = generate_latest(self.registry)  # type: ignore[no-untyped-call]
        return body, CONTENT_TYPE_LATEST

    def forget_run(self, run: str) -> None:
        """Drop every series of a run that has ended: a name that comes back starts from zero."""
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
                "Served by `--http` at `/metrics` as OpenMetrics text. Series of a run go when the run ends.",
                "",
                "| name | type | labels | meaning |",
                "| --- | --- | --- | --- |",
                *rows,
                "",
            ]
        )


if __name__ == "__main__":
    sys.stdout.write(Metrics().markdown())
