"""Deaths of processes on this node, by pidfd: a socket may outlive its owner in a child that was forked.

A DataLoader's workers inherit the trainer's connections and live on for seconds; the end of the control stream alone
would come late. One thread, which waits and does nothing else; pidfd_open(2).
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import structlog

log = structlog.get_logger()


class ProcessWatch:
    """Calls back, on its own thread, once for each watched process that has ended."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._wake = os.eventfd(0)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._watched: dict[int, tuple[int, Callable[[int], None]]] = {}  # by pidfd
        self._lock = threading.Lock()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="pidfd", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._is_closed = True
        os.eventfd_write(self._wake, 1)
        if self._thread.is_alive():
            self._thread.join()
        with self._lock:
            for fd in self._watched:
                os.close(fd)
            self._watched.clear()
        self._epoll.close()
        os.close(self._wake)

    def watch(self, pid: int, on_end: Callable[[int], None]) -> bool:
        """``pid`` as this namespace knows it, of a process that is known to live: SO_PEERCRED. ``on_end`` is told the
        signal that ended it, 0 when none did or it is not known. False where the kernel or a sandbox has no pidfd."""
        try:
            fd = os.pidfd_open(pid)
        except OSError as error:
            log.debug("process not watched", pid=pid, reason=str(error))
            return False
        with self._lock:
            if self._is_closed:
                os.close(fd)
                return False
            self._watched[fd] = (pid, on_end)
            self._epoll.register(fd, select.EPOLLIN)
            return True

    def _run(self) -> None:
        while not self._is_closed:
            for fd, _ in self._epoll.poll():
                if fd == self._wake:
                    continue
                with self._lock:
                    pid, on_end = self._watched.pop(fd)
                number = _signal_of(pid)
                with suppress(OSError):
                    self._epoll.unregister(fd)
                os.close(fd)
                try:
                    on_end(number)
                except Exception:  # a thread's boundary: other processes are watched all the same
                    log.exception("end of a process")


def _signal_of(pid: int) -> int:
    """What ended a process that its parent has not waited for yet, proc(5) field 52; 0 when that cannot be told."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    state, *fields = stat.rpartition(")")[2].split()
    return int(fields[-1]) & 0x7F if state in "ZX" else 0
