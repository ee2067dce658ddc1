"""Joins a made-up daemon, which prints what it is called, and ends as it is told, without ``close()``."""

from __future__ import annotations

import multiprocessing
import os
import sys
from typing import Any

from fake_job import FakeDaemon, Job


class PrintingDaemon(FakeDaemon):
    def call(self, method: str, request: Any, timeout_s: float) -> Any:
        if method == "Leave":
            print("Leave", request.error, timeout_s, flush=True)
        return super().call(method, request, timeout_s)


def join() -> Job:
    job = Job([PrintingDaemon("a")])
    job.start()
    job.wait_joined()
    return job


def spawned() -> None:
    join()
    print("joined", flush=True)


def forked() -> None:
    child = os.fork()
    if child == 0:
        sys.exit(0)
    os.waitpid(child, 0)
    print("forked", flush=True)


if __name__ == "__main__":
    how = sys.argv[1]
    if how == "spawned":
        process = multiprocessing.get_context("spawn").Process(target=spawned)
        process.start()
        process.join()
        sys.exit()
    if how == "hooked":
        sys.excepthook = lambda kind, error, trace: print("hook", error, flush=True)
    if how == "prompt":
        sys.ps1 = "> "
    known = join()
    match how:
        case "error" | "hooked" | "prompt":
            raise ValueError("too large")
        case "interrupt":
            raise KeyboardInterrupt
        case "closed":
            known.close()
        case "forked":
            forked()
