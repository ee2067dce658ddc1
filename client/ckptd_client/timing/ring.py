"""Rows on their way to the daemon: a ring of packed rows in one preallocated block, the oldest dropped when it is full.

Layer: inside ``ckptd_client.timing``, below everything. Invariants: a row is handed out whole and in the order of
writing; every row that was written is at last either committed or counted in ``dropped``; nothing is allocated by
``write``. Safe to use from any thread.
"""

from __future__ import annotations

import struct
import threading
from typing import Any, Final

import numpy as np

_CODES: Final = {("u", 1): "B", ("u", 4): "I", ("u", 8): "Q", ("i", 4): "i", ("i", 8): "q"}


def layout_of(dtype: np.dtype[Any]) -> struct.Struct:
    """What packs a row of ``dtype``, which is packed, little-endian, and flat."""
    assert dtype.fields is not None
    kinds = [field[0] for field in dtype.fields.values()]
    layout = struct.Struct("<" + "".join(_CODES[kind.kind, kind.itemsize] for kind in kinds))
    assert layout.size == dtype.itemsize
    return layout


class Ring:
    """``rows`` rows of ``dtype``."""

    def __init__(self, dtype: np.dtype[Any], rows: int) -> None:
        layout = layout_of(dtype)
        self._pack = layout.pack_into
        self.row_bytes = layout.size
        self._rows = rows
        self._buffer = bytearray(rows * layout.size)
        self._written = 0
        self._read = 0
        self._dropped = 0
        # Reentrant: a finalizer that runs amid a write may end an operation itself.
        self._lock = threading.RLock()

    @property
    def written(self) -> int:
        return self._written

    @property
    def dropped(self) -> int:
        """Rows that were overwritten before they were committed."""
        with self._lock:
            return self._dropped + self._overwritten()

    @property
    def size_bytes(self) -> int:
        return len(self._buffer)

    def write(self, *values: int) -> None:
        """Append a row: its fields in the order of the dtype."""
        with self._lock:
            self._pack(self._buffer, self._written % self._rows * self.row_bytes, *values)
            self._written += 1

    def peek(self, most: int) -> tuple[bytes, int]:
        """(up to ``most`` of the oldest rows, the position to ``commit`` once they have arrived)."""
        with self._lock:
            lost = self._overwritten()
            self._dropped += lost
            self._read += lost
            last = min(self._written, self._read + most)
            first_slot, last_slot = self._read % self._rows, last % self._rows
            if last == self._read:
                return b"", last
            if first_slot < last_slot:
                return self._bytes(first_slot, last_slot), last
            return self._bytes(first_slot, self._rows) + self._bytes(0, last_slot), last

    def commit(self, position: int) -> None:
        """Rows before ``position`` are not needed any more."""
        with self._lock:
            self._read = max(self._read, position)

    def _overwritten(self) -> int:
        return max(0, self._written - self._rows - self._read)

    def _bytes(self, first: int, last: int) -> bytes:
        return bytes(memoryview(self._buffer)[first * self.row_bytes : last * self.row_bytes])
