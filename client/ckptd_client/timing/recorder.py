"""What operations this rank is in, and those that have ended.

Layer: inside ``ckptd_client.timing``. Every tap gives its operations to one ``Recorder``, and the heartbeat reads it.
Invariants: an operation holds numbers only, no tensor and no work; it ends once; what is pending is bounded. Written
for the path of every collective: no lock is taken but the ring's; single reads and writes of attributes, dictionaries
and deques are whole under the GIL.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic_ns
from typing import Any, Final

from ckptd.format.timings import OPERATION, Op
from ckptd_client.timing.black_box import BlackBox
from ckptd_client.timing.communicators import Communicator, Communicators
from ckptd_client.timing.ring import Ring

ROWS: Final = 65536
MOST_PENDING: Final = 4096
_FIRST_PAIR: Final = int(Op.SEND)


class Operation:
    """One c10d operation. It can be given to a future as its done-callback: that ends it."""

    __slots__ = (
        "communicator",
        "device_start",
        "is_on_host",
        "is_pair",
        "op",
        "peer",
        "recorder",
        "seq",
        "size_bytes",
        "start_ns",
    )

    communicator: Communicator
    recorder: Recorder
    op: int
    peer: int
    seq: int
    size_bytes: int
    start_ns: int
    is_pair: bool
    is_on_host: bool
    device_start: Any

    def __call__(self, future: object) -> None:
        self.recorder.end(self, monotonic_ns())


class Recorder:
    """See the module."""

    def __init__(self, rows: int = ROWS) -> None:
        self.communicators = Communicators()
        self.ring = Ring(OPERATION, rows)
        self.black_box = BlackBox()
        self.pending: dict[Operation, None] = {}
        self.entered = 0
        self.ended = 0
        self.forgotten = 0  # that were dropped from ``pending``
        self.failures = 0
        self.last_failure = ""
        # What of the communication is known not to be seen.
        self.gaps: set[str] = set()

    def begin(self, communicator: Communicator, op: Op, peer: int, size_bytes: int) -> Operation:
        """An operation is entered now. ``peer``: global rank of the other end or of the root, else -1."""
        operation = Operation()
        operation.recorder = self
        operation.communicator = communicator
        operation.op = op
        operation.peer = peer
        operation.size_bytes = size_bytes
        operation.device_start = None
        operation.is_on_host = True
        operation.start_ns = monotonic_ns()
        if op >= _FIRST_PAIR:
            operation.is_pair = True
            pair = (peer, op)
            operation.seq = communicator.pairs[pair] = communicator.pairs.get(pair, 0) + 1
        else:
            operation.is_pair = False
            operation.seq = communicator.enqueued = communicator.enqueued + 1
            communicator.recent.append(operation)
            self.black_box.write(communicator.row, op, operation.seq, size_bytes)
        self.entered += 1
        self.pending[operation] = None
        if len(self.pending) > MOST_PENDING:
            self.forgotten += 1
            self.leave(next(iter(self.pending)))
        return operation

    def end(self, operation: Operation, end_ns: int) -> None:
        """The operation ended on the host's clock; once only."""
        if self.leave(operation):
            self.ring.write(
                operation.communicator.row,
                operation.op,
                operation.peer,
                operation.seq,
                operation.size_bytes,
                operation.start_ns,
                end_ns,
            )

    def leave(self, operation: Operation) -> bool:
        """It is not pending any more, and no row is written of it. False when it was not pending."""
        if self.pending.pop(operation, self) is self:
            return False
        if not operation.is_pair:
            operation.communicator.completed += 1
        self.ended += 1
        return True

    def guard(self, action: Callable[[], object]) -> None:
        """Run ``action``; what it raises is counted and goes no further."""
        try:
            action()
        except Exception as error:  # noqa: BLE001  the boundary to the training program, which must go on
            self.fail(error)

    def fail(self, error: Exception) -> None:
        self.failures += 1
        self.last_failure = f"{type(error).__name__}: {error}"
