"""Slots mapped into the trainer: the memory that captures are copied into.

A mapping is kept from step to step, since mapping a slot anew costs a page fault per page. It is not inherited by forks
(a DataLoader's workers), holds a shared record lock so that a restarted daemon knows the slot is in use, and is
registered with CUDA when the trainer uses it (trap: once, in the background, in pieces).
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from typing import Any, Final

import torch

from ckptd.format.blocks import HEADER_BYTES
from ckptd.format.slot import write_mark
from ckptd.memory import Bytes, keep_from_forks, map_file, populate

REGISTERED_PIECE_BYTES: Final = 1 << 30
_REGISTER_PORTABLE: Final = 1  # pinned for every device of this process, not only the current one
log = logging.getLogger("ckptd_client")


class MappedSlot:
    """A slot file mapped shared and writable, from the descriptor the daemon handed over (which this owns)."""

    def __init__(self, slot: str, fd: int, size_bytes: int) -> None:
        self.slot = slot
        self.size_bytes = size_bytes
        self._fd = fd
        fcntl.lockf(fd, fcntl.LOCK_SH)
        self.bytes = map_file(fd, size_bytes)
        keep_from_forks(self.bytes)
        self.page = self.bytes.data[:HEADER_BYTES]
        self._registered: list[int] = []
        populate(self.bytes)

    def payload(self, payload_bytes: int) -> Bytes:
        return self.bytes[HEADER_BYTES : HEADER_BYTES + payload_bytes]

    def publish(self, written_bytes: int) -> None:
        """Tell the daemon that the payload is written up to ``written_bytes``."""
        write_mark(self.page, written_bytes)

    def register(self) -> None:
        """Pin the mapping for CUDA, in pieces; a copy must not cross one. Failure only makes copies slower. The caller
        has set the thread's device: the default would open a context on device 0."""
        address = self.bytes.ctypes.data
        for start in range(0, self.size_bytes, REGISTERED_PIECE_BYTES):
            length = min(REGISTERED_PIECE_BYTES, self.size_bytes - start)
            cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            if code := int(cudart.cudaHostRegister(address + start, length, _REGISTER_PORTABLE)):
                log.warning("slot %s is not pinned beyond %d bytes (CUDA error %d)", self.slot, start, code)
                _forget_cuda_error()
                break
            self._registered.append(address + start)

    def close(self) -> None:
        """Unpin, unlock and forget; the memory is unmapped when the last view of it is gone."""
        for address in self._registered:
            torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
        self._registered.clear()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _forget_cuda_error() -> None:
    """CUDA keeps the error of a refused call for this thread, and torch would raise it after the next kernel."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")


def map_readable(fd: int, size_bytes: int) -> Bytes:
    """A private view of a sealed slot (closes ``fd``): writes to it would never reach the slot."""
    try:
        view = map_file(fd, size_bytes, is_private=True)
    finally:
        os.close(fd)
    keep_from_forks(view)
    # Not populated: it is read once, by several threads, whose page faults run side by side.
    return view
