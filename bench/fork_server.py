"""Processes forked from one that has everything imported already: they are up in a tenth of the time.

The server is a program that calls ``serve``; ``ForkServer`` starts it and asks it. Requests and answers are JSON lines
on its stdin and stdout: ``{"argv", "env", "output"}`` forks a child and answers ``{"pid"}``; ``{"poll": pid}`` answers
``{"returncode"}``, None while it runs. At the end of stdin, and when the server dies, so do the children.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_PR_SET_PDEATHSIG = 1
_CLOSE_S = 30.0


# --- who asks -----------------------------------------------------------------------------------------------------
class ForkServer:
    """``command`` is the program that serves. Safe to call from any thread."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True)

    def fork(self, argv: Sequence[str], env: Mapping[str, str], output: str) -> int:
        """The pid of a child with these arguments and nothing but this environment, whose output goes to a file."""
        return int(self._ask(argv=list(argv), env=dict(env), output=output)["pid"])

    def poll(self, pid: int) -> int | None:
        """The exit code of a child (negative: a signal), None while it runs."""
        code: int | None = self._ask(poll=pid)["returncode"]
        return code

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(_CLOSE_S)

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


# --- the server ---------------------------------------------------------------------------------------------------
def serve(become: Callable[[list[str]], int]) -> None:
    """Until the end of stdin. ``become`` runs in the child, with its arguments, and gives its exit code."""
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
                _settle(request)
                code = become(request["argv"])
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
            ended.pop(pid, None)  # of a child that had the same number
            answer = {"pid": pid}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _settle(request: dict[str, Any]) -> None:
    """In the child: a session, an output and an environment of its own."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, nothing), (1, output), (2, output)):
        os.dup2(source, target)
    os.environ.clear()
    os.environ.update(request["env"])
