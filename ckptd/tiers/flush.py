"""fsync beside writing: finished chunk files go to the device while the next ones are written.

Layer: tiers. Invariants: at most ``limit`` files wait; an error of any flush is raised in the writing thread, at the
next ``submit`` or at ``finish`` at the latest, so nothing is reported as written that did not reach the device.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from ckptd import files
from ckptd.tiers.failures import file_errors

THREADS: Final = 4


class Flusher:
    """A bounded queue of files to fsync. Use as a context manager; ``finish`` before leaving it in good order."""

    def __init__(self, limit: int = 4 * THREADS) -> None:
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="ckptd-flush")
        self._pending: deque[Future[None]] = deque()
        self._limit = limit

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, path: Path) -> None:
        """fsync ``path`` soon; waits while the queue is full, raises what an earlier flush failed with."""
        self._pending.append(self._pool.submit(_flush, path))
        while self._pending and (self._pending[0].done() or len(self._pending) > self._limit):
            self._pending.popleft().result()

    def finish(self) -> None:
        """Wait until everything submitted is on the device; TierFailed when anything is not."""
        while self._pending:
            self._pending.popleft().result()


def _flush(path: Path) -> None:
    with file_errors(path, "fsync"):
        files.fsync_path(path)
