"""Forks ranks of ``detector_job`` with torch imported already: ``argv`` is a plan, as JSON, and a journal."""

from __future__ import annotations

import json
import traceback

from bench import detector_job
from bench.fork_server import serve


def become(argv: list[str]) -> int:
    """In the child: be the rank; its exit code."""
    plan, journal = argv
    fields = json.loads(plan)
    try:
        detector_job.main(detector_job.Plan(**{**fields, "ranks": tuple(fields["ranks"])}), journal)
    except BaseException:  # noqa: BLE001  as the interpreter does at the top of a script
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    serve(become)
