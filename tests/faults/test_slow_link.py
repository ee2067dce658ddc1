"""A link that becomes slow between real processes on nodes with networks of their own is named, and nobody else."""

from __future__ import annotations

import os

import pytest

from bench.detector_fabric import RECEIVING, SENDING, SIDES, fabric
from bench.detector_link import WITHIN, Case, run_case


@pytest.fixture(scope="module", autouse=True)
def allowed() -> None:
    try:
        with fabric(f"ckptd-try{os.getpid()}", 1, 100.0):
            pass
    except OSError as error:
        pytest.skip(f"no network namespaces with rates here: {error}")


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "case",
    [
        Case("ddp", 4, victim=1, sides=SIDES, at_step=50),
        Case("ddp", 4, victim=2, sides=(SENDING,), at_step=50),
        Case("ring", 4, victim=3, sides=(RECEIVING,), at_step=50),
    ],
    ids=lambda case: f"{case.mode}-{'-'.join(case.sides)}",
)
def test_the_node_behind_a_slow_link_is_named_within_50_operations(case: Case) -> None:
    result = run_case(case, patience_operations=2 * WITHIN)
    assert result.suspected is not None
    assert result.suspected <= WITHIN
    assert not any(result.innocents.values()), result.innocents
