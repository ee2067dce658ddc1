"""Errors of the file system and of the Zarr libraries as errors of ckptd: one line that names path, deed and hint.

Layer: tiers. Invariants: an error of ckptd passes through unchanged; nothing is swallowed.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from ckptd.errors import CkptdError, Corrupt, TierFailed

_HINTS: Final = {
    errno.ENOSPC: "free space on it, or `ckptd prune` older checkpoints",
    errno.EDQUOT: "the quota is used up: raise it, or `ckptd prune` older checkpoints",
    errno.EFBIG: "a file size limit is in force: see `ulimit -f` of the daemon",
    errno.EACCES: "let the daemon's user read and write it",
    errno.EPERM: "the daemon's user may not do this, or the file system has no hard links",
    errno.EOPNOTSUPP: "the file system lacks what a commit needs: fsync and hard links",
    errno.EROFS: "the file system is mounted read-only: mount it read-write, or name another path",
    errno.ENOENT: "is the file system mounted?",
    errno.ENOTDIR: "a tier is a folder: name another path",
    errno.EEXIST: "a tier is a folder: name another path",
    errno.ENOTCONN: "the mount does not answer: mount it again",
    errno.ESTALE: "the mount is stale: mount it again",
    errno.EIO: "the device or the file server reports an error: see the kernel log",
}
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how Rust, and so zarrs, prints an errno


@contextmanager
def file_errors(path: Path, doing: str) -> Iterator[None]:
    """OSError becomes TierFailed: "PATH: cannot DOING: No space left on device"."""
    try:
        yield
    except OSError as error:
        raise failure(path, doing, error) from error


@contextmanager
def zarr_errors(path: Path, doing: str, *, is_read: bool) -> Iterator[None]:
    """Whatever zarr and zarrs raise becomes TierFailed, or Corrupt for bytes that were read and make no sense."""
    try:
        yield
    except CkptdError:
        raise
    except Exception as error:  # zarr raises ValueError, KeyError, TypeError and more, zarrs RuntimeError
        code = _errno_of(error)
        if code is not None:
            raise failure(path, doing, OSError(code, os.strerror(code))) from error
        kind = Corrupt if is_read else TierFailed
        raise kind(f"{path}: cannot {doing}: {_one_line(error)}") from error


def failure(path: Path, doing: str, error: OSError) -> TierFailed:
    """The TierFailed that an OSError stands for."""
    reason = os.strerror(error.errno) if error.errno else _one_line(error)
    return TierFailed(f"{path}: cannot {doing}: {reason}", _HINTS.get(error.errno or 0))


def _errno_of(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno:
        return error.errno
    match = _OS_ERROR.search(str(error))
    return int(match[1]) if match else None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
