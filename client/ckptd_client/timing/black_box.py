"""The last collectives that this rank has entered, in memory that outlives its process.

Layer: inside ``ckptd_client.timing``, beside ``ring``. A process that its backend aborts (gloo does that to a rank that
gets more bytes than it expects) can tell nobody what it was in; the daemon of its node reads it here. Invariants: a row
is written before its operation is issued; ``write`` allocates and locks nothing; a forked child has memory of its own.
"""

from __future__ import annotations

import itertools
import mmap
import os
import weakref
from typing import Final

from ckptd.format.timings import BLACK_BOX_BYTES, BLACK_BOX_ROWS, ENTERED
from ckptd_client.timing.ring import layout_of

_LAYOUT: Final = layout_of(ENTERED)
_boxes: weakref.WeakSet[BlackBox] = weakref.WeakSet()


class BlackBox:
    """See the module. In memory of this process alone until ``move_to``."""

    def __init__(self) -> None:
        self._memory: bytearray | mmap.mmap = bytearray(BLACK_BOX_BYTES)
        self._ordinals = itertools.count(1)  # counting is whole under the GIL
        self._pack = _LAYOUT.pack_into
        _boxes.add(self)

    def write(self, communicator: int, op: int, seq: int, size_bytes: int) -> None:
        """The collective ``seq`` of the communicator in that row of the table is about to be issued."""
        ordinal = next(self._ordinals)
        self._pack(self._memory, ordinal % BLACK_BOX_ROWS * _LAYOUT.size, ordinal, communicator, op, seq, size_bytes)

    def move_to(self, fd: int) -> None:
        """Write to the file ``fd``, of BLACK_BOX_BYTES, from now on; what is here goes along. Closes ``fd``. OSError or
        ValueError when it cannot be mapped."""
        try:
            shared = mmap.mmap(fd, BLACK_BOX_BYTES)
        finally:
            os.close(fd)
        # A row that another thread writes between the two lines stays behind: one of a thousand, long before the end.
        shared[:] = bytes(self._memory)
        self._memory = shared

    def keep_to_self(self) -> None:
        """Write to memory of this process alone again."""
        self._memory = bytearray(BLACK_BOX_BYTES)


def _keep_from_parent() -> None:
    for box in _boxes:
        box.keep_to_self()


os.register_at_fork(after_in_child=_keep_from_parent)
