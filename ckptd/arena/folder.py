"""The arena's folder: made, known to be nobody else's, and locked. Layer: ``arena``.

/dev/shm is open to everybody: whoever made the folder before the daemon did, or put a link in its place, could read the
slots in it and put others there. Invariant: what is locked belongs to the daemon's user or to root.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from ckptd.errors import ArenaLocked, InvalidRequest, NotPermitted


def lock_folder(folder: Path) -> int:
    """The descriptor that holds the lock. ArenaLocked when another daemon has it; NotPermitted when the folder, a link
    in its place or the lock is another user's; InvalidRequest when it is no folder."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError as error:
        raise InvalidRequest(f"--arena: {folder} is not a folder", "remove it, or choose another --arena") from error
    _check_owner(folder, os.lstat(folder))
    _check_owner(folder, os.stat(folder))
    fd = _open_lock(folder / "lock")
    try:
        _check_owner(folder / "lock", os.fstat(fd))
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise ArenaLocked(f"{folder} is in use by another daemon") from error
    except NotPermitted:
        os.close(fd)
        raise
    return fd


def _open_lock(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise NotPermitted(f"{path} is a symbolic link", "a daemon makes none: remove the folder") from error
        if error.errno == errno.EACCES:
            raise NotPermitted(
                f"{path} may not be opened by uid {os.geteuid()}", "serve as the user who did before, or remove it"
            ) from error
        raise


def _check_owner(path: Path, found: os.stat_result) -> None:
    if found.st_uid not in (os.geteuid(), 0):
        raise NotPermitted(
            f"{path} belongs to uid {found.st_uid}, and this daemon is uid {os.geteuid()}",
            "serve as that user, or remove it, or choose another --arena",
        )
