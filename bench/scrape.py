"""A scrape of /metrics on a node with 8 ranks of two runs that save, drain, protect and are timed, as Prometheus asks.

The limit is the bare answer of /livez by the same server in the same run, one after the other. Every request opens a
connection of its own: the server keeps none.
"""

from __future__ import annotations

import argparse
import http.client
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

from bench.peers import DaemonProcess, peers
from bench.rig import MIB, report
from ckptd_api.convert import incarnation_to_pb
from ckptd_api.v1 import node_pb2

# Ranks without torch are what the tests have. tests/ is no package.
sys.path.append(str(Path(__file__).parents[1] / "tests"))

from timing_ranks import TimingJob

_RUNS = ("pretrain", "ablation")
_RANKS = 4  # of each run on each of the two nodes
_SHARD_BYTES = 256 * 1024
_ACCEPT = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"


def train(job: TimingJob, stop: threading.Event, step_s: float) -> None:
    """Save, time and tell what a step cost, until ``stop``."""
    step = 0
    while not stop.wait(step_s):
        step += 1
        job.save(step, persist=step % 4 == 0)
        job.run_steps(1)
        for rank in job.ranks:
            pace = node_pb2.ReportPaceRequest(run=job.run, rank=rank.rank, step=step, step_seconds=step_s)
            pace.incarnation.CopyFrom(incarnation_to_pb(job.incarnation))
            rank.call("ReportPace", pace)


def get(address: str, path: str) -> tuple[float, bytes]:
    """(seconds until the whole body is here, the body)."""
    host, port = address.split(":")
    started = time.perf_counter()
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    connection.request("GET", path, headers={"Accept": _ACCEPT})
    body = connection.getresponse().read()
    connection.close()
    return time.perf_counter() - started, body


def measure(daemon: DaemonProcess, rounds: int, pause_s: float) -> dict[str, float]:
    taken: dict[str, list[float]] = {"/metrics": [], "/livez": []}
    for _ in range(rounds):
        for path, seconds in taken.items():
            seconds.append(get(daemon.http, path)[0])
            time.sleep(pause_s)
    body = get(daemon.http, "/metrics")[1].decode()
    page, bare = taken["/metrics"], taken["/livez"]
    return {
        "scrape_median_ms": 1e3 * statistics.median(page),
        "scrape_worst_ms": 1e3 * max(page),
        "livez_median_ms": 1e3 * statistics.median(bare),
        "livez_worst_ms": 1e3 * max(bare),
        "times_livez": statistics.median(page) / statistics.median(bare),
        "series": sum(not line.startswith("#") for line in body.splitlines()),
        "page_bytes": len(body),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--pause-s", type=float, default=0.05)
    parser.add_argument("--step-s", type=float, default=1.0)
    arguments = parser.parse_args()
    stop = threading.Event()
    with tempfile.TemporaryDirectory() as folder:
        with peers(2, 256 * MIB, "--tier", f"file://{Path(folder, 'tier')}", "--slots", 4) as daemons:
            jobs = [
                TimingJob(daemons * _RANKS, run=run, protect="1+1", size_bytes=_SHARD_BYTES, is_prepared=True)
                for run in _RUNS
            ]
            threads = [threading.Thread(target=train, args=(job, stop, arguments.step_s)) for job in jobs]
            for thread in threads:
                thread.start()
            try:
                for job in jobs:
                    job.wait_durable(4)  # every kind of series is there
                figures = measure(daemons[0], arguments.rounds, arguments.pause_s)
            finally:
                stop.set()
                for thread in threads:
                    thread.join()
                for job in jobs:
                    job.close()
    report("scrape", {"ranks": _RANKS * len(_RUNS), "runs": len(_RUNS), "scrapes": arguments.rounds, **figures})


if __name__ == "__main__":
    main()
