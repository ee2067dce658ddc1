"""From a fault to its alert at a receiver: the local stack (deploy/local), scraped and evaluated every 5 s.

Real ranks on gloo, one at each of three daemons. Each round hits a fresh job at a random moment of the scrapes: a rank
killed, a daemon killed, a rank stopped (SIGSTOP), a rank that computes x1.3 slower. A straggler has to be seen in steps
first: its time is from the end of the 15th step that it slowed, negative when the alert was there before.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.rig import report

# A stack that alerts is what the tests have: one of them, not two. tests/ is no package.
sys.path += [str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parents[1] / "tests" / "deploy")]

from harness import Nursery
from stack import Job, LocalStack, Receiver

PATIENCE_S = 90.0
SCRAPE_S = 5.0
STRAGGLER_STEPS = 15
FACTOR = 1.3
VICTIM = 1
Case = Callable[[LocalStack, Receiver, Job], float]


def rank_dead(_: LocalStack, receiver: Receiver, job: Job) -> float:
    since_s = time.monotonic()
    job.ranks[VICTIM].kill()
    return receiver.wait_fired("CkptdRankDead", PATIENCE_S, since_s, run=job.run).fired_s - since_s


def daemon_down(stack: LocalStack, receiver: Receiver, job: Job) -> float:
    since_s = time.monotonic()
    stack.kill_daemon(VICTIM)
    alert = receiver.wait_fired("CkptdDaemonDown", PATIENCE_S, since_s, run=job.run)
    stack.up()
    receiver.wait_resolved(alert, PATIENCE_S)
    return alert.fired_s - since_s


def hang(_: LocalStack, receiver: Receiver, job: Job) -> float:
    since_s = time.monotonic()
    job.ranks[VICTIM].stop()
    return receiver.wait_fired("CkptdHang", PATIENCE_S, since_s, run=job.run).fired_s - since_s


def straggler(_: LocalStack, receiver: Receiver, job: Job) -> float:
    since_s = time.monotonic()
    with job.slowed(VICTIM, FACTOR):
        alert = receiver.wait_fired("CkptdStraggler", PATIENCE_S, since_s, run=job.run, severity="warning")
        job.wait_steps(STRAGGLER_STEPS)
    slowed = [event["at_s"] for event in job.ranks[0].of("step") if event["at_s"] > since_s]
    return alert.fired_s - slowed[STRAGGLER_STEPS]  # the first was under way


CASES: dict[str, Case] = {case.__name__: case for case in (rank_dead, daemon_down, hang, straggler)}


@contextmanager
def settled(stack: LocalStack, nursery: Nursery, run: str) -> Iterator[Job]:
    job = Job(stack, nursery, run)
    try:
        job.start()
        job.wait_settled()
        yield job
    finally:
        job.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    taken: dict[str, list[float]] = {name: [] for name in CASES}
    nursery, receiver = Nursery(), Receiver()
    try:
        with tempfile.TemporaryDirectory(prefix="ckptd-alerting-") as folder:
            stack = LocalStack(Path(folder) / "stack", receiver)
            try:
                for number in range(options.rounds):
                    for name, case in CASES.items():
                        with settled(stack, nursery, f"{name}-{number}") as job:
                            time.sleep(chance.uniform(0, SCRAPE_S))
                            taken[name].append(case(stack, receiver, job))
                        sys.stderr.write(f"{name}: {taken[name][-1]:.1f} s, load {os.getloadavg()[0]:.1f}\n")
            finally:
                stack.close()
    finally:
        receiver.close()
        nursery.close()
    figures: dict[str, float | int | str] = {"rounds": options.rounds, "scrape_s": SCRAPE_S}
    for name, seconds in taken.items():
        figures |= {f"{name}_median_s": statistics.median(seconds), f"{name}_longest_s": max(seconds)}
    report("alerting", figures)


if __name__ == "__main__":
    main()
