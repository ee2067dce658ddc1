"""Files of the arena: made with all of their memory, mapped, and touched before anybody waits for them."""

from __future__ import annotations

import os
from pathlib import Path

from ckptd.failpoints import failpoint
from ckptd.memory import HUGE_BYTES, Bytes, collapse, map_file, populate


def allocate(path: Path, capacity_bytes: int) -> None:
    """A new file with all of its memory allocated (so that no write can end in SIGBUS); OSError when there is none, and
    nothing is left behind."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        failpoint("arena.allocate")
        os.posix_fallocate(fd, 0, capacity_bytes)
    except BaseException:
        path.unlink()
        raise
    finally:
        os.close(fd)


def map_path(path: Path, capacity_bytes: int) -> Bytes:
    """The file's memory; it stays mapped as long as any view of it lives."""
    fd = os.open(path, os.O_RDWR)
    try:
        return map_file(fd, capacity_bytes)
    finally:
        os.close(fd)


def touch(memory: Bytes) -> None:
    """Faults now, off the data path: huge pages where they fit, every page present."""
    if memory.nbytes >= HUGE_BYTES:
        collapse(memory)
    populate(memory)
