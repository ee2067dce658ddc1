"""Forks ranks of ``detector_job`` and ``detector_link_job`` with torch imported already.

A process that has made calls of gRPC must not be forked, and those who measure have: this one has made none. ``argv``
of a rank: ``job``, its plan as JSON and its journal; or ``link``, its namespace, its traffic as JSON and its journal.
"""

from __future__ import annotations

import json
import sys
import traceback

from bench import detector_job, detector_link_job
from bench.detector_fabric import enter
from bench.fork_server import ForkServer, serve


class Nursery(ForkServer):
    def __init__(self) -> None:
        super().__init__([sys.executable, "-m", "bench.detector_nursery"])


def become(argv: list[str]) -> int:
    """In the child: be the rank; its exit code."""
    try:
        if argv[0] == "link":
            _, namespace, traffic, journal = argv
            enter(namespace)
            detector_link_job.main(detector_link_job.Traffic(**json.loads(traffic)), journal)
        else:
            _, plan, journal = argv
            fields = json.loads(plan)
            detector_job.main(detector_job.Plan(**{**fields, "ranks": tuple(fields["ranks"])}), journal)
    except BaseException:  # noqa: BLE001  as the interpreter does at the top of a script
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    serve(become)
