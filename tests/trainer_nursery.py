"""Forks trainers that have torch imported already. Requests and answers are JSON lines on stdin and stdout.

``{"argv", "env", "output"}`` forks a child that runs the script ``argv[0]`` as ``__main__`` and answers ``{"pid"}``;
``{"poll": pid}`` answers ``{"returncode"}``, None while it runs. At the end of stdin, and when this process dies, so do
the children.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import runpy
import signal
import sys
import traceback
from typing import Any

import torch
import torch._dynamo  # what the first optimizer hook would import
import torch.distributed

import ckptd_client  # noqa: F401  what trainers import, imported once for all of them
from ckptd import failpoints

_PR_SET_PDEATHSIG = 1


def run(request: dict[str, Any]) -> int:
    """In the child: become the trainer; its exit code."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, nothing), (1, output), (2, output)):
        os.dup2(source, target)
    os.environ.clear()
    os.environ.update(request["env"])
    importlib.reload(failpoints)  # it reads the environment when imported
    torch.set_num_threads(1)
    sys.argv = request["argv"]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))  # beside this folder, which is there already
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # as the interpreter does at the top of a script
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
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
            ended.pop(pid, None)  # of a process that had this number before
            answer = {"pid": pid}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
