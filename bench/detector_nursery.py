"""Forks ranks of ``detector_job`` with torch imported already. Requests and answers are JSON lines."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from typing import Any

from bench import detector_job

_PR_SET_PDEATHSIG = 1


def become(request: dict[str, Any]) -> None:
    """In the child: be the rank."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for target in (1, 2):
        os.dup2(output, target)
    os.environ.update(request["environment"])
    plan, journal = request["argv"]
    fields = json.loads(plan)
    detector_job.main(detector_job.Plan(**{**fields, "ranks": tuple(fields["ranks"])}), journal)


def main() -> None:
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "reap" in request:
            for pid in request["reap"]:
                os.waitpid(pid, 0)
            answer: dict[str, Any] = {}
        else:
            pid = os.fork()
            if pid == 0:
                code = 0
                try:
                    become(request)
                except BaseException:  # noqa: BLE001  as the interpreter does at the top of a script
                    traceback.print_exc()
                    code = 1
                sys.stdout.flush()
                os._exit(code)
            answer = {"pid": pid}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
