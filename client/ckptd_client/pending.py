"""Snapshots whose futures are open, settled by the run's watermarks."""

from __future__ import annotations

import threading
import time
from typing import Final

from ckptd.errors import CkptdError, DaemonUnreachable, StepDead, Superseded, error_from_wire
from ckptd.model import Schedule
from ckptd_api.convert import schedule_entry_from_pb
from ckptd_api.v1 import types_pb2
from ckptd_client.snapshot import Snapshot, end

_FORGOTTEN_S: Final = 900.0


class Pending:
    """Open snapshots by step, and the schedule in force. Safe to use from any thread.

    ``incarnation_id`` is set when the ranks have met: what is being protected may be of an older incarnation.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[int, tuple[Snapshot, float]] = {}
        self.schedule = Schedule()
        self.incarnation_id = 0

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
        now, protecting = time.monotonic(), self._protecting(marks)
        # Without the lock: ending a future runs its callbacks, and they may save again.
        for step, (snapshot, since) in still_open.items():
            _settle(snapshot, marks)
            _settle_protected(snapshot, marks, protecting)
            if (marks.HasField("draining") and marks.draining == step) or protecting == step:
                since = now  # it may take long, and it is heard of
            if now - since > _FORGOTTEN_S:
                snapshot.fail(DaemonUnreachable(f"nothing was heard of step {step} for {_FORGOTTEN_S:g} s"))
            with self._lock:
                if snapshot.is_settled:
                    self._open.pop(step, None)
                elif step in self._open:
                    self._open[step] = (snapshot, since)

    def _protecting(self, marks: types_pb2.Watermarks) -> int | None:
        """The step of this incarnation whose parity is being made."""
        is_ours = marks.protecting.incarnation.id == self.incarnation_id
        return marks.protecting.step if marks.HasField("protecting") and is_ours else None

    def close(self, error: CkptdError) -> None:
        """Nothing more will be heard: every open future ends."""
        with self._lock:
            left, self._open = self._open, {}
        for snapshot, _ in left.values():
            snapshot.fail(error)


def _settle(snapshot: Snapshot, marks: types_pb2.Watermarks) -> None:
    """End ``staged`` and ``durable`` of ``snapshot`` when the watermarks decide them; all of it when it is dead."""
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


def _settle_protected(snapshot: Snapshot, marks: types_pb2.Watermarks, protecting: int | None) -> None:
    step = snapshot.step
    if snapshot.protected.done() or not snapshot.staged.done():
        return
    protected = marks.protected if marks.HasField("protected") else None
    newer = max((s for s in (protected, protecting) if s is not None and s > step), default=None)
    if protected == step:
        end(snapshot.protected, step)
    elif outcome := next((outcome for outcome in marks.not_protected if outcome.step == step), None):
        end(snapshot.protected, _error(outcome, f"step {step}"))
    elif newer is not None:
        end(snapshot.protected, Superseded(f"step {step} was passed over: protection went on to step {newer}"))


def _error(outcome: types_pb2.StepOutcome, what: str) -> CkptdError:
    return error_from_wire(outcome.error, f"{what}: {outcome.reason}", "")


def _died(step: int, outcome: types_pb2.StepOutcome) -> CkptdError:
    """StepDead or a subclass, whatever the cause: that is what a caller waits for."""
    error = _error(outcome, f"step {step}")
    return error if isinstance(error, StepDead) else StepDead(f"{error.message}", error.hint)
