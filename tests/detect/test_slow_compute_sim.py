"""Slow compute in simulated jobs of many ranks: the culprit in time, victims never. Seeds below 100; the figures of
``bench.detector_sim`` are of others."""

from __future__ import annotations

import numpy as np
import pytest

from bench.detector_model import GAPS, Fault, Job, simulate
from bench.detector_sim import ALL_DUE, CASES, Case, Run, figures, healthy, play
from ckptd.detect.compute_thresholds import Thresholds

SEEDS = range(5)  # one of each job
BY_NAME = {case.name: case for case in CASES}
JUDGE_LIMIT_S = 0.3
# Beside other work the same instructions take longer.
JUDGE_MARGIN = 2


def runs(name: str) -> list[Run]:
    return [play(BY_NAME[name], seed) for seed in SEEDS]


# --- the simulation itself ----------------------------------------------------------------------------------------
def test_the_same_seed_gives_the_same_steps() -> None:
    one, other = (list(simulate(Job(4, 2, 2), (), 30, 5)) for _ in range(2))
    assert all(a.rows.tobytes() == b.rows.tobytes() for a, b in zip(one, other, strict=True))


def test_self_time_and_waits_add_up_to_the_step() -> None:
    for chunk in simulate(Job(8, 4, 2, stages=1.6, imbalance=0.15), (Fault((3,), 1.5),), 20, 3):
        rows = chunk.rows
        assert np.allclose(rows["self_s"] + rows["waits_s"].sum(axis=-1), rows["length_s"], atol=1e-5)
        assert np.allclose(rows["gaps_s"].sum(axis=-1), rows["self_s"], atol=1e-5)
        assert (rows["waits_s"] > -1e-6).all()
        assert not rows["gaps_s"][..., GAPS:].any()


def test_victims_wait_and_arrive_last() -> None:
    job, slow = Job(8, 4, 2), 5
    (chunk,) = simulate(job, (Fault((slow,), 1.3),), 20, 3)
    rows, late_s = chunk.rows, chunk.late_s.mean(axis=0)
    replica = np.flatnonzero(job.layout.replica == job.layout.replica[slow])
    # All that share the replica of the slow rank come last, which is what blames them.
    assert set(np.argsort(-late_s)[: len(replica)].tolist()) == set(replica.tolist())
    excess = rows["self_s"].mean(axis=0) / rows["self_s"].mean() - 1
    assert np.flatnonzero(excess > 0.05).tolist() == [slow]
    assert rows["waits_s"].sum(axis=-1).mean(axis=0).argmin() == slow


# --- the judge on it ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name",
    [
        "rank x1.05",
        "rank x1.10",
        "rank x1.30",
        "rank x1.30, 1 or 2 peers",
        "node x1.10",
        "node x1.30",
        "node x1.10, 15 % imbalance",
        "rank x1.10, 1 % stalls",
        "rank x1.10, unequal stages",
        "rank x1.10, checkpoints masked",
        "rank x1.10, checkpoints unmasked",
        "rank +0.1 % a step",
    ],
)
def test_the_culprit_is_confirmed_in_time_and_no_victim(name: str) -> None:
    found = figures(BY_NAME[name], runs(name))
    assert found["recall"] == found["right_rank"] == 1
    assert found["victims"] == 0


@pytest.mark.parametrize("name", [case.name for case in CASES if not case.is_hardware])
def test_nobody_is_confirmed_where_no_device_is_slow(name: str) -> None:
    assert figures(BY_NAME[name], runs(name))["victims"] == 0


def test_the_naive_rule_blames_victims_where_the_judge_does_not() -> None:
    case = Case("naive", BY_NAME["rank x1.10"].pick, 15, {}, (Job(16, 2, 4),))
    found = figures(case, [play(case, seed) for seed in SEEDS])
    assert found["naive_last_arriver_right"] == len(SEEDS)
    assert found["naive_last_arriver_victims"] >= 6 * len(SEEDS)
    assert found["victims"] == 0


def test_a_healthy_job_has_no_confirmed_fault() -> None:
    found = healthy(400_000, 11, Job(dp=64))
    assert found["false_confirmed"] == 0
    assert found["rank_days"] > 4


def test_windows_of_every_length_are_due_at_once() -> None:
    for scale in Thresholds().scales:
        assert all((steps - scale.window_steps) % scale.stride_steps == 0 for steps in ALL_DUE)
