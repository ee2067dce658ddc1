"""What a daemon does by itself twice a second: deadlines, reports, ended runs, orphaned slots, gauges."""

from __future__ import annotations

import threading
from typing import Final

import structlog

from ckptd.format.slot import SlotState
from ckptd.serve.node import Node

_TICK_S: Final = 0.5
log = structlog.get_logger()


class Upkeep:
    """A thread round ``node``; ``close`` ends it."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="upkeep", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(_TICK_S):
            try:
                self._tick()
            except Exception:  # a thread's boundary: the next tick tries again
                log.exception("upkeep failed")

    def _tick(self) -> None:
        node = self._node
        node.arena.expire_leases()
        for coordinator in node.coordinators():
            coordinator.tick()
        for run in node.node_runs():
            try:
                run.reporter.beat()
                node.settle(run)
            except Exception:  # one run's trouble is not the others'
                log.exception("upkeep of a run failed", run=run.run)
        self._drop_orphans()
        self._observe()

    def _drop_orphans(self) -> None:
        """Free slots being written by a client that is gone and will not join again."""
        node = self._node
        runs = {(run.run, run.incarnation): run for run in node.node_runs()}
        for slot in node.arena.slots():
            header = slot.header
            if slot.state is not SlotState.WRITING or header is None or slot.leases:
                continue
            run = runs.get((header.run, header.snapshot.incarnation))
            joined = run.ranks.get(header.rank) if run else None
            if (joined is None or joined.state != "joined") and not slot.is_mapped_by_a_client():
                node.arena.free(slot)
                if run:
                    run.report(run.dead(header.rank, header.snapshot.step, "StepDead", "its writer is gone"))

    def _observe(self) -> None:
        node, metrics = self._node, self._node.metrics
        states = [slot.state for slot in node.arena.slots()]
        for state in SlotState:
            metrics.slots.labels(state.name.lower()).set(states.count(state))
        metrics.memory_used_bytes.set(node.arena.used_bytes)
        metrics.memory_budget_bytes.set(node.settings.memory_bytes)
        metrics.sessions.set(len(node.sessions))
