"""Snapshots whose futures are open, settled by the run's watermarks."""

from __future__ import annotations

import threading
import time
from typing import Final

from ckptd.errors import CkptdError, DaemonUnreachable, StepDead, error_from_wire
from ckptd.model import Schedule
from ckptd_api.convert import schedule_entry_from_pb
from ckptd_api.v1 import types_pb2
from ckptd_client.snapshot import Snapshot, end

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
        with self._lock:
            still_open = dict(self._open)
        now = time.monotonic()
        # Without the lock: ending a future runs its callbacks, and they may save again.
        for step, (snapshot, since) in still_open.items():
            _settle(snapshot, marks)
            if marks.HasField("draining") and marks.draining == step:
                since = now  # a drain may take long, and it is heard of
            if now - since > _FORGOTTEN_S:
                snapshot.fail(DaemonUnreachable(f"nothing was heard of step {step} for {_FORGOTTEN_S:g} s"))
            with self._lock:
                if snapshot.is_settled:
                    self._open.pop(step, None)
                elif step in self._open:
                    self._open[step] = (snapshot, since)

    def close(self, error: CkptdError) -> None:
        """Nothing more will be heard: every open future ends."""
        with self._lock:
            left, self._open = self._open, {}
        for snapshot, _ in left.values():
            snapshot.fail(error)


def _settle(snapshot: Snapshot, marks: types_pb2.Watermarks) -> None:
    """End the futures of ``snapshot`` that the watermarks decide."""
    step = snapshot.step
    if died := next((outcome for outcome in marks.dead if outcome.step == step), None):
        snapshot.fail(_died(step, died))
    elif marks.HasField("staged") and step <= marks.staged:
        end(snapshot.staged, step)
    if snapshot.durable.done() or not snapshot.staged.done():
        return
    if outcome := next((outcome for outcome in marks.not_durable if outcome.step == step), None):
        end(snapshot.durable, _error(outcome, f"step {step}"))
    elif marks.HasField("durable") and step <= marks.durable:
        end(snapshot.durable, step)


def _error(outcome: types_pb2.StepOutcome, what: str) -> CkptdError:
    return error_from_wire(outcome.error, f"{what}: {outcome.reason}", "")


def _died(step: int, outcome: types_pb2.StepOutcome) -> CkptdError:
    """StepDead or a subclass, whatever the cause: that is what a caller waits for."""
    error = _error(outcome, f"step {step}")
    return error if isinstance(error, StepDead) else StepDead(f"{error.message}", error.hint)
