"""What a daemon does by itself twice a second: deadlines, reports, ended runs, orphaned slots, gauges."""

from __future__ import annotations

import threading
import time
from typing import Final

import structlog

from ckptd.failpoints import failpoint
from ckptd.format.slot import SlotState
from ckptd.serve.node import Node
from ckptd.serve.node_gauges import observe

_TICK_S: Final = 0.5
log = structlog.get_logger()


class Upkeep:
    """A thread round ``node``; ``close`` ends it."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="upkeep", daemon=True)
        self._ticked_at_s = time.monotonic()

    def start(self) -> None:
        self._ticked_at_s = time.monotonic()
        self._thread.start()

    @property
    def silent_s(self) -> float:
        """Since it last came round: more than a moment means that it is stuck."""
        return time.monotonic() - self._ticked_at_s

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(_TICK_S):
            try:
                self._tick()
            except Exception:  # a thread's boundary: the next tick tries again
                log.exception("upkeep failed")
            self._ticked_at_s = time.monotonic()

    def _tick(self) -> None:
        failpoint("upkeep.tick")
        node = self._node
        node.arena.expire_leases()
        for coordinator in node.coordinators():
            if not node.is_over(coordinator.run, coordinator.incarnation):
                coordinator.tick()
        for run in node.node_runs():
            if node.is_over(run.run, run.incarnation):
                continue
            try:
                run.reporter.beat()
                node.settle(run)
            except Exception:  # one run's trouble is not the others'
                log.exception("upkeep of a run failed", run=run.run)
        self._drop_orphans()
        observe(node)

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
