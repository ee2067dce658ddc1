"""What starting and watching any process needs: waits with deadlines, clean environments, the real command."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

CKPTD = Path(sys.executable).with_name("ckptd")
PATIENCE_S = 60.0
ANSWER_S = 20.0  # of a daemon that runs, on a machine that may stand still for seconds
T = TypeVar("T")


def wait_until(condition: Callable[[], T], what: str, timeout_s: float = PATIENCE_S) -> T:
    """The first true value of ``condition``; AssertionError naming ``what`` when there is none in time."""
    until, pause_s = time.monotonic() + timeout_s, 0.002
    while not (value := condition()):
        assert time.monotonic() < until, f"waited {timeout_s:g} s for {what}"
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.5, 0.05)
    return value


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def clean_environment(**extra: str) -> dict[str, str]:
    """This environment without what would steer ckptd or torchrun, and with ``extra``."""
    stray = ("CKPTD_", "GRPC_", "TORCHELASTIC_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "XDG_RUNTIME_DIR")
    return {k: v for k, v in os.environ.items() if not k.startswith(stray)} | extra


def heed_interrupts() -> None:
    """For a child that is to be interrupted: where the tests run in the background of a shell they inherit that SIGINT
    is ignored, and so would the child."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class CliResult(NamedTuple):
    rc: int
    stdout: str
    stderr: str


def run_cli(*args: object, timeout_s: float = 60.0, prefix: Sequence[str] = (), **env: str) -> CliResult:
    """The real ``ckptd`` command; ``prefix`` runs it by another command (``setpriv``...)."""
    done = subprocess.run(
        [*prefix, str(CKPTD), *map(str, args)],
        env=clean_environment(**env),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    return CliResult(done.returncode, done.stdout, done.stderr)


class Signalled:
    """What any process of a test can be told by its ``pid``."""

    pid: int

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def stop(self) -> None:
        self.signal(signal.SIGSTOP)

    def cont(self) -> None:
        self.signal(signal.SIGCONT)

    @property
    def is_stopped(self) -> bool:
        """True while every thread of it is halted by SIGSTOP (state T)."""
        try:
            tasks = list(Path(f"/proc/{self.pid}/task").iterdir())
            states = [Path(task, "stat").read_text().rpartition(")")[2].split()[0] for task in tasks]
        except FileNotFoundError:
            return False
        return all(state == "T" for state in states)
