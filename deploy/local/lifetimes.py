"""Processes that outlive who started them, known by files: started in sessions of their own, ended by their pidfd.

The bottom of deploy/local. A file holds pid, start and boot of a process: a number that another process has by now is
never signalled. Invariant: what ``end`` was given has ended when it returns.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")
_START: Final = 19  # of the fields of /proc/PID/stat behind the name: starttime, in ticks since boot


def start(command: Sequence[str], environment: Mapping[str, str], log: Path, pid_file: Path) -> int:
    """The pid of ``command``, which ``pid_file`` holds from now on; its output is added to ``log``."""
    with log.open("ab") as lines:
        process = subprocess.Popen(  # noqa: S603  programs that the stack is made of
            command, env=environment, stdin=subprocess.DEVNULL, stdout=lines, stderr=lines, start_new_session=True
        )
    process.returncode = 0  # it is not waited for: it lives on when this process has ended
    pid_file.write_text(_identity(process.pid))
    return process.pid


def living(pid_file: Path) -> int | None:
    """The pid in the file when it is still that process, and runs."""
    try:
        text = pid_file.read_text()
    except FileNotFoundError:
        return None
    number = text.partition(" ")[0]  # none: it ended before it could be written down, or the disk was full
    return int(number) if number.isdecimal() and text == _identity(int(number)) else None


def end(pid_files: Iterable[Path], grace_s: float) -> list[Path]:
    """SIGTERM to all at once, SIGKILL after ``grace_s`` to those that are left; the files of those that ran."""
    ended = {path: fd for path in pid_files if (fd := _open(path)) is not None}
    for fd in ended.values():
        signal.pidfd_send_signal(fd, signal.SIGTERM)
    until_s = time.monotonic() + grace_s
    for fd in ended.values():
        if not _has_ended(fd, max(0.0, until_s - time.monotonic())):
            signal.pidfd_send_signal(fd, signal.SIGKILL)
            _has_ended(fd, None)
        os.close(fd)
    return list(ended)


def _open(pid_file: Path) -> int | None:
    """A pidfd of the process in the file; None when it has ended."""
    pid = living(pid_file)
    if pid is None:
        return None
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    if living(pid_file) is None:  # between the two it may have ended, and its number been given away
        os.close(fd)
        return None
    return fd


def _has_ended(fd: int, timeout_s: float | None) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))


def _identity(pid: int) -> str:
    """What no other process ever has; "" when there is none, or only what its parent has not asked for yet."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if state in "ZX" else f"{pid} {fields[_START - 1]} {_BOOT.read_text()}"
