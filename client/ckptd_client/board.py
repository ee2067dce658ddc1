"""Where ranks meet: the job's own key-value store. Every wait has a deadline and names the ranks that are missing.

No collective and no process group: the default group's store, else a client of MASTER_ADDR/PORT, else (world size 1) a
dictionary. Only ``set``, ``add``, ``check`` and ``get`` of keys that exist are used: a blocking wait in a background
thread would hold the store's lock against the training thread.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, Final, Protocol

import torch.distributed as dist

from ckptd.errors import RendezvousTimeout, few

_POLL_S: Final = 0.005
_MAX_POLL_S: Final = 0.1
_STORE_S: Final = 30.0


class Board(Protocol):
    """Keys and small values that every rank of the job sees."""

    def set(self, key: str, value: bytes) -> None: ...

    def get(self, key: str) -> bytes | None: ...

    def add(self, key: str, amount: int) -> int:
        """Raise the counter ``key`` (from 0) at once for all; what it is now. ``get`` of it gives decimal digits."""
        ...


class LocalBoard:
    """The board of a job of one rank."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def set(self, key: str, value: bytes) -> None:
        with self._lock:
            self._values[key] = value

    def get(self, key: str) -> bytes | None:
        return self._values.get(key)

    def add(self, key: str, amount: int) -> int:
        with self._lock:
            total = int(self._values.get(key, b"0")) + amount
            self._values[key] = b"%d" % total
            return total


class StoreBoard:
    """A torch.distributed store; its errors are RendezvousTimeout (the store's host is gone)."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def set(self, key: str, value: bytes) -> None:
        self._guard(lambda: self._store.set(key, value))

    def get(self, key: str) -> bytes | None:
        value: bytes | None = self._guard(lambda: bytes(self._store.get(key)) if self._store.check([key]) else None)
        return value

    def add(self, key: str, amount: int) -> int:
        return int(self._guard(lambda: self._store.add(key, amount)))

    @staticmethod
    def _guard(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except RuntimeError as error:
            raise RendezvousTimeout(f"the job's store does not answer: {error}") from error


def find_board() -> tuple[Board, int, int]:
    """(board, rank, world size) of this process, as torchrun means them."""
    if dist.is_available() and dist.is_initialized():
        store = dist.distributed_c10d._get_default_store()
        world_size = dist.get_world_size()
        board: Board = StoreBoard(store) if world_size > 1 else LocalBoard()
        return board, dist.get_rank(), world_size
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1 and "MASTER_ADDR" in os.environ:
        port = int(os.environ["MASTER_PORT"])
        try:
            store = dist.TCPStore(  # type: ignore[attr-defined]  # not exported to type checkers
                os.environ["MASTER_ADDR"], port, None, is_master=False, timeout=timedelta(seconds=_STORE_S)
            )
        except (RuntimeError, ValueError) as error:
            raise RendezvousTimeout(
                f"no store at {os.environ['MASTER_ADDR']}:{port}: {error}",
                "call torch.distributed.init_process_group before Checkpointer",
            ) from error
        return StoreBoard(store), int(os.environ["RANK"]), world_size
    return LocalBoard(), 0, 1


def wait_for(
    board: Board,
    keys: Iterable[tuple[int, str]],
    deadline_s: float,
    what: str,
    stop: threading.Event | None = None,
) -> dict[int, bytes]:
    """The values of ``keys`` (rank, key) once all are there; RendezvousTimeout naming ``what`` and the missing ranks at
    the deadline, or once ``stop`` is set."""
    missing, found = dict(keys), {}
    pauses, started = Pauses(deadline_s, _MAX_POLL_S, stop), time.monotonic()
    while True:
        for rank, key in list(missing.items()):
            if (value := board.get(key)) is not None:
                found[rank] = value
                del missing[rank]
        if not missing:
            return found
        if not pauses.sleep():
            waited_s = time.monotonic() - started
            raise RendezvousTimeout(f"{what}: no word from rank {ranks_text(missing)} within {waited_s:.3g} s")


class Pauses:
    """The pauses of one wait: short at first, at most ``longest_s``, until ``deadline_s`` is over or ``stop`` set."""

    def __init__(self, deadline_s: float, longest_s: float, stop: threading.Event | None = None) -> None:
        self._until = time.monotonic() + deadline_s
        self._longest_s = longest_s
        self._stop = stop or threading.Event()
        self._next_s = _POLL_S

    def sleep(self) -> bool:
        """Pause; False, at once, when the wait is over."""
        if time.monotonic() > self._until or self._stop.wait(self._next_s):
            return False
        self._next_s = min(self._next_s * 1.5, self._longest_s)
        return True


def ranks_text(ranks: Iterable[int]) -> str:
    """The first of ``ranks``, for a message."""
    return few(sorted(ranks), 16)
