"""Durable and atomic files: the only module that calls fsync, rename, replace or link.

Layer: the bottom; standard library only. Invariants: a name appears with all of its bytes or not at all; when a
function returns, what it made survives a power cut (``sync=False``, for memory file systems, promises atomicity only).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path

from ckptd.errors import CommitConflict

_TEMPORARY = ".tmp-"


def fsync_path(path: Path) -> None:
    """fsync a file or a folder."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Put ``data`` at ``path``, replacing what is there in one step."""
    temporary = _write_temporary(path, data, sync=sync)
    os.replace(temporary, path)
    if sync:
        fsync_path(path.parent)


def write_new(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path`` unless the name is taken: then CommitConflict, and what is there stays."""
    temporary = _write_temporary(path, data, sync=True)
    try:
        os.link(temporary, path)
    except FileExistsError as error:
        raise CommitConflict(f"{path} exists: another writer committed it first") from error
    finally:
        temporary.unlink()
    fsync_path(path.parent)


def publish_folder(temporary: Path, folder: Path) -> bool:
    """Give the finished and synced folder ``temporary`` its name, unless that is taken by a folder that is not empty:
    then False, and both stay as they are."""
    try:
        os.rename(temporary, folder)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    fsync_path(folder.parent)
    return True


def make_folders(path: Path, *, below: Path) -> None:
    """Make ``path`` and the folders between it and ``below``, each durable in its parent."""
    missing = [p for p in (path, *path.parents) if p.is_relative_to(below) and not p.exists()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        fsync_path(folder.parent)


def sweep_temporaries(folders: Iterable[Path]) -> None:
    """Remove what a crash left of unfinished writes directly in ``folders``."""
    for folder in folders:
        for leftover in folder.glob(f"{_TEMPORARY}*"):
            leftover.unlink(missing_ok=True)


def _write_temporary(path: Path, data: bytes, *, sync: bool) -> Path:
    temporary = path.with_name(f"{_TEMPORARY}{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            if sync:
                os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return temporary
