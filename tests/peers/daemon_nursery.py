"""Forks daemons that have everything imported already: real processes of `ckptd serve`, up in a tenth of the time.

Run as a program it is the process they are forked from. Requests and answers are JSON lines on its stdin and stdout:
``{"argv", "env", "output"}`` forks a child that becomes `ckptd ARGV` and answers ``{"pid"}``; ``{"poll": pid}`` answers
``{"returncode"}``, None while it runs. At the end of stdin, and when this process dies, so do the children.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1


class DaemonNursery:
    """The process that daemons are forked from, as tests see it. Safe to call from any thread."""

    def __init__(self) -> None:
        from processes import clean_environment

        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=clean_environment(GRPC_ENABLE_FORK_SUPPORT="0"),
            text=True,
        )

    def spawn(self, command: Sequence[str], env: Mapping[str, str], log_path: Path) -> ForkedDaemon:
        """`ckptd` with the arguments ``command[1:]``."""
        answer = self.ask(argv=list(command[1:]), env=dict(env), output=str(log_path))
        return ForkedDaemon(self, int(answer["pid"]))

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30.0)


class ForkedDaemon:
    """A child of the nursery, with as much of ``subprocess.Popen`` as the harness asks of it."""

    def __init__(self, nursery: DaemonNursery, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._nursery = nursery

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._nursery.ask(poll=self.pid)["returncode"]
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        from processes import wait_until

        wait_until(lambda: self.poll() is not None, f"daemon {self.pid} to end", timeout or 30.0)
        assert self.returncode is not None
        return self.returncode


# --- the process itself -------------------------------------------------------------------------------------------
def run(request: dict[str, Any]) -> int:
    """In the child: become the daemon; its exit code."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, nothing), (1, output), (2, output)):
        os.dup2(source, target)
    os.environ.clear()
    os.environ.update(request["env"])
    from ckptd import failpoints
    from ckptd.cli.main import main as ckptd

    importlib.reload(failpoints)  # it reads the environment when imported
    sys.argv = ["ckptd", *request["argv"]]
    return ckptd()


def main() -> None:
    import ckptd.cli.main
    import ckptd.serve.server  # noqa: F401  what daemons import, imported once for all of them

    ended: dict[int, int] = {}
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "poll" in request:
            pid = request["poll"]
            if pid not in ended:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    ended[pid] = os.waitstatus_to_exitcode(status)
            answer: dict[str, Any] = {"returncode": ended.get(pid)}
        else:
            pid = os.fork()
            if pid == 0:
                code = run(request)
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
            ended.pop(pid, None)  # of a child that had the same number
            answer = {"pid": pid}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
