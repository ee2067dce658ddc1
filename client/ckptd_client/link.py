"""The standing connection of one rank to its daemon, and its part in the roster. Two background threads, mostly asleep.

The link's thread joins, watches, joins again. States: not joined (with the reason), joined. A daemon that cannot be
reached is retried with backoff for ever; the training loop learns of it only as skipped saves. The roster's thread,
from the first meeting on and with or without a daemon, takes later versions of the roster and tells the daemon of them;
on rank 0 it also publishes them. It is a thread of its own because a store that is slow to answer must not look like a
daemon that fell silent.

A program that ends without ``close()`` says goodbye too, with the exception that ended it; one that is killed does not.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import random
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Final

from ckptd.errors import CkptdError, DaemonUnreachable, RendezvousTimeout
from ckptd.model import RosterEntry
from ckptd_api.convert import incarnation_to_pb, roster_to_pb
from ckptd_api.v1 import node_pb2, types_pb2
from ckptd_client.board import Pauses
from ckptd_client.daemon import Daemon
from ckptd_client.membership import Meeting, Membership, entry_of
from ckptd_client.pending import Pending
from ckptd_client.rosters import NOTICE_S, Progress, Publisher

FIRST_S: Final = 3.0
ROSTER_S: Final = 5.0
LOOK_S: Final = 1.0
_BACKOFF_S: Final = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
_CALL_S: Final = 10.0
_SILENCE_S: Final = 5.0
_JITTER: Final = 0.2
_RETRY_S: Final = 0.2
_LOUD: Final = 3
EXIT_S: Final = 1.5
# For the goodbye to a daemon that did not answer before.
_LAST_TRY_S: Final = 1.0
log = logging.getLogger("ckptd_client")


class Link:
    """See the module. ``progress`` is asked on the roster's thread; ``on_new_instance`` is called, on the link's
    thread, when the daemon is another process."""

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
        progress: Progress,
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
        self.failure = ""  # what ended the training loop, when it was an exception
        self._every = every
        self._persist_every = persist_every
        self._protect = protect
        self._estimated_bytes = estimated_bytes
        self._progress = progress
        self._on_new_instance = on_new_instance
        self._instance = 0
        self._entry: RosterEntry | None = None
        self._told = 0
        self._publisher: Publisher | None = None
        self._joining = threading.Lock()
        self._changed = threading.Condition()
        self._look_now = threading.Event()
        self._stop = meeting.stop
        self._pid = os.getpid()
        self._has_left = False
        self._hook_before = sys.excepthook
        self._thread = threading.Thread(target=self._run, name="ckptd-link", daemon=True)
        self._roster_thread = threading.Thread(target=self._follow, name="ckptd-roster", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._hook_before, sys.excepthook = sys.excepthook, self._note_uncaught
        # A process of multiprocessing ends alike whether its work failed or not: its silence must be told as a death.
        if multiprocessing.parent_process() is None:
            atexit.register(self._leave_at_exit)

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

    def problem_at(self, step: int) -> CkptdError | None:
        """Why this rank cannot take ``step``; None when it can."""
        if (problem := self.problem) is not None:
            return problem
        assert self.membership is not None
        obstacle = self.membership.obstacle(step, self.rank, self.about.node_id)
        return DaemonUnreachable(obstacle, "") if obstacle else None

    def suspect(self, error: CkptdError) -> None:
        """A call was not answered: saves are skipped at once, until the daemon is heard of again."""
        self._set(error)

    def note_failure(self, error: BaseException | None) -> None:
        """``error`` is what ends the training loop; the goodbye tells it. An exit that was asked for is no failure."""
        if error is not None and not isinstance(error, SystemExit | KeyboardInterrupt):
            self.failure = f"{type(error).__name__}: {error}"

    def close(self, timeout_s: float) -> None:
        """Say goodbye and stop; the daemon goes on with what is staged."""
        atexit.unregister(self._leave_at_exit)
        if sys.excepthook == self._note_uncaught:  # else another hook calls it, and goes on to the one before
            sys.excepthook = self._hook_before
        self._leave(timeout_s)
        self.daemon.close()
        self._thread.join(timeout_s)
        if self._roster_thread.is_alive():
            self._roster_thread.join(timeout_s)

    def _leave(self, timeout_s: float) -> None:
        """Say goodbye, once; not from a process that was forked off."""
        if self._has_left or os.getpid() != self._pid:
            return
        self._has_left = True
        self._stop.set()
        self._look_now.set()
        with self._changed:
            self._changed.notify_all()
        if self.membership is None or self.membership.ordinal is None:
            return  # no daemon knows of this rank
        request = node_pb2.LeaveRequest(run=self.run, incarnation=self.incarnation, rank=self.rank, error=self.failure)
        try:
            self.daemon.call("Leave", request, timeout_s if self.problem is None else min(timeout_s, _LAST_TRY_S))
        except CkptdError as error:
            log.warning("leaving without a goodbye: %s", error.message)

    def _leave_at_exit(self) -> None:
        try:
            self._leave(EXIT_S)
        except Exception as error:  # noqa: BLE001  at the end of the program: nothing depends on it
            log.debug("leaving without a goodbye: %s", error)

    def _note_uncaught(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not hasattr(sys, "ps1"):  # at a prompt the program goes on
            self.note_failure(error)
        self._hook_before(kind, error, trace)

    # --- the link's thread -----------------------------------------------------------------------------------------
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
                if not self._stop.is_set():  # a call on the channel that close() closed
                    self._report(CkptdError(f"{type(error).__name__}: {error}"))
            self._stop.wait(_BACKOFF_S[min(attempt, len(_BACKOFF_S) - 1)])
            attempt += 1

    def _join(self) -> None:
        error = self._describe()
        if self.membership is None:
            self._meet(error)
        if error is not None:
            raise error
        self._renew_entry()
        self._wait_in_roster()
        self._find_ordinal()
        answer = self._call_join()
        if self._instance not in (0, answer.instance):
            log.warning("the daemon at %s restarted: joined again", self.daemon.address)
            self._on_new_instance()
        self._instance = answer.instance
        self.pending.apply(answer.watermarks)
        self._set(None)
        self._look_now.set()  # a version that came meanwhile was not told

    def _describe(self) -> CkptdError | None:
        """Ask the daemon what it is; why it does not answer. Before the first meeting it is tried for a while."""
        is_first = self._entry is None and self.meeting.world_size > 1
        pauses = Pauses(FIRST_S if is_first else 0.0, _RETRY_S, self._stop)
        while True:
            try:
                self.daemon.open_session()
                self.about = self.daemon.call("Describe", node_pb2.DescribeRequest(), FIRST_S if is_first else _CALL_S)
                return None
            except CkptdError as error:
                if not is_first or not pauses.sleep():
                    return error

    def _meet(self, error: CkptdError | None) -> None:
        """Take part in the meeting, also without a daemon: the others must not be held up. A rank that is alone holds
        up nobody, and waits for its daemon."""
        if error is not None and self.meeting.world_size == 1:
            raise error
        self._entry = self._entry or entry_of(self.rank, self.about, self._estimated_bytes)
        roster = self.meeting.meet(self._entry, self._protect)
        self.pending.incarnation_id = roster.incarnation_id
        self.membership = Membership((roster,))
        self._roster_thread.start()

    def _renew_entry(self) -> None:
        """Put this rank's entry anew when the daemon is not the one that the entry describes."""
        assert self._entry is not None
        assert self.membership is not None
        entry = entry_of(self.rank, self.about, self._estimated_bytes)
        if replace(entry, nonce=self._entry.nonce) != self._entry:
            self.meeting.rosters(self.membership.roster.incarnation_id).put(entry)
            self._entry = entry
            self._look_now.set()

    def _wait_in_roster(self) -> None:
        """Until the newest roster has this rank on its node, and a coordinator. A new address of the same node is no
        reason to wait: the daemon is told later."""

        def is_in() -> bool:
            assert self.membership is not None
            roster = self.membership.roster
            return roster.entries[self.rank].node_id == self.about.node_id and bool(roster.coordinator.node_id)

        with self._changed:
            self._changed.wait_for(lambda: is_in() or self._stop.is_set(), ROSTER_S)
        if is_in():
            return
        assert self.membership is not None
        if not self.membership.roster.coordinator.node_id:
            raise DaemonUnreachable("rank 0 has no daemon: nobody coordinates the run", "")
        raise RendezvousTimeout(f"roster: no version with this rank's daemon from rank 0 within {ROSTER_S:g} s")

    def _find_ordinal(self) -> None:
        assert self.membership is not None
        if self.membership.ordinal is None:
            ordinal = self.meeting.ordinal(self.daemon, self.membership.roster)
            with self._changed:
                self.membership = replace(self.membership, ordinal=ordinal)

    def _call_join(self) -> node_pb2.JoinResponse:
        with self._joining:  # both threads call it, and an older roster must not arrive after a newer one
            if self._stop.is_set():
                raise DaemonUnreachable("the goodbye was said: nobody joins after it", "")
            known = self.membership
            assert known is not None
            request = node_pb2.JoinRequest(
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
            )
            answer: node_pb2.JoinResponse = self.daemon.call("Join", request, _CALL_S)
            self._told = known.roster.version
            return answer

    def _watch(self) -> None:
        """Take watermarks until the stream breaks or the daemon falls silent."""
        assert self.membership is not None
        request = node_pb2.WatchRequest(run=self.run, incarnation=self.incarnation, rank=self.rank)
        for answer in self.daemon.watch(request, _SILENCE_S):
            if self._stop.is_set():
                return
            self.pending.apply(answer.watermarks)
            self._set(None)
            if answer.watermarks.roster_version > self.membership.roster.version:
                self._look_now.set()
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

    # --- the roster's thread ---------------------------------------------------------------------------------------
    def _follow(self) -> None:
        # Its own generator: the global one is the training program's, and part of its state.
        jitter = random.SystemRandom()
        # One look a second and 1,000 ranks is what one store can serve.
        interval_s = LOOK_S if self.rank == 0 else max(LOOK_S, self.meeting.world_size / 1000)
        failures = 0
        while True:
            self._look_now.wait(interval_s * jitter.uniform(1 - _JITTER, 1 + _JITTER))
            self._look_now.clear()
            if self._stop.is_set():
                return
            try:
                self._look()
                failures = 0
            except CkptdError as error:
                failures += 1
                if failures == _LOUD:  # not at once: at the end of a job the store goes with rank 0
                    log.warning("the roster cannot change for now: %s", error)
            except Exception:  # a thread's boundary: the trainer must go on
                if not self._stop.is_set():
                    log.warning("roster", exc_info=True)

    def _look(self) -> None:
        """Take what is new of the roster; see that the daemon knows it."""
        assert self.membership is not None
        newest = self.membership.roster
        rosters = self.meeting.rosters(newest.incarnation_id)
        if self.rank == 0:
            notice_s = NOTICE_S if self.meeting.world_size > 1 else 0.0
            self._publisher = self._publisher or Publisher(rosters, notice_s)
            versions = self._publisher.look(newest, self._progress)
        else:
            versions = rosters.after(newest.version)
        for roster in versions:
            log.info("version %d of the roster is in force from step %d", roster.version, roster.from_step)
            with self._changed:
                assert self.membership is not None
                self.membership = self.membership.extended(roster)
                self._changed.notify_all()
        self._tell()

    def _tell(self) -> None:
        """Have the daemon know the newest version, unless it is not joined: then joining does it."""
        assert self.membership is not None
        roster = self.membership.roster
        is_mine = roster.entries[self.rank].node_id == self.about.node_id
        if self.problem is None and is_mine and roster.version > self._told:
            self._call_join()
