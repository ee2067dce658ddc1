"""Carries one node's reports of one incarnation to the coordinator, and its watermarks back.

Now when the coordinator is in this daemon, else by a thread, so that no caller waits for another node. What could not
be sent is kept and goes first the next time. Invariant: answers are applied in the order in which they were given.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Final, Protocol

import structlog

from ckptd.errors import CkptdError, InvalidRequest, NotPermitted
from ckptd_api.v1 import coordinator_pb2 as pb

_MOST_UNSENT: Final = 4096
_BEAT_S: Final = 0.5
_POLL_S: Final = 0.02
_NODES_PER_SECOND: Final = 2000  # reports that one coordinator takes
log = structlog.get_logger()


class Reported(Protocol):
    """What a reporter reports of. ``request`` makes a report of new progress; ``send`` carries it to the coordinator,
    wherever it is; ``take`` takes the answer, ``report_held`` tells a coordinator that is new everything again."""

    run: str

    @property
    def is_coordinated_here(self) -> bool: ...

    @property
    def is_waiting(self) -> bool:
        """Something that this node has done is not answered by the watermarks yet."""
        ...

    @property
    def node_count(self) -> int: ...

    def request(self, progress: Sequence[pb.Progress], paces: Sequence[pb.Pace]) -> pb.ReportRequest: ...

    def send(self, request: pb.ReportRequest) -> pb.ReportResponse: ...

    def take(self, answer: pb.ReportResponse) -> None: ...

    def report_held(self) -> None: ...


class Reporter:
    """See the module. ``problem`` says why the coordinator cannot be reached, None when it can."""

    def __init__(self, reported: Reported) -> None:
        self.problem: CkptdError | None = None
        self._reported = reported
        self._progress: list[pb.Progress] = []
        self._paces: list[pb.Pace] = []
        self._queue = threading.Lock()
        self._sending = threading.Lock()
        self._coordinator = 0  # the instance of it that answered last
        self._answered_s = time.monotonic()
        self._under_way = 0
        self._is_due = threading.Event()
        self._is_closed = False
        self._thread: threading.Thread | None = None

    def report(self, progress: Sequence[pb.Progress] = (), paces: Sequence[pb.Pace] = ()) -> None:
        with self._queue:
            self._progress = [*self._progress, *progress][-_MOST_UNSENT:]
            self._paces = [*self._paces, *paces][-_MOST_UNSENT:]
        if self._reported.is_coordinated_here:
            self._send()
            return
        with self._queue:
            if self._thread is None and not self._is_closed:
                self._thread = threading.Thread(target=self._keep_reporting, name="reports", daemon=True)
                self._thread.start()
        self._is_due.set()

    def beat(self) -> None:
        """Hear of what the coordinator here decided by itself; one elsewhere is asked by the thread."""
        if self._reported.is_coordinated_here:
            self.report()

    def hear(self) -> None:
        """Have watermarks of the coordinator, or raise why there are none: a rank without a schedule would skip what
        the others take."""
        if self._coordinator == 0:
            self._send()
        if self._coordinator == 0 and self.problem is not None:
            raise self.problem

    @property
    def silent_s(self) -> float:
        """Since the coordinator last answered, or since this was made."""
        return time.monotonic() - self._answered_s

    @property
    def queued(self) -> int:
        """Progress that the coordinator has not taken yet."""
        with self._queue:
            return len(self._progress) + self._under_way

    def close(self) -> None:
        self._is_closed = True
        self._is_due.set()

    def _keep_reporting(self) -> None:
        """At once what is new, and as a sign of life; often while something is waited for. The more nodes the
        coordinator has to hear, the longer the pauses."""
        while not self._is_closed:
            is_urgent = self._reported.is_waiting and self.problem is None
            pause_s = _POLL_S if is_urgent else _BEAT_S
            self._is_due.wait(pause_s + self._reported.node_count / _NODES_PER_SECOND)
            self._is_due.clear()
            if not self._is_closed and not self._reported.is_coordinated_here:
                try:
                    self._send()
                except Exception:  # a thread's boundary: the next report tries again
                    log.exception("report failed", run=self._reported.run)

    def _send(self) -> None:
        with self._sending:
            with self._queue:
                progress, paces, self._progress, self._paces = self._progress, self._paces, [], []
                self._under_way = len(progress)
            try:
                answer = self._reported.send(self._reported.request(progress, paces))
            except CkptdError as error:
                # What the coordinator will never take is dropped; all else goes again: a lost word may be waited for.
                self._requeue([] if isinstance(error, InvalidRequest | NotPermitted) else progress)
                self._note(error)
                return
            except BaseException:
                self._requeue(progress)
                raise
            with self._queue:
                self._under_way = 0
            self._answered_s = time.monotonic()
            self._note(None)
            is_new = self._coordinator not in (0, answer.instance)
            self._coordinator = answer.instance
            self._reported.take(answer)
        if is_new:
            self._reported.report_held()

    def _requeue(self, progress: Sequence[pb.Progress]) -> None:
        with self._queue:
            self._progress = [*progress, *self._progress][-_MOST_UNSENT:]
            self._under_way = 0

    def _note(self, problem: CkptdError | None) -> None:
        if (problem is None) != (self.problem is None):
            if problem:
                log.warning("coordinator cannot be reached", run=self._reported.run, reason=problem.message)
            else:
                log.info("coordinator is back", run=self._reported.run)
        self.problem = problem
