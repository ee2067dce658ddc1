"""What a rank has entered last, read from memory that it shared with this daemon: also when its process is gone.

The memory is this daemon's: a rank writes to it and can neither shrink nor replace it, so that reading it never fails.
What stands in it is the rank's word, and is checked like a message.
"""

from __future__ import annotations

import fcntl
import os
import weakref

import numpy as np

from ckptd.format.timings import BLACK_BOX_BYTES, BLACK_BOX_ROWS, ENTERED, Rows


class BlackBox:
    """The memory of one rank. OSError when there is none."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("ckptd-black-box", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        weakref.finalize(self, os.close, self._fd).atexit = False
        os.ftruncate(self._fd, BLACK_BOX_BYTES)
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)

    def descriptor(self) -> int:
        """For the rank; the caller closes it."""
        return os.dup(self._fd)

    def read(self, most: int = BLACK_BOX_ROWS) -> Rows:
        """The newest ``most`` ENTERED rows in the order of writing."""
        rows = np.frombuffer(os.pread(self._fd, BLACK_BOX_BYTES, 0), ENTERED)
        rows = rows[rows["ordinal"] > 0]
        return rows[np.argsort(rows["ordinal"])][-most:]
