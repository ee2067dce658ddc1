"""How a daemon and its runs stand, set twice a second: arena, queues, sessions, and each run by its newest start.

Layer: ``serve``; called by ``upkeep``. An older start of a run may still drain while a newer one trains: the series
are the newer one's. A run that has ended is not touched: its series are gone.
"""

from __future__ import annotations

import math

from ckptd.erasure.groups import losses_tolerated
from ckptd.format.slot import SlotState
from ckptd.serve.coordinator import SILENT_S
from ckptd.serve.node import Node
from ckptd.serve.node_run import NodeRun


def observe(node: Node) -> None:
    """Set every gauge that only time or somebody else changes."""
    metrics = node.metrics
    states = [slot.state for slot in node.arena.slots()]
    for state in SlotState:
        metrics.slots.labels(state.name.lower()).set(states.count(state))
    metrics.memory_used_bytes.set(node.arena.used_bytes)
    metrics.memory_budget_bytes.set(node.settings.memory_bytes)
    metrics.sessions.set(len(node.sessions))
    metrics.drain_oldest_seconds.set(node.drainer.oldest_s)
    newest: dict[str, NodeRun] = {}
    for run in sorted(node.node_runs(), key=lambda run: run.incarnation):
        newest[run.run] = run
    for run in newest.values():
        if not node.is_ended(run.run):
            _observe_run(node, run)


def _observe_run(node: Node, run: NodeRun) -> None:
    metrics, name = node.metrics, run.run
    joined = [member for member in list(run.ranks.values()) if member.state == "joined"]
    metrics.ranks.labels(name).set(len(joined))
    metrics.step_seconds.labels(name).set(max((member.step_s for member in joined if member.step_s), default=math.nan))
    metrics.coordinates.labels(name).set(run.is_coordinated_here)
    metrics.coordinator_silent_seconds.labels(name).set(run.reporter.silent_s)
    metrics.reports_queued.labels(name).set(run.reporter.queued)
    # Without a group there is nothing to lose; with one, 0 while nothing is protected.
    metrics.losses_planned.labels(name).set(losses_tolerated(run.groups, ()) if run.groups else math.nan)
    metrics.losses_tolerated.labels(name).set(_tolerated(run) if run.groups else math.nan)


def _tolerated(run: NodeRun) -> int:
    """As the coordinator says; while ranks here go on and it does not answer, without its node, as it would say of any
    other."""
    marks = run.watermarks
    is_alone = run.has_members and run.reporter.silent_s > SILENT_S
    if not (is_alone and marks.HasField("parity_of")):
        return marks.losses_tolerated
    return losses_tolerated(run.groups, {*marks.silent_nodes, run.roster.coordinator.node_id})
