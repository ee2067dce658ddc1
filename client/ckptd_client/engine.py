"""The capture worker: one thread that carries captures from save() to the sealed slot, one at a time.

What fails here is reported (the step is dead, with the reason) and counted; it never reaches the training loop.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Final

import torch

from ckptd.errors import CkptdError, DaemonUnreachable, InstanceChanged, SlotNotReady, StepDead
from ckptd.failpoints import failpoint
from ckptd.format.blocks import SlotLayout
from ckptd.memory import Bytes
from ckptd_api.v1 import node_pb2, types_pb2
from ckptd_client.binding import Binding
from ckptd_client.capture import Capture, Patience
from ckptd_client.handover import Handover
from ckptd_client.link import Link
from ckptd_client.plan import Plan

_CALL_S: Final = 5.0
_SEAL_S: Final = 60.0
_REJOIN_S: Final = 30.0
_SLOT_S: Final = 120.0
_POLL_S: Final = 0.002
log = logging.getLogger("ckptd_client")


class CaptureEngine:
    """Runs captures. ``device`` is that of the state, None for the host's memory. The handover is made once the link
    has joined; its mappings are dropped when the daemon restarts."""

    def __init__(self, link: Link, device: torch.device | None) -> None:
        self.skipped: Counter[str] = Counter()
        self._untold: Counter[str] = Counter()  # of them, those that the daemon has not heard of
        self._telling = threading.Lock()
        self.patience = Patience()
        self._link = link
        self._device = device
        self._handover: Handover | None = None
        self._bindings: dict[tuple[str, int], Binding] = {}
        self._is_stale = False
        self._current: Capture | None = None
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="ckptd-capture", daemon=True)
        self._thread.start()

    @property
    def current(self) -> Capture | None:
        """The capture under way, if any. One that is staged is over: only the answer to its seal is on its way."""
        capture = self._current
        return None if capture is None or capture.is_over or capture.snapshot.is_staged else capture

    def submit(self, capture: Capture) -> None:
        self._current = capture
        self._queue.put(lambda: self._carry(capture))

    def submit_drop(self, step: int, error: CkptdError) -> None:
        """Report a due step that this rank does not take."""
        self._count(error)
        self._queue.put(lambda: self._drop(step, error, "", 0))

    def submit_pace(self, step: int, step_s: float, stall_s: float) -> None:
        self._queue.put(lambda: self._report_pace(step, step_s, stall_s))

    def forget_mappings(self) -> None:
        """The daemon is another process: slots are mapped anew before the next capture."""
        self._is_stale = True

    def close(self, timeout_s: float) -> None:
        """Finish what is under way, within ``timeout_s``."""
        self._queue.put(None)
        self._thread.join(timeout_s)
        if capture := self.current:
            capture.fail(StepDead("closed before it was sealed"))
            self._thread.join(1.0)
        self._bindings.clear()
        if self._handover:
            self._handover.forget()

    # --- the thread ------------------------------------------------------------------------------------------------
    def _work(self) -> None:
        if self._device is not None:
            # The current device is each thread's own: without this a context would be opened on device 0.
            torch.cuda.set_device(self._device)
        while (task := self._queue.get()) is not None:
            try:
                task()
            except Exception:  # a thread's boundary: the trainer must go on
                log.warning("capture worker", exc_info=True)

    def _carry(self, capture: Capture) -> None:
        step = capture.snapshot.step
        slot, generation = "", 0
        try:
            failpoint("client.before_begin")
            granted = self._begin(capture)
            slot, generation = granted.slot, granted.generation
            began_s = time.monotonic()
            self._copy(capture, granted)
            capture_s = time.monotonic() - began_s
            failpoint("client.before_seal")
            self._seal(capture, granted, capture_s)
            self.patience.refill()
            failpoint("client.after_seal")
        except CkptdError as error:
            self._give_up(capture, step, error, slot, generation)
        except Exception as error:  # noqa: BLE001  a thread's boundary: the step is dead, with the reason
            self._give_up(capture, step, StepDead(f"{type(error).__name__}: {error}"), slot, generation)
        finally:
            capture.end()

    def _give_up(self, capture: Capture, step: int, error: CkptdError, slot: str, generation: int) -> None:
        capture.fail(error)
        self._count(error)
        if isinstance(error, DaemonUnreachable):
            self._link.suspect(error)
        if not isinstance(error, StepDead):
            error = StepDead(f"step {step}: {error.message}", error.hint)
        log.warning("snapshot of step %d is lost: %s", step, error)
        capture.settle()
        capture.end()  # before anybody hears of it: who does may save again at once
        self._drop(step, error, slot, generation)
        capture.snapshot.fail(error)

    def _begin(self, capture: Capture) -> node_pb2.BeginResponse:
        """A slot; asks again while one is being made, until the capture is given up at a fence."""
        link, plan = self._link, capture.plan
        assert link.membership is not None
        request = node_pb2.BeginRequest(
            run=link.run,
            incarnation=link.incarnation,
            rank=link.rank,
            step=capture.snapshot.step,
            index_bytes=len(capture.index),
            segments=[types_pb2.Segment(dtype=s.dtype, size_bytes=s.size_bytes) for s in plan.segments],
            is_persisted=capture.is_persisted,
            instance=link.instance,
            roster_version=link.membership.roster_at(capture.snapshot.step).version,
        )
        until = time.monotonic() + _SLOT_S
        while True:
            if capture.failed:
                raise capture.failed
            try:
                granted: node_pb2.BeginResponse = link.daemon.call("Begin", request, _CALL_S)
                return granted
            except SlotNotReady as error:
                capture.postponed = error
                if time.monotonic() > until:
                    raise
                time.sleep(_POLL_S)

    def _copy(self, capture: Capture, granted: node_pb2.BeginResponse) -> None:
        plan, link = capture.plan, self._link
        assert link.membership is not None
        if self._is_stale and self._handover:
            self._bindings.clear()
            self._handover.forget()
            self._is_stale = False
        if self._handover is None:
            self._handover = Handover(link.daemon, max(2, link.about.slots) + 1, is_pinned=self._device is not None)
        layout = SlotLayout.plan(len(capture.index), plan.segments, link.membership.roster.block_bytes)
        target = self._handover.open(granted.slot, granted.generation, layout.payload_bytes)
        try:
            capture.bind(self._binding(plan, layout, target.key, target.payload, capture), target)
            capture.copy()
            target.finish(_SEAL_S)
        except BaseException:
            target.abort()
            raise

    def _binding(self, plan: Plan, layout: SlotLayout, key: str, payload: Bytes, capture: Capture) -> Binding:
        """The plan's views of this memory, made anew when plan, layout or memory changed."""
        address = payload.ctypes.data
        for old in [k for k, b in self._bindings.items() if b.plan is not plan]:
            del self._bindings[old]
        binding = self._bindings.get((key, address))
        if binding is None or binding.layout.segment_offsets != layout.segment_offsets:
            binding = Binding(plan, layout, payload, capture.leaves)
            self._bindings[key, address] = binding
        return binding

    def _seal(self, capture: Capture, granted: node_pb2.BeginResponse, capture_s: float) -> None:
        """Seal, also across a restart of the daemon: it adopts the slot while we hold it mapped."""
        link = self._link
        request = node_pb2.SealRequest(
            run=link.run,
            incarnation=link.incarnation,
            rank=link.rank,
            step=capture.snapshot.step,
            slot=granted.slot,
            generation=granted.generation,
            index_crc=capture.index_crc,
            capture_seconds=capture_s,
        )
        until = time.monotonic() + _REJOIN_S
        while True:
            try:
                link.daemon.call("Seal", request, _SEAL_S)
                return
            except (DaemonUnreachable, InstanceChanged):
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)
                link.wait_joined(max(0.0, until - time.monotonic()))

    def _drop(self, step: int, error: CkptdError, slot: str, generation: int) -> None:
        link = self._link
        if link.membership is None or link.problem is not None:
            return  # the next step that this rank reports says that it passed this one over
        request = node_pb2.DropRequest(
            run=link.run,
            incarnation=link.incarnation,
            rank=link.rank,
            outcome=types_pb2.StepOutcome(step=step, error=type(error).__name__, reason=error.message),
            slot=slot,
            generation=generation,
        )
        self._tell("Drop", request)

    def _report_pace(self, step: int, step_s: float, stall_s: float) -> None:
        link = self._link
        if link.membership is None or link.problem is not None:
            return
        request = node_pb2.ReportPaceRequest(
            run=link.run,
            incarnation=link.incarnation,
            rank=link.rank,
            step=step,
            step_seconds=step_s,
            stall_seconds=stall_s,
        )
        self._tell("ReportPace", request)

    def _tell(self, method: str, request: node_pb2.DropRequest | node_pb2.ReportPaceRequest) -> None:
        """Send it with the skips that the daemon has not heard of; what it does not take is told the next time."""
        with self._telling:
            told, self._untold = self._untold, Counter()
        request.skipped.update(told)
        try:
            self._link.daemon.call(method, request, _CALL_S)
        except CkptdError as failure:
            log.debug("%s not taken: %s", method, failure)
            with self._telling:
                self._untold += told

    def _count(self, error: CkptdError) -> None:
        with self._telling:
            self.skipped[type(error).__name__] += 1
            self._untold[type(error).__name__] += 1
