"""Checksums behind the writer: threads that follow the written-up-to mark of slots being written.

A follower sleeps briefly when the writer is ahead of it by nothing, and leaves when the writer has been idle for a
while: the seal does what is left, so followers are an optimisation and never a condition of correctness.
"""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Final

from ckptd.arena.slot import Slot
from ckptd.format.slot import SlotState

_POLL_S: Final = 0.0005
_MAX_POLL_S: Final = 0.004
_IDLE_S: Final = 1.0
_NICE: Final = 10


class Checksummer:
    """A bounded pool of followers, one task per slot being written."""

    def __init__(self, threads: int | None = None) -> None:
        self._pool = ThreadPoolExecutor(
            threads or max(2, (os.cpu_count() or 2) // 2), thread_name_prefix="checksum", initializer=yield_to_others
        )

    @property
    def pool(self) -> ThreadPoolExecutor:
        """The threads, for other checksum work (adoption, restore, verify)."""
        return self._pool

    def follow(self, slot: Slot) -> None:
        """Start to checksum behind the writer of ``slot`` in its present generation."""
        self._pool.submit(_follow, slot, slot.generation)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def yield_to_others() -> None:
    """On Linux a thread has a nice value of its own: where cores are short, training and copies go first."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


def _follow(slot: Slot, generation: int) -> None:
    idle_since, pause_s = time.monotonic(), _POLL_S
    while slot.state is SlotState.WRITING and slot.generation == generation:
        if slot.advance(max_blocks=16):
            idle_since, pause_s = time.monotonic(), _POLL_S
            continue
        if time.monotonic() - idle_since > _IDLE_S:
            return
        time.sleep(pause_s)
        pause_s = min(pause_s * 2, _MAX_POLL_S)
