"""Snapshots whose futures are open, settled by the run's watermarks."""

from __future__ import annotations

import threading
import time
from typing import Final

from ckptd.errors import CkptdError, DaemonUnreachable, StepDead, error_from_wire
from ckptd.model import Schedule
from ckptd_api.convert import schedule_entry_from_pb
from ckptd_api.v1 import types_pb2
from ckptd_client.snapshot import Snapshot

_FORGOTTEN_S: Final = 900.0


class Pending:
    """Open snapshots by step, and the schedule in force. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[int, tuple[Snapshot, float]] = {}
        self.schedule = Schedule()

    def add(self, snapshot: Snapshot) -> None:
        with self._lock:
            self._open[snapshot.step] = (snapshot, time.monotonic())

    def apply(self, marks: types_pb2.Watermarks) -> None:
        """Take watermarks: schedule first, then every future they decide."""
        for entry in marks.schedule:
            value = schedule_entry_from_pb(entry)
            if value not in self.schedule.entries:
                self.schedule = self.schedule.extended(value)
        dead = {outcome.step: outcome for outcome in marks.dead}
        not_durable = {outcome.step: outcome for outcome in marks.not_durable}
        with self._lock:
            for step, (snapshot, _) in list(self._open.items()):
                if step in dead:
                    snapshot.fail(_died(step, dead[step]))
                elif marks.HasField("staged") and step <= marks.staged and not snapshot.staged.done():
                    snapshot.staged.set_result(step)
                if not snapshot.durable.done() and snapshot.staged.done():
                    if outcome := not_durable.get(step):
                        snapshot.durable.set_exception(_error(outcome, f"step {step}"))
                    elif marks.HasField("durable") and step <= marks.durable:
                        snapshot.durable.set_result(step)
            self._sweep()

    def close(self, error: CkptdError) -> None:
        """Nothing more will be heard: every open future ends."""
        with self._lock:
            for snapshot, _ in self._open.values():
                snapshot.fail(error)
            self._open.clear()

    def _sweep(self) -> None:
        now = time.monotonic()
        for step, (snapshot, since) in list(self._open.items()):
            if now - since > _FORGOTTEN_S and not snapshot.is_settled:
                snapshot.fail(DaemonUnreachable(f"nothing was heard of step {step} for {_FORGOTTEN_S:g} s"))
            if snapshot.is_settled:
                del self._open[step]


def _error(outcome: types_pb2.StepOutcome, what: str) -> CkptdError:
    return error_from_wire(outcome.error, f"{what}: {outcome.reason}", "")


def _died(step: int, outcome: types_pb2.StepOutcome) -> CkptdError:
    """StepDead or a subclass, whatever the cause: that is what a caller waits for."""
    error = _error(outcome, f"step {step}")
    return error if isinstance(error, StepDead) else StepDead(f"{error.message}", error.hint)
