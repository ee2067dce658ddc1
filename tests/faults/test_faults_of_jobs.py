"""Faults of real jobs on gloo, DDP and FSDP2, as ``ckptd faults`` names them: the right ranks and nobody else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench.detector_job import Plan
from bench.detector_live import FITTING, run_case
from bench.detector_nursery import Nursery

STEPS = 1000
AT_STEP = 12
HANG_S, DEATH_S = 60.0, 20.0  # until a test gives up; how soon it is, is measured in bench/


@pytest.fixture(scope="module")
def ranks() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


def case(mode: str, fault: str, world_size: int, rank: int, *, is_slow: bool = True) -> object:
    marks = [pytest.mark.slow] if is_slow else []
    return pytest.param(mode, fault, world_size, rank, marks=marks, id=f"{mode}-{fault}-{world_size}")


@pytest.mark.parametrize(
    ("mode", "fault", "world_size", "rank"),
    [
        case("ddp", "kill", 3, 1, is_slow=False),
        case("fsdp", "kill", 4, 0),
        case("ddp", "stop", 3, 2),
        case("fsdp", "stop", 4, 0),
        case("ddp", "gil", 2, 1),
        case("ddp", "skip", 3, 0),
        case("ddp", "skip", 2, 1),
        case("fsdp", "skip", 4, 2),
        case("fsdp", "size", 3, 1),
    ],
)
def test_a_rank_that_stops_a_job_is_named_and_its_victims_are_not(
    mode: str, fault: str, world_size: int, rank: int, ranks: Nursery
) -> None:
    plan = Plan(mode, STEPS, 0.1, fault, (rank,), AT_STEP)
    result = run_case(ranks, plan, world_size, DEATH_S if fault == "kill" else HANG_S)
    assert result.named_s is not None, result.faults
    assert result.strangers == []
    assert {tuple(found["ranks"]) for found in result.faults if found["kind"] in FITTING[fault]} == {(rank,)}


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "world_size", "factor"), [("ddp", 2, 1.3), ("fsdp", 4, 1.3), ("ddp", 8, 1.1)])
def test_a_rank_that_computes_slowly_is_named(mode: str, world_size: int, factor: float, ranks: Nursery) -> None:
    plan = Plan(mode, 300, 0.2, "slow", (1,), 30, factor)
    result = run_case(ranks, plan, world_size, 60.0)
    assert result.named_s is not None, result.faults
    assert result.strangers == []


@pytest.mark.slow
def test_a_healthy_job_that_takes_snapshots_and_ends_is_nobodys_fault(ranks: Nursery) -> None:
    result = run_case(ranks, Plan("ddp", 60, 0.1, every=5), 4, 60.0)
    assert [found for found in result.faults if found["confidence"] != "suspect"] == []
