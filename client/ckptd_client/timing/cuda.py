"""Operations on CUDA devices, timed by events on the device's own clock.

Layer: inside ``ckptd_client.timing``. The host only enqueues, so its clock says nothing: an event before and one after
tell how long an operation kept its stream. Every operation gets the one after it, by which it is known to be over;
those of every ``SAMPLE_STEPS``-th step also the one before, and only such steps are not masked INCOMPLETE. All ranks
choose the same steps. Step marks are events too, so that marks and operations are on one clock.

Where the end of an operation is, by how it was called: synchronously, it runs on the caller's stream and ends where
that stream is afterwards; asynchronously and in place (DDP's buckets), where a callback of its future finds itself;
else on the caller's stream after its wait. Not used, because they change the job: ``TORCH_NCCL_ENABLE_TIMING``; a wait
of our own on a side stream (it ends NCCL's hold on the tensors, which may then be reused too early); the future of an
operation with outputs of its own (its callback makes the allocator hold them back).

Invariants: nothing of ours waits for a device; no tensor is kept; nothing is enqueued while a graph is captured.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic_ns
from typing import Any, Final

import torch
import torch.distributed as dist

from ckptd.format.timings import Mask
from ckptd_client.timing.recorder import Operation, Recorder

SAMPLE_STEPS: Final = 4
MOST_QUEUED: Final = 16384
_THREAD_LOCAL_CAPTURE: Final = 1
_OVERTAKEN_NS: Final = 5_000_000_000
WriteStep = Callable[[int, int, Mask], None]


@dataclass(slots=True)
class _Mark:
    """A step mark: event, and its time once it is known."""

    event: Any
    step: int
    mask: Mask
    write: WriteStep
    at_ns: int | None = None


@dataclass(slots=True)
class _End:
    operation: Operation
    event: Any
    since: _Mark | None


class DeviceTimer:
    """See the module. ``begin``, ``end`` and ``mark`` are called by the training threads, ``poll`` by one other."""

    def __init__(self) -> None:
        self.is_used = False
        self.polls_at_marks = False  # because no other thread may
        self._is_timed = False
        self._mark: _Mark | None = None  # the last one enqueued
        self._known: _Mark | None = None  # the last one whose time is known
        self._ends: deque[_End] = deque(maxlen=MOST_QUEUED)
        self._marks: deque[_Mark] = deque(maxlen=MOST_QUEUED)
        self._pool: list[Any] = []
        # Streams share one queue to the device then, and another stream's wait would hold up the program's own.
        self._has_one_queue = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1"

    # --- the training threads --------------------------------------------------------------------------------------
    def can_time(self, recorder: Recorder, tensor: torch.Tensor) -> bool:
        """Whether an operation on ``tensor``, which is not in the host's memory, can be recorded; else says why."""
        if not tensor.is_cuda:
            recorder.gaps.add(f"operations on {tensor.device.type} are not recorded")
            return False
        if torch.cuda.is_current_stream_capturing():
            recorder.gaps.add("a CUDA graph was captured: what it replays is not seen")
            return False
        return True

    def begin(self, operation: Operation) -> None:
        self.is_used = True
        operation.is_on_host = False
        if self._is_timed:
            operation.device_start = self._record()

    def end_by_future(self, operation: Operation, work: dist.Work) -> None:
        """The end of an asynchronous operation, where a callback of its future finds itself: NCCL's are done once they
        are enqueued, and their callbacks run on a stream that waits for them."""
        recorder = operation.recorder
        if self._has_one_queue:
            recorder.gaps.add("CUDA_DEVICE_MAX_CONNECTIONS=1: asynchronous reductions are not timed")
            recorder.leave(operation)
            return
        work.get_future().add_done_callback(lambda _: recorder.guard(lambda: self.end(operation)))

    def mark(self, step: int, mask: Mask, write: WriteStep) -> None:
        """The training thread is at the end of ``step``; ``write`` is called with (step, time in ns, mask) once the
        device is there too."""
        if torch.cuda.is_current_stream_capturing():
            return  # the event would become part of the graph
        if self.polls_at_marks:
            self.poll()
        if not self._is_timed or self._mark is None:
            mask |= Mask.INCOMPLETE
        self._mark = _Mark(self._record(), step, mask, write)
        self._marks.append(self._mark)
        self._is_timed = (step + 1) % SAMPLE_STEPS == 0

    def end(self, operation: Operation) -> None:
        """The operation ends where the current stream is now."""
        self._ends.append(_End(operation, self._record(), self._mark if operation.device_start is not None else None))

    def _record(self) -> Any:
        try:
            event = self._pool.pop()
        except IndexError:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    # --- the other thread --------------------------------------------------------------------------------------------
    def poll(self) -> None:
        """Take what the device has done meanwhile."""
        while self._marks and self._marks[0].event.query():
            self._take_mark(self._marks.popleft())
        last: dict[tuple[Recorder, int], int] = {}
        for _ in range(len(self._ends)):
            end = self._ends.popleft()
            if not self._take(end):
                self._ends.append(end)
            elif not end.operation.is_pair:
                key = (end.operation.recorder, end.operation.communicator.row)
                last[key] = max(last.get(key, 0), end.operation.seq)
        waiting = {end.operation for end in self._ends}
        for (recorder, row), seq in last.items():
            _leave_overtaken(recorder, row, seq, waiting)

    def _take_mark(self, mark: _Mark) -> None:
        known = self._known
        if known is None or known.at_ns is None:
            mark.at_ns = monotonic_ns()
        else:
            mark.at_ns = known.at_ns + _elapsed_ns(known.event, mark.event)
        self._known = mark
        mark.write(mark.step, mark.at_ns, mark.mask)

    def _take(self, end: _End) -> bool:
        """False while the operation goes on, or the time of its step's begin is not known."""
        operation, since = end.operation, end.since
        if not end.event.query() or (since is not None and since.at_ns is None):
            return False
        if since is None or since.at_ns is None:
            operation.recorder.leave(operation)
        else:
            operation.start_ns = since.at_ns + _elapsed_ns(since.event, operation.device_start)
            operation.recorder.end(operation, since.at_ns + _elapsed_ns(since.event, end.event))
            self._pool.append(operation.device_start)
            operation.device_start = None
        self._pool.append(end.event)
        return True


def _leave_overtaken(recorder: Recorder, row: int, seq: int, waiting: set[Operation]) -> None:
    """A communicator's operations run in order: what came before one that is over is over too. So end those whose wait
    nobody saw, but not those who may still be waited for."""
    late_ns = monotonic_ns() - _OVERTAKEN_NS
    for operation in list(recorder.pending):
        is_before = operation.communicator.row == row and not operation.is_pair and operation.seq < seq
        if is_before and operation.start_ns < late_ns and operation not in waiting:
            recorder.leave(operation)


def _elapsed_ns(first: Any, second: Any) -> int:
    return int(first.elapsed_time(second) * 1e6)


def may_poll_while_others_capture() -> bool:
    """Have this thread's queries not break a graph capture of another thread, as queries by default do; False when that
    cannot be arranged."""
    major = (torch.version.cuda or "").partition(".")[0]
    try:
        runtime = ctypes.CDLL(f"libcudart.so.{major}")
        mode = ctypes.c_int(_THREAD_LOCAL_CAPTURE)
        return bool(runtime.cudaThreadExchangeStreamCaptureMode(ctypes.byref(mode)) == 0)
    except (OSError, AttributeError):
        return False
