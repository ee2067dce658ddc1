"""What goes to the daemon each second: rows of what ended, and what this rank is in the middle of.

Layer: inside ``ckptd_client.timing``, on the client's connection. A thread of its own: it goes on while the training
thread is stuck in a collective, which is when it matters. Invariants: it blocks nobody; what a call did not deliver
stays and is sent again; the job's process groups are never used.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Final, Protocol

from ckptd.errors import CkptdError, InvalidRequest
from ckptd.model import Incarnation
from ckptd_api.convert import incarnation_from_pb
from ckptd_api.v1 import node_pb2, timings_pb2, types_pb2
from ckptd_client.timing.collection import Collection
from ckptd_client.timing.communicators import Communicator
from ckptd_client.timing.recorder import Operation
from ckptd_client.timing.stacks import stack_of

INTERVAL_S: Final = 1.0
# Of an interval: from then on the end of a step is waited for. Collectives end steps on all ranks at once, so that the
# daemons have all of a step at once.
_REST: Final = 0.7
FLUSH_S: Final = 2.0
STILL_S: Final = 5.0
# For so long something must have been pending in a communicator for its signatures to be sent.
WAITED_S: Final = 1.0
MOST_ROWS: Final = 8192
MOST_PENDING: Final = 64
MOST_MESSAGES: Final = 8
log = logging.getLogger("ckptd_client")


class Caller(Protocol):
    """Calls the daemon; CkptdError when it does not answer in time. ``black_box``: a descriptor, which the caller
    closes; None where memory cannot be shared."""

    def call(self, method: str, request: node_pb2.ReportTimingsRequest, timeout_s: float) -> object: ...
    def black_box(self, run: str, incarnation: Incarnation, rank: int) -> int | None: ...


class Connection(Protocol):
    """What of a ``Link`` is needed. ``problem`` None: joined; then ``incarnation`` may be asked for."""

    run: str
    problem: CkptdError | None

    @property
    def daemon(self) -> Caller: ...
    @property
    def rank(self) -> int: ...
    @property
    def instance(self) -> int: ...
    @property
    def incarnation(self) -> types_pb2.Incarnation: ...


class Heartbeat:
    """Reports ``collection`` over ``link``, while it is the first that does."""

    def __init__(self, collection: Collection, link: Connection) -> None:
        self._collection = collection
        self._link = link
        self._instance = 0
        self._told = 0  # communicators that this instance of the daemon knows
        self._moved = (0, 0, -1)
        self._moved_at = time.monotonic()
        self._is_told_of_failure = False
        self._stop = threading.Event()
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._work, name="ckptd-timing", daemon=True)

    def start(self) -> None:
        self._collection.reporters.append(self)
        self._thread.start()
        atexit.register(self.close)

    def close(self, flush_s: float = FLUSH_S) -> None:
        """Stop; what is left is sent within ``flush_s`` (0: it is not)."""
        atexit.unregister(self.close)
        if self._stop.is_set() or os.getpid() != self._pid:  # a forked child has no such thread
            return
        until = time.monotonic() + flush_s
        self._stop.set()
        self._collection.steps.written.set()
        self._thread.join(flush_s)
        if flush_s and not self._thread.is_alive():
            try:
                self.beat(max(0.05, until - time.monotonic()), is_last=True)
            except Exception as error:  # noqa: BLE001  at the end of the program: nothing depends on it
                log.debug("the last timings were not delivered: %s", error)
        if self in self._collection.reporters:
            self._collection.reporters.remove(self)

    # --- the thread ------------------------------------------------------------------------------------------------
    def _work(self) -> None:
        while not self._wait():
            try:
                self.beat(FLUSH_S)
            except CkptdError as error:  # the rows stay; the next beat sends them
                log.debug("timings not delivered: %s", error)
            except Exception:  # a thread's boundary: the trainer must go on
                log.log(logging.DEBUG if self._is_told_of_failure else logging.WARNING, "timings", exc_info=True)
                self._is_told_of_failure = True

    def _wait(self) -> bool:
        """Until the next beat is due; True when there is none."""
        if self._stop.wait(_REST * INTERVAL_S):
            return True
        written = self._collection.steps.written
        if self._collection.is_reporter(self):
            written.clear()
            written.wait((1 - _REST) * INTERVAL_S)
        return self._stop.is_set()

    def beat(self, timeout_s: float, *, is_last: bool = False) -> None:
        """Report once, in as many messages as the rows need; CkptdError when the daemon does not answer. ``is_last``:
        with every signature, as what ended this rank may be that it entered another operation than the others."""
        self._collection.refresh()
        link = self._link
        if not self._collection.is_reporter(self) or link.problem is not None:
            return
        if link.instance != self._instance:
            self._instance, self._told = link.instance, 0
            self._share_black_box()
        until = time.monotonic() + timeout_s
        for _ in range(MOST_MESSAGES):
            is_done = self._send(max(0.05, until - time.monotonic()), is_last)
            if is_done or time.monotonic() > until:
                return

    def _share_black_box(self) -> None:
        """Without it all goes on: then less is known of a process that is aborted."""
        link = self._link
        try:
            fd = link.daemon.black_box(link.run, incarnation_from_pb(link.incarnation), link.rank)
            if fd is not None:
                self._collection.recorder.black_box.move_to(fd)
        except (CkptdError, OSError, ValueError) as error:
            log.debug("no memory for the last operations: %s", error)

    def _send(self, timeout_s: float, is_leaving: bool) -> bool:
        """Send one message; whether nothing is left."""
        operations, steps = self._collection.recorder.ring, self._collection.steps.ring
        # A mark must not come before operations of its step: looked at before them, and sent with the last of them.
        step_rows, steps_end = steps.peek(MOST_ROWS)
        rows, rows_end = operations.peek(MOST_ROWS)
        is_last = len(rows) < MOST_ROWS * operations.row_bytes
        heartbeat = self._heartbeat(is_leaving)
        # After what names them.
        known = list(self._collection.recorder.communicators.all)
        link = self._link
        request = node_pb2.ReportTimingsRequest(
            run=link.run,
            incarnation=link.incarnation,
            rank=link.rank,
            communicators=[_entry(communicator) for communicator in known[self._told :]],
            operations=rows,
            steps=step_rows if is_last else b"",
            heartbeat=heartbeat,
            coverage=self._collection.coverage(),
            mesh=self._collection.mesh(),
        )
        try:
            answer = link.daemon.call("ReportTimings", request, timeout_s)
        except InvalidRequest:  # these rows will never be taken: those after them may be
            operations.commit(rows_end)
            raise
        if getattr(answer, "is_missing_communicators", False) and self._told:
            self._told = 0  # the same rows again, with all of them
            return False
        self._told = len(known)
        operations.commit(rows_end)
        if is_last:
            steps.commit(steps_end)
        return is_last

    # --- the message -----------------------------------------------------------------------------------------------
    def _heartbeat(self, is_leaving: bool) -> timings_pb2.Heartbeat:
        recorder, steps = self._collection.recorder, self._collection.steps
        live = recorder.communicators.live.copy()
        # Nobody waits any more for what a group that is gone has left.
        pending = [operation for operation in list(recorder.pending) if operation.communicator.row in live]
        now_ns = time.monotonic_ns()
        waited_s = max(((now_ns - operation.start_ns) / 1e9 for operation in pending), default=0.0)
        rests_s = self._rests_s()
        # A rank that rests tells all: what it has entered may be what another waits for.
        is_telling = is_leaving or rests_s > STILL_S
        waited = {o.communicator.row for o in pending if (now_ns - o.start_ns) / 1e9 > WAITED_S}
        told = {row: communicator for row, communicator in live.items() if is_telling or row in waited}
        return timings_pb2.Heartbeat(
            counts=[_count(communicator) for communicator in live.values()],
            pending=[_pending(operation, now_ns) for operation in pending[:MOST_PENDING]],
            signatures=_signatures(told, pending[:MOST_PENDING]),
            step=steps.last,
            stack=stack_of(steps.thread) if rests_s > STILL_S or waited_s > STILL_S else "",
            mask=steps.in_force,
        )

    def _rests_s(self) -> float:
        """For how long nothing has moved."""
        recorder = self._collection.recorder
        moved = (recorder.entered, recorder.ended, self._collection.steps.last)
        if moved != self._moved:
            self._moved, self._moved_at = moved, time.monotonic()
        return time.monotonic() - self._moved_at


def _entry(communicator: Communicator) -> timings_pb2.CommunicatorEntry:
    return timings_pb2.CommunicatorEntry(
        row=communicator.row,
        id=communicator.id,
        members=communicator.members,
        label=communicator.label,
        backend=communicator.backend,
    )


def _count(communicator: Communicator) -> timings_pb2.CommunicatorCount:
    # In this order: one that is entered meanwhile must not look like two that end.
    completed = communicator.completed
    return timings_pb2.CommunicatorCount(
        communicator=communicator.row, enqueued=communicator.enqueued, completed=completed
    )


def _pending(operation: Operation, now_ns: int) -> timings_pb2.PendingOperation:
    return timings_pb2.PendingOperation(
        communicator=operation.communicator.row,
        seq=operation.seq,
        op=operation.op,
        size_bytes=operation.size_bytes,
        peer=operation.peer,
        for_seconds=max(0.0, (now_ns - operation.start_ns) / 1e9),
    )


def _signatures(told: Mapping[int, Communicator], pending: Iterable[Operation]) -> list[timings_pb2.Signature]:
    """Of the last collectives of the communicators ``told``, and of those pending in them. Point-to-point has numbers
    of its own."""
    operations = {
        (operation.communicator.row, operation.seq): operation
        for operation in [*(o for c in told.values() for o in list(c.recent)), *pending]
        if not operation.is_pair and operation.communicator.row in told
    }
    return [
        timings_pb2.Signature(communicator=row, seq=seq, op=operation.op, size_bytes=operation.size_bytes)
        for (row, seq), operation in sorted(operations.items(), key=lambda item: item[0])
    ]
