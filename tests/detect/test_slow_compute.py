"""Who computes slower: scores, thresholds, drift, and the judge on jobs small enough to think through."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.detector_model import Fault as Slowness
from bench.detector_model import Job, simulate
from ckptd.detect.compute_drift import ZERO_WINDOWS, Drift
from ckptd.detect.compute_scores import PeerSets, Scores, median_of, score, window_values
from ckptd.detect.compute_thresholds import Calibration, Thresholds
from ckptd.detect.history import History
from ckptd.detect.layout import Layout, infer
from ckptd.detect.records import Confidence, Fault, Kind
from ckptd.detect.slow_compute import ComputeJudge
from ckptd.errors import InvalidRequest

SEED = 7


def judged(
    job: Job,
    slow: Sequence[Slowness] = (),
    steps: int = 80,
    layout: Layout | None = None,
    silent: Iterable[int] = (),
    nodes: tuple[str, ...] | None = None,
    every: int = 1,
    seed: int = SEED,
) -> list[list[Fault]]:
    """What stands after each ``every``-th step."""
    judge = ComputeJudge(layout or job.layout, nodes or job.nodes)
    history, found = History(job.world_size), []
    ranks = np.array([rank for rank in range(job.world_size) if rank not in set(silent)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for chunk in simulate(job, tuple(slow), steps, seed):
            for row in chunk.rows:
                history.put(ranks, row[ranks])
                if row["step"][0] % every == every - 1:
                    found.append(judge.judge(history))
    return found


def ranks_of(found: list[list[Fault]], confidence: Confidence = Confidence.CONFIRMED) -> set[int]:
    return {rank for faults in found for fault in faults if fault.confidence is confidence for rank in fault.ranks}


def last(found: list[list[Fault]]) -> Fault:
    """The only fault that stands at the end."""
    assert len(found[-1]) == 1, found[-1]
    return found[-1][0]


# --- scores -------------------------------------------------------------------------------------------------------
@given(st.integers(0, 2**32 - 1), st.integers(4, 40))
def test_a_slow_value_among_many_stands_out_and_no_other_does(seed: int, size: int) -> None:
    values = 1 + 0.001 * np.random.default_rng(seed).standard_normal(size)
    values[size // 2] *= 1.1
    scores = score(values, PeerSets.of(np.zeros(size, np.int64)), 0.003)
    assert (scores.z > 6).tolist() == [rank == size // 2 for rank in range(size)]
    assert scores.rho[size // 2] == pytest.approx(0.1, abs=0.01)


@given(st.integers(0, 2**32 - 1), st.floats(1e-6, 1e6))
def test_the_unit_of_time_makes_no_difference(seed: int, unit: float) -> None:
    values = 1 + 0.02 * np.random.default_rng(seed).standard_normal(24)
    sets = PeerSets.of(np.arange(24) // 8)
    one, other = score(values, sets, 0.003), score(values * unit, sets, 0.003 * unit)
    assert np.allclose(one.z, other.z)
    assert np.allclose(one.rho, other.rho)


def test_few_are_compared_with_the_others_and_have_no_z() -> None:
    scores = score(np.array([1.3, 1.0, 2.0, 2.0, 2.6]), PeerSets.of(np.array([0, 0, 1, 1, 1])), 0.003)
    assert scores.reference.tolist() == [1.0, 1.3, 2.3, 2.3, 2.0]
    assert np.isnan(scores.z).all()
    assert scores.rho[4] == pytest.approx(0.3)


def test_what_is_not_known_spreads_to_nobody() -> None:
    values = np.array([1.0, np.nan, 1.0, 1.0, 1.0, 1.2, np.nan, np.nan])
    scores = score(values, PeerSets.of(np.array([0, 0, 0, 0, 0, 0, 1, 1])), 0.003)
    assert np.isfinite(scores.z).tolist() == [True, False, True, True, True, True, False, False]
    assert scores.z[5] > 6
    assert np.isnan(scores.reference[6:]).all()


def test_a_rank_alone_or_without_set_has_no_scores() -> None:
    sets = PeerSets.of(np.array([-1, 0, -1]))
    assert sets.blocks == ()
    assert np.isnan(score(np.ones(3), sets, 0.003).rho).all()
    assert sets.around(1).tolist() == []


def test_a_set_that_is_quiet_by_chance_is_held_against_what_is_usual() -> None:
    random = np.random.default_rng(SEED)
    values = 1 + 0.02 * random.standard_normal((64, 4))
    values[5] = [1.0, 1.0001, 0.9999, 1.05]
    scores = score(values.reshape(-1), PeerSets.of(np.arange(256) // 4), 0.003)
    assert scores.z[23] < 6


@given(st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_a_few_stalls_do_not_move_the_value_of_a_window(stalls: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    steps = 1 + 0.01 * random.standard_normal((1, 20))
    stalled = steps.copy()
    stalled[0, random.choice(20, stalls, replace=False)] += 100
    assert window_values(stalled, is_fast=False)[0] == pytest.approx(window_values(steps, is_fast=False)[0], abs=0.02)


def test_a_window_of_which_half_is_missing_has_no_value() -> None:
    steps = np.ones((3, 10))
    steps[1, :4] = steps[2, :5] = np.nan
    assert window_values(steps, is_fast=False).tolist() == [1.0, 1.0, pytest.approx(np.nan, nan_ok=True)]


def test_the_median_leaves_out_what_is_missing() -> None:
    rows = np.array([[3.0, np.nan, 1.0], [np.nan, np.nan, np.nan], [1.0, 2.0, 4.0]])
    assert median_of(rows).tolist() == [2.0, pytest.approx(np.nan, nan_ok=True), 2.0]


# --- thresholds and drift -----------------------------------------------------------------------------------------
def test_the_threshold_rises_above_what_a_healthy_job_does() -> None:
    calibration = Calibration(6)
    for window in range(100):
        calibration.learn(5.5, f"node{window}")
    assert calibration.z == pytest.approx(6.6)


def test_the_threshold_never_falls_below_its_least() -> None:
    calibration = Calibration(6)
    calibration.learn(1.0, "node0")
    assert calibration.z == 6


def test_a_rank_that_gets_slower_does_not_raise_the_threshold_before_itself() -> None:
    calibration = Calibration(6)
    for window in range(100):
        calibration.learn(min(5.9, window / 10), "node3")
    assert calibration.z == 6


def scores_of(rho: Sequence[float]) -> Scores:
    of = np.array(rho, np.float64)
    return Scores(np.ones(len(of)), of, np.full(len(of), 0.006), of / 0.006, np.full(len(of), len(of)))


def test_a_rank_that_drifts_is_noticed_and_one_that_was_always_slower_is_not() -> None:
    drift = Drift(3, Thresholds())
    drifting = [drift.take(scores_of([0.0, 0.02, 0.005 * window]), 10 * window) for window in range(20)]
    assert not np.any([now[:2] for now in drifting])
    assert drifting[-1][2]
    assert 40 <= drift.since(2) < 100


def test_a_rank_whose_first_windows_were_fast_by_chance_does_not_drift_for_ever() -> None:
    random, drift = np.random.default_rng(SEED), Drift(64, Thresholds())
    for window in range(400):
        by_chance = -0.012 if window < ZERO_WINDOWS else 0.006 * random.standard_normal(64)
        assert not drift.take(scores_of(np.broadcast_to(by_chance, 64).tolist()), 10 * window).any()


def test_a_repaired_rank_stops_drifting() -> None:
    drift = Drift(1, Thresholds())
    for window in range(40):
        now = drift.take(scores_of([0.0 if window < ZERO_WINDOWS else 0.3]), 10 * window)
    assert now[0]
    assert not drift.take(scores_of([0.0]), 400)[0]


# --- the judge ----------------------------------------------------------------------------------------------------
def test_a_slow_rank_is_suspect_first_and_then_confirmed() -> None:
    found = judged(Job(16, 2, 4), [Slowness((37,), 1.1, 25)])
    seen = [faults[0].confidence for faults in found if faults]
    assert seen[0] is Confidence.SUSPECT
    assert seen == sorted(seen, key=lambda confidence: confidence is Confidence.CONFIRMED)
    fault = last(found)
    assert (fault.kind, fault.ranks, fault.nodes) == (Kind.SLOW_COMPUTE, (37,), ())
    assert 20 <= fault.since_step <= 30


def test_the_evidence_says_what_a_person_can_check() -> None:
    evidence = last(judged(Job(16, 2, 4), [Slowness((37,), 1.1, 0)])).evidence
    assert json.loads(json.dumps(evidence)) == evidence
    assert evidence["rank"] == 37
    assert evidence["class"] == "slow device"
    assert evidence["rho"] == pytest.approx(0.1, abs=0.02)
    assert evidence["z"] > 6
    assert evidence["self_s"] - evidence["median_s"] == pytest.approx(evidence["excess_s"])
    assert evidence["spread_share"] > 0.5
    assert {place["position"] for place in evidence["worst_positions"]} <= set(range(16))
    assert "rank 37 computes" in evidence["summary"]
    assert "weakness" not in evidence


def test_a_node_whose_ranks_are_all_slow_is_one_fault() -> None:
    fault = last(judged(Job(16, 2, 4), [Slowness(tuple(range(24, 32)), 1.1, 25)]))
    assert fault.nodes == ("node3",)
    assert fault.ranks == tuple(range(24, 32))
    assert fault.evidence["class"] == "node: slow device"


def test_ranks_of_unknown_nodes_are_no_node() -> None:
    found = judged(Job(32, 1, 1), [Slowness(tuple(range(8)), 1.1, 0)], nodes=("",) * 32)
    assert [fault.ranks for fault in found[-1] if not fault.nodes] == [fault.ranks for fault in found[-1]]
    assert ranks_of(found) == set(range(8))


def test_a_localised_excess_is_never_more_than_a_suspect() -> None:
    found = judged(Job(16, 2, 4), [Slowness((37,), 1.1, 25, position=2)])
    assert not ranks_of(found)
    fault = last(found)
    assert fault.ranks == (37,)
    assert fault.evidence["class"] == "localised excess"
    assert fault.evidence["worst_positions"][0]["position"] == 2


def test_a_milder_fault_beside_a_grave_one_stays_suspect() -> None:
    found = judged(Job(32, 1, 1), [Slowness((1,), 1.5, 25), Slowness((20,), 1.1, 25)])
    assert ranks_of(found) == {1}
    assert found[-1][0].ranks == (1,)
    assert 20 in ranks_of(found, Confidence.SUSPECT)


def test_more_data_for_one_replica_is_no_slow_device() -> None:
    job = Job(16, 4, 4)
    replica = np.flatnonzero(job.layout.replica == 5).tolist()
    found = judged(job, [Slowness(tuple(replica), 1.1, 25)])
    assert not ranks_of(found)
    assert set(last(found).ranks) == set(replica)
    assert last(found).evidence["class"] == "data imbalance"


def test_a_periodic_stall_is_no_slow_device() -> None:
    assert not ranks_of(judged(Job(16, 2, 4), [Slowness((37,), 2.0, 0, every=20)], steps=200))


def test_a_rank_that_gets_slower_little_by_little_is_found() -> None:
    found = judged(Job(16, 1, 1), [Slowness((3,), 1.0, 50, a_step=0.001)], steps=150)
    assert ranks_of(found) == {3}


def test_a_repaired_rank_is_no_longer_named() -> None:
    job, judge, history = Job(16, 1, 1), None, History(16)
    judge = ComputeJudge(job.layout, job.nodes)
    for slow, first in (((Slowness((3,), 1.3),), 0), ((), 40)):
        for chunk in simulate(job, slow, 40, SEED, first):
            for row in chunk.rows:
                history.put(np.arange(16), row)
                faults = judge.judge(history)
        assert bool(faults) == bool(slow)


@pytest.mark.parametrize("size", [2, 3])
def test_among_two_or_three_the_slow_one_is_named_within_five_steps(size: int) -> None:
    found = judged(Job(size, 1, 1), [Slowness((1,), 1.3, 25)], steps=40)
    assert ranks_of(found[: 25 + 5]) == {1}
    assert ranks_of(found) == {1}
    assert "to compare with" in found[29][0].evidence["low_confidence"]


def test_of_two_the_one_that_was_always_a_little_slower_is_a_suspect() -> None:
    found = judged(Job(2, 1, 1), [Slowness((1,), 1.15)])
    assert not ranks_of(found)
    assert last(found).evidence["weakness"]


def test_of_two_restless_ranks_none_is_named() -> None:
    assert not any(judged(Job(2, 1, 1, noise=0.1), steps=200))


def test_without_peers_the_past_of_the_rank_is_what_counts() -> None:
    found = judged(Job(1, 4, 1, stages=1.6), [Slowness((2,), 1.3, 30)], steps=200)
    assert ranks_of(found) == {2}
    assert found[-1][0].evidence["peers"] == "own history"


def test_a_rank_with_nobody_to_compare_with_is_never_named() -> None:
    assert not any(judged(Job(1, 1, 1), [Slowness((0,), 1.5, 30)]))


def test_one_of_two_stages_is_a_suspect_at_most() -> None:
    found = judged(Job(1, 2, 1, stages=1.6), [Slowness((1,), 1.3, 30)])
    assert not ranks_of(found)
    assert ranks_of(found, Confidence.SUSPECT) == {1}


def test_a_silent_peer_does_not_hide_the_slow_one() -> None:
    assert ranks_of(judged(Job(4, 1, 1), [Slowness((1,), 1.3, 30)], silent=(2,))) == {1}


def test_peers_inferred_from_nothing_are_none_and_nobody_healthy_is_named() -> None:
    assert not any(judged(Job(8, 2, 2, stages=1.6), layout=infer([], 32)))


@settings(max_examples=5)
@given(st.integers(0, 99), st.sampled_from([2, 5, 10]))
def test_how_often_it_is_asked_makes_no_difference(seed: int, every: int) -> None:
    job, slow = Job(8, 2, 2), [Slowness((9,), 1.1, 25)]
    often, seldom = judged(job, slow, seed=seed), judged(job, slow, seed=seed, every=every)
    assert [[f.ranks for f in faults] for faults in often[every - 1 :: every]] == [
        [f.ranks for f in faults] for faults in seldom
    ]
    assert often[every - 1 :: every] == seldom


def test_steps_that_are_masked_are_not_judged() -> None:
    job = Job(8, 1, 1, checkpoint_every=1)
    assert not any(judged(job, [Slowness((1,), 2.0)]))


def test_the_world_of_the_history_must_be_that_of_the_layout() -> None:
    layout = Layout.from_sizes(4, 1, 1)
    with pytest.raises(InvalidRequest, match="3 nodes for 4 ranks"):
        ComputeJudge(layout, ("",) * 3)
    with pytest.raises(InvalidRequest, match="a history of 3 ranks"):
        ComputeJudge(layout, ("",) * 4).judge(History(3))
