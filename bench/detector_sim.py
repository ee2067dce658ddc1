"""How well slow compute is found, on simulated jobs: ``python -m bench.detector_sim [--runs N] [--seed S]``.

A simulation, not a measurement, but for the time to judge; ``bench.detector_model`` says how it works. Seeds below 100
are for development. A rank counts as flagged once it is in a confirmed fault. Beside it stand two naive rules: the
last to arrive in the data-parallel reduction, and a step that is longer than at first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from bench.detector_model import RANKS_PER_NODE, Fault, Job, Steps, simulate
from ckptd.detect.history import History
from ckptd.detect.layout import Ids
from ckptd.detect.records import Confidence
from ckptd.detect.slow_compute import ComputeJudge

FIRST_SEED: Final = 1000
SECONDS_A_DAY: Final = 86_400
JOBS: Final = (Job(), Job(dp=16, pp=2, tp=4), Job(dp=64, pp=1, tp=1), Job(dp=8, pp=1, tp=8), Job(dp=8, pp=4, tp=2))
JUDGE_JOB: Final = Job(dp=320)
ALL_DUE: Final = (160, 240)  # steps after which a window of each length is complete
AFTER_STEPS: Final = 40  # watched on after the limit, for victims
Pick = Callable[[Job, np.random.Generator, int], tuple[Fault, ...]]


def one_rank(factor: float, **more: Any) -> Pick:
    def pick(job: Job, random: np.random.Generator, since: int) -> tuple[Fault, ...]:
        return (Fault((int(random.integers(job.world_size)),), factor, since, **more),)

    return pick


def one_node(factor: float) -> Pick:
    def pick(job: Job, random: np.random.Generator, since: int) -> tuple[Fault, ...]:
        first = int(random.integers(job.world_size // RANKS_PER_NODE)) * RANKS_PER_NODE
        return (Fault(tuple(range(first, first + RANKS_PER_NODE)), factor, since),)

    return pick


def nothing(job: Job, random: np.random.Generator, since: int) -> tuple[Fault, ...]:
    return ()


@dataclass(frozen=True)
class Case:
    """``limit_steps``: within which the culprit must be confirmed. ``is_hardware`` False: it must never be."""

    name: str
    pick: Pick
    limit_steps: int
    job: dict[str, Any]
    jobs: tuple[Job, ...] = JOBS
    is_hardware: bool = True


FEW: Final = (Job(dp=2, pp=1, tp=1), Job(dp=3, pp=1, tp=1), Job(dp=2, pp=2, tp=2))
CASES: Final = (
    Case("rank x1.03", one_rank(1.03), 100, {}),
    Case("rank x1.05", one_rank(1.05), 40, {}),
    Case("rank x1.10", one_rank(1.10), 15, {}),
    Case("rank x1.30", one_rank(1.30), 5, {}),
    Case("rank x2.0", one_rank(2.0), 5, {}),
    Case("rank x1.30, 1 or 2 peers", one_rank(1.30), 5, {}, FEW),
    Case("node x1.05", one_node(1.05), 40, {}, JOBS[:3]),
    Case("node x1.10", one_node(1.10), 15, {}, JOBS[:3]),
    Case("node x1.30", one_node(1.30), 5, {}, JOBS[:3]),
    Case("rank x1.05, 15 % imbalance", one_rank(1.05), 40, {"imbalance": 0.15}, (JOBS[0], JOBS[1], JOBS[3])),
    Case("node x1.10, 15 % imbalance", one_node(1.10), 40, {"imbalance": 0.15}, JOBS[:1]),
    Case("rank x1.10, 1 % stalls", one_rank(1.10), 15, {"stall_share": 0.01}),
    Case("rank x1.10, unequal stages", one_rank(1.10), 15, {"stages": 1.6}, (JOBS[0], JOBS[1], JOBS[4])),
    Case("rank x1.10, checkpoints masked", one_rank(1.10), 17, {"checkpoint_every": 20}),
    Case("rank x1.10, checkpoints unmasked", one_rank(1.10), 17, {"checkpoint_every": 20, "is_masked": False}),
    Case("rank +0.1 % a step", one_rank(1.0, a_step=0.001), 100, {}),
    Case("collection of garbage, x2 each 20th step", one_rank(2.0, every=20), 100, {}, is_hardware=False),
    Case("one position longer, step x1.10", one_rank(1.1, position=2), 60, {}, is_hardware=False),
    Case("healthy", nothing, 60, {}, is_hardware=False),
    Case("healthy, 15 % imbalance", nothing, 60, {"imbalance": 0.15}, is_hardware=False),
    Case("healthy, 1 % stalls", nothing, 60, {"stall_share": 0.01}, is_hardware=False),
    Case("healthy, unequal stages", nothing, 60, {"stages": 1.6}, is_hardware=False),
    Case("healthy, checkpoints unmasked", nothing, 60, {"checkpoint_every": 20, "is_masked": False}, is_hardware=False),
)


@dataclass(frozen=True)
class Run:
    """What came of one seed. ``latency_steps``: slow steps until all culprits were confirmed, 1 for the first; None:
    never. ``is_right``: the first confirmed faults named the culprits and nobody else."""

    culprits: frozenset[int]
    world_size: int
    latency_steps: int | None
    is_right: bool
    flagged: frozenset[int]
    suspected: frozenset[int]
    last_to_arrive: frozenset[int]
    longer_step: frozenset[int]


class NaiveRules:
    """What people look at first. ``arrivals``: ranks of the last replica to enter the reduction in more than half of
    10 steps, twice in a row. ``lengths``: ranks whose step is 5 % longer than their first ten, likewise."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._was_last: deque[Any] = deque(maxlen=10)
        self._length: deque[Any] = deque(maxlen=10)
        self._first: Any = None
        self._before = (np.zeros(job.world_size, bool), np.zeros(job.world_size, bool))
        self.last_to_arrive: set[int] = set()
        self.longer_step: set[int] = set()

    def take(self, rows: Any, late_s: Any) -> None:
        late = late_s.reshape(self._job.pp, self._job.dp, self._job.tp)
        is_last = (late == late.max(axis=1, keepdims=True)) & (late > 0)
        self._was_last.append(is_last.reshape(-1))
        self._length.append(rows["length_s"])
        if len(self._length) < 10 or int(rows["step"][0]) % 5 != 4:
            return
        length = np.median(self._length, axis=0)
        self._first = length if self._first is None else self._first
        now = (np.mean(self._was_last, axis=0) > 0.5, length > 1.05 * self._first)
        self.last_to_arrive |= set(np.flatnonzero(now[0] & self._before[0]).tolist())
        self.longer_step |= set(np.flatnonzero(now[1] & self._before[1]).tolist())
        self._before = now


def play(case: Case, seed: int) -> Run:
    """One run: healthy for 20 to 39 steps, then the fault, watched until after the limit."""
    random = np.random.default_rng(seed)
    job = replace(case.jobs[seed % len(case.jobs)], **case.job)
    since = int(random.integers(20, 40))
    faults = case.pick(job, random, since)
    culprits = frozenset(rank for fault in faults for rank in fault.ranks)
    judge, history, naive = ComputeJudge(job.layout, job.nodes), History(job.world_size), NaiveRules(job)
    flagged: set[int] = set()
    suspected: set[int] = set()
    latency, first = None, frozenset()
    for rows, late_s in each_step(simulate(job, faults, since + case.limit_steps + AFTER_STEPS, seed)):
        history.put(np.arange(job.world_size), rows)
        naive.take(rows, late_s)
        for fault in judge.judge(history):
            (flagged if fault.confidence is Confidence.CONFIRMED else suspected).update(fault.ranks)
        if culprits and not first and flagged:
            first = frozenset(flagged)
        if culprits and culprits <= flagged and latency is None:
            latency = int(rows["step"][0]) - since + 1
    return Run(
        culprits,
        job.world_size,
        latency,
        bool(first) and first <= culprits,
        frozenset(flagged),
        frozenset(suspected),
        frozenset(naive.last_to_arrive),
        frozenset(naive.longer_step),
    )


def each_step(chunks: Iterator[Steps]) -> Iterator[tuple[Any, Any]]:
    for chunk in chunks:
        yield from zip(chunk.rows, chunk.late_s, strict=True)


def figures(case: Case, runs: Sequence[Run]) -> dict[str, Any]:
    """Recall: runs in which all culprits were confirmed within the limit. Precision: of all ranks ever confirmed.
    Right: of the runs that named anybody, those that named the culprits and nobody else at first."""
    named = [run for run in runs if run.flagged]
    found = [run.latency_steps for run in runs if run.latency_steps is not None]
    result: dict[str, Any] = {"case": case.name, "runs": len(runs), "limit_steps": case.limit_steps}
    victims = [run.flagged - run.culprits for run in runs]
    if case.is_hardware:
        right = sum(len(run.flagged & run.culprits) for run in runs)
        result |= {
            "recall": sum(step <= case.limit_steps for step in found) / len(runs),
            "precision": right / max(1, sum(len(run.flagged) for run in runs)),
            "right_rank": sum(run.is_right for run in named) / max(1, len(named)),
            "latency_steps_median": statistics.median(found) if found else None,
            "latency_steps_max": max(found, default=None),
        }
    else:
        victims = [run.flagged for run in runs]
    return result | {
        "victims": sum(map(len, victims)),
        "runs_with_victims": sum(map(bool, victims)),
        "suspected_only": sum(len(run.suspected - run.flagged - run.culprits) for run in runs),
        "naive_last_arriver_victims": sum(len(run.last_to_arrive - run.culprits) for run in runs),
        "naive_last_arriver_right": sum(bool(run.last_to_arrive & run.culprits) for run in runs),
        "naive_step_length_victims": sum(len(run.longer_step - run.culprits) for run in runs),
    }


def healthy(rank_steps: int, seed: int, job: Job = JUDGE_JOB) -> dict[str, Any]:
    """Confirmed verdicts in a job without any fault, judged after every step; days at one second a step."""
    judge, history = ComputeJudge(job.layout, job.nodes), History(job.world_size)
    everybody: Ids = np.arange(job.world_size)
    episodes, standing = 0, frozenset()
    steps = -(-rank_steps // job.world_size)
    for rows, _ in each_step(simulate(job, (), steps, seed)):
        history.put(everybody, rows)
        faults = [fault for fault in judge.judge(history) if fault.confidence is Confidence.CONFIRMED]
        now = frozenset(rank for fault in faults for rank in fault.ranks)
        episodes += len(now - standing)
        standing = now
    days = steps * job.world_size * job.step_s / SECONDS_A_DAY
    # Nothing seen in n days still allows 3/n a day, 95 % sure (rule of three); Poisson beyond.
    most = episodes + 3 if not episodes else episodes + 2 * episodes**0.5 + 2
    return {
        "rank_days": days,
        "false_confirmed": episodes,
        "false_per_10000_rank_days": episodes / days * 10_000,
        "upper_bound_per_10000_rank_days": most / days * 10_000,
    }


def judge_seconds(seed: int, faults: tuple[Fault, ...] = (), job: Job = JUDGE_JOB, steps: int = 240) -> float:
    """CPU seconds of the slowest judgement in which windows of all lengths are due."""
    judge, history = ComputeJudge(job.layout, job.nodes), History(job.world_size)
    times = []
    for rows, _ in each_step(simulate(job, faults, steps, seed)):
        history.put(np.arange(job.world_size), rows)
        started = time.process_time()
        judge.judge(history)
        if int(rows["step"][0]) + 1 in ALL_DUE:
            times.append(time.process_time() - started)
    return max(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100, help="of each case")
    parser.add_argument("--seed", type=int, default=FIRST_SEED)
    parser.add_argument("--healthy-rank-steps", type=int, default=20_000_000)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    arguments = parser.parse_args()
    seeds = range(arguments.seed, arguments.seed + arguments.runs)
    results = []
    for case in CASES:
        if arguments.only in case.name:
            results.append(figures(case, [play(case, seed) for seed in seeds]))
            print(" ".join(f"{key}={value}" for key, value in results[-1].items()), flush=True)
    slow = (Fault(tuple(range(8)), 1.1, 30),)
    judging = max(judge_seconds(arguments.seed), judge_seconds(arguments.seed, faults=slow))
    print(
        json.dumps(
            {
                "bench": "detector_sim",
                "cases": {result.pop("case"): result for result in results},
                "healthy": healthy(arguments.healthy_rank_steps, arguments.seed),
                "judge_10240_ranks_s": judging,
            }
        )
    )


if __name__ == "__main__":
    main()
