"""The standing connection of one rank to its daemon: join, watch, join again. One background thread, mostly asleep.

States: not joined (with the reason), joined. A daemon that cannot be reached is retried with backoff for ever; the
training loop learns of it only as skipped saves.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import Final

from ckptd.errors import CkptdError, DaemonUnreachable
from ckptd_api.convert import incarnation_to_pb, roster_to_pb
from ckptd_api.v1 import node_pb2, types_pb2
from ckptd_client.daemon import Daemon
from ckptd_client.membership import Meeting, Membership
from ckptd_client.pending import Pending

_BACKOFF_S: Final = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
_CALL_S: Final = 10.0
_SILENCE_S: Final = 5.0
log = logging.getLogger("ckptd_client")


class Link:
    """See the module. ``on_new_instance`` is called, on the link's thread, when the daemon is another process."""

    def __init__(
        self,
        daemon: Daemon,
        meeting: Meeting,
        run: str,
        every: types_pb2.Interval,
        persist_every: types_pb2.Interval,
        protect: str,
        estimated_bytes: int,
        pending: Pending,
        on_new_instance: Callable[[], None],
    ) -> None:
        self.daemon = daemon
        self.meeting = meeting
        self.run = run
        self.pending = pending
        self.membership: Membership | None = None
        self.about: node_pb2.DescribeResponse = node_pb2.DescribeResponse()
        self.problem: CkptdError | None = DaemonUnreachable("not connected yet", "")
        self.failures = 0
        self._every = every
        self._persist_every = persist_every
        self._protect = protect
        self._estimated_bytes = estimated_bytes
        self._on_new_instance = on_new_instance
        self._instance = 0
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ckptd-link", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def rank(self) -> int:
        return self.meeting.rank

    @property
    def incarnation(self) -> types_pb2.Incarnation:
        assert self.membership is not None
        return incarnation_to_pb(self.membership.incarnation)

    @property
    def instance(self) -> int:
        return self._instance

    def wait_joined(self, timeout_s: float) -> CkptdError | None:
        """None once joined; after ``timeout_s`` the reason why not."""
        with self._changed:
            self._changed.wait_for(lambda: self.problem is None, timeout_s)
            return self.problem

    def suspect(self, error: CkptdError) -> None:
        """A call was not answered: saves are skipped at once, until the daemon is heard of again."""
        self._set(error)

    def close(self, timeout_s: float) -> None:
        """Say goodbye and stop; the daemon goes on with what is staged."""
        self._stop.set()
        if self.membership is not None and self.problem is None:
            request = node_pb2.LeaveRequest(run=self.run, incarnation=self.incarnation, rank=self.rank)
            try:
                self.daemon.call("Leave", request, timeout_s)
            except CkptdError as error:
                log.warning("leaving without a goodbye: %s", error.message)
        self.daemon.close()
        self._thread.join(timeout_s)

    # --- the thread ------------------------------------------------------------------------------------------------
    def _run(self) -> None:
        attempt = 0
        while not self._stop.is_set():
            try:
                self._join()
                attempt = 0
                self._watch()
            except CkptdError as error:
                if not self._stop.is_set():
                    self._report(error)
            except Exception as error:  # noqa: BLE001  a thread's boundary: the trainer must go on
                self._report(CkptdError(f"{type(error).__name__}: {error}"))
            self._stop.wait(_BACKOFF_S[min(attempt, len(_BACKOFF_S) - 1)])
            attempt += 1

    def _join(self) -> None:
        daemon = self.daemon
        daemon.open_session()
        self.about = daemon.call("Describe", node_pb2.DescribeRequest(), _CALL_S)
        known = self.membership
        if known is None or known.roster.entries[self.rank].node_id != self.about.node_id:
            self.membership = known = self.meeting.meet(daemon, self.about, self._estimated_bytes, known)
        answer = daemon.call(
            "Join",
            node_pb2.JoinRequest(
                run=self.run,
                incarnation=incarnation_to_pb(known.incarnation),
                roster=roster_to_pb(known.roster),
                rank=self.rank,
                local_rank=int(os.environ.get("LOCAL_RANK", "0")),
                pid=os.getpid(),
                every=self._every,
                persist_every=self._persist_every,
                protect=self._protect,
                estimated_bytes=self._estimated_bytes,
            ),
            _CALL_S,
        )
        if self._instance not in (0, answer.instance):
            log.warning("the daemon at %s restarted: joined again", daemon.address)
            self._on_new_instance()
        self._instance = answer.instance
        self.pending.apply(answer.watermarks)
        self._set(None)

    def _watch(self) -> None:
        """Take watermarks until the stream breaks or the daemon falls silent."""
        request = node_pb2.WatchRequest(run=self.run, incarnation=self.incarnation, rank=self.rank)
        for answer in self.daemon.watch(request, _SILENCE_S):
            if self._stop.is_set():
                return
            self.pending.apply(answer.watermarks)
            self._set(None)
        raise DaemonUnreachable(f"the daemon at {self.daemon.address} went away")

    def _report(self, error: CkptdError) -> None:
        if self.problem is None or self.failures == 0:
            log.warning("snapshots are skipped until the daemon is back: %s", error)
        self.failures += 1
        self._set(error)

    def _set(self, problem: CkptdError | None) -> None:
        with self._changed:
            if (problem is None) != (self.problem is None) or problem is not self.problem:
                self.problem = problem
                self._changed.notify_all()
