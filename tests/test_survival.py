"""The simulation of survival: repeatable, in agreement with formulas, monotonous, and true to the planner."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np
import pytest

from bench import survival
from bench.survival_model import (
    KINDS,
    Effort,
    Estimate,
    Ids,
    Layout,
    Parameters,
    chains,
    effective_time,
    is_lost,
    layout_of,
    loss_probabilities,
    losses_of_the_snapshot,
    ranks,
    weighted_sum,
    wilson,
)
from ckptd.erasure.groups import plan_groups
from ckptd.model import Geometry, Roster, RosterEntry

AT = Parameters()
NODES_ONLY = dataclasses.replace(AT, rack_losses=0.0, row_losses=0.0, node_share=1.0)
QUICK = Effort(2e5, 1e-4)
SCHEMES = [scheme for scheme in survival.SCHEMES if scheme]


def planned(nodes: int, geometry: Geometry, labels: Sequence[str], at: Parameters, seed: int) -> Layout:
    """The layout that the daemons would use."""
    entries = [
        RosterEntry(rank, str(node), "", rank, tuple((label, str(node // at.width(label))) for label in labels))
        for rank, node in enumerate(ranks(nodes, seed).tolist())
    ]
    group_of = np.empty(nodes, np.int64)
    groups = plan_groups(Roster(1, 1, 1 << 16, tuple(entries), str(geometry)))
    for number, group in enumerate(groups):
        assert group.tolerance == geometry.m
        group_of[[int(member) for member in group.members]] = number
    return Layout(group_of, geometry.m)


def partition(group_of: Ids) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(group_of == group).tolist()) for group in np.unique(group_of)}


def rate(layout: Layout, at: Parameters, effort: Effort = QUICK) -> Estimate:
    return losses_of_the_snapshot(loss_probabilities(layout, at, 7, effort), at.losses_a_day(len(layout.group_of)))


# --- it judges what the daemons do --------------------------------------------------------------------------------
@pytest.mark.parametrize("labels", [(), ("rack",), ("row", "rack")], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_layout_is_that_of_the_planner(scheme: Geometry, labels: tuple[str, ...]) -> None:
    for nodes in (200, 523):
        layout = layout_of(nodes, scheme, labels, AT, 3)
        assert partition(layout.group_of) == partition(planned(nodes, scheme, labels, AT, 3).group_of)


def test_the_document_states_the_parameters_in_force() -> None:
    assert survival.parameter_table(AT) in survival.DOCUMENT.read_text()


# --- closed formulas ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("lost", "tolerance"), [(20, 1), (30, 2), (60, 5)])
def test_loss_of_a_group_is_hypergeometric(lost: int, tolerance: int) -> None:
    """Of 200 nodes one group of 8, everybody else alone: more than ``tolerance`` of it among ``lost`` random nodes."""
    nodes, size, trials = 200, 8, 20_000
    group_of = np.arange(nodes)
    group_of[:size] = 0
    rng = np.random.default_rng(5)
    drawn = rng.random((trials, nodes)).argsort(axis=1)[:, :lost]
    drawn = np.hstack([drawn, drawn[:, :3], np.full((trials, 2), -1)])  # nodes lost twice and nobody count for nothing
    found = wilson(int(is_lost(drawn, Layout(group_of, tolerance)).sum()), trials)
    ways = (math.comb(size, hit) * math.comb(nodes - size, lost - hit) for hit in range(tolerance + 1, size + 1))
    assert found.low <= sum(ways) / math.comb(nodes, lost) <= found.high


@pytest.mark.parametrize("scheme", [Geometry(1, 1), Geometry(4, 1), Geometry(9, 1)], ids=str)
def test_single_parity_with_independent_losses_is_the_formula(scheme: Geometry) -> None:
    nodes, n = 200, scheme.k + scheme.m
    at = dataclasses.replace(NODES_ONLY, interruptions=60.0)  # often enough that three are together at times
    found = loss_probabilities(layout_of(nodes, scheme, (), at, 1), at, 1, Effort(4e6, 1e-9))["node"]
    is_near = -math.expm1(-at.losses_a_day(nodes)["node"] * at.window_s(1) / 86_400)
    # Chains of independent nodes: with d different ones lost, all in different groups, the next is one of them again
    # (d / nodes), fatal (d (n - 1) / nodes) or one more.
    expected, chance, alive = 0.0, 1 - is_near, np.zeros(40)
    alive[0] = 1.0
    for _ in range(30):
        expected += chance * sum(p * d * (n - 1) / nodes for d, p in enumerate(alive))
        different = np.arange(40)
        stays, grows = alive * different / nodes, alive * np.clip(1 - different * n / nodes, 0, None)
        alive = stays + np.concatenate([[0.0], grows[:-1]])
        chance *= is_near
    assert found.low <= expected <= found.high
    assert found.high - found.low < 0.1 * expected


def test_chains_are_as_likely_as_in_a_simulated_history() -> None:
    rates, software_a_day, window_s = {"node": 40.0, "rack": 10.0, "row": 2.0}, 30.0, 600.0
    known = dict(chains(rates, software_a_day, window_s))
    assert sum(known.values()) == pytest.approx(1.0, abs=1e-4)
    rng = np.random.default_rng(11)
    a_day = np.array([*rates.values(), software_a_day])
    gaps = rng.exponential(86_400 / a_day.sum(), 200_000)
    kinds = rng.choice(4, gaps.size, p=a_day / a_day.sum())
    found: dict[tuple[int, ...], int] = {}
    before = [0, 0, 0]
    for gap, kind in zip(gaps.tolist(), kinds.tolist(), strict=True):
        before = before if gap < window_s else [0, 0, 0]
        if kind < 3:
            found[tuple(before)] = found.get(tuple(before), 0) + 1
            before[kind] += 1
    total = sum(found.values())
    for counts in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (2, 0, 0), (1, 1, 0), (0, 0, 1)]:
        assert found[counts] / total == pytest.approx(known[counts], rel=0.15)


def test_effective_time_is_the_formula_when_failures_are_rare() -> None:
    software = dataclasses.replace(AT, node_share=0.0, rack_losses=0.0, row_losses=0.0)
    found = effective_time(1000, 2, dict.fromkeys(KINDS, 1.0), software, 1, days=200, runs=200)
    lost_s = software.restart_s + software.snapshot_s / 2
    expected = (1 - software.software_a_day(1000) * lost_s / 86_400) * (1 - software.stall_s / software.snapshot_s)
    assert found.value == pytest.approx(expected, abs=3e-4)


# --- what must be better is better --------------------------------------------------------------------------------
def test_more_parity_is_never_worse() -> None:
    at = dataclasses.replace(AT, image_gib=0.0)  # one window for all, so the losses are the same
    layout = layout_of(300, Geometry(6, 2), (), at, 1)
    rates = [rate(layout._replace(tolerance=m), at).value for m in range(1, 5)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 2 * rates[-1]


def test_spreading_over_racks_helps_and_over_rows_more() -> None:
    side_by_side = Layout(np.arange(2000) // 10, 2)
    spread = [layout_of(2000, Geometry(8, 2), labels, AT, 1) for labels in [(), ("rack",), ("row", "rack")]]
    rates = [rate(layout, AT).value for layout in (side_by_side, *spread)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < rates[0] / 20


def test_a_group_with_one_member_a_domain_survives_the_loss_of_any_one_domain() -> None:
    alone = dataclasses.replace(AT, restart_s=0.0, image_gib=0.0)  # nothing else is lost at that time
    fatal = loss_probabilities(layout_of(2000, Geometry(8, 2), ("row", "rack"), alone, 1), alone, 1, QUICK)
    assert fatal == dict.fromkeys(KINDS, Estimate(0.0, 0.0, 0.0))


def test_a_snapshot_that_survives_more_often_means_more_training() -> None:
    shares = [effective_time(2000, 1, dict.fromkeys(KINDS, p), AT, 1, 20, 8).value for p in (0.0, 0.1, 0.5, 1.0)]
    assert shares == sorted(shares, reverse=True)


# --- limits and repetition ----------------------------------------------------------------------------------------
def test_without_failures_all_time_is_training() -> None:
    calm = dataclasses.replace(AT, interruptions=0.0, rack_losses=0.0, row_losses=0.0, stall_s=0.0)
    assert effective_time(1000, 2, dict.fromkeys(KINDS, 1.0), calm, 1) == Estimate(1.0, 1.0, 1.0)
    one = survival.outcome(200, Geometry(4, 2), calm, 1)
    assert one.losses_a_day.value == 0
    assert survival.days_between(one.losses_a_day) == "> 36,500"


def test_software_failures_never_cost_memory() -> None:
    software = dataclasses.replace(AT, node_share=0.0, rack_losses=0.0, row_losses=0.0)
    assert survival.outcome(200, None, software, 1).losses_a_day.value == 0


def test_two_runs_of_one_seed_give_the_same_bytes() -> None:
    def run(seed: int) -> str:
        outcomes = [survival.outcome(200, scheme, AT, seed) for scheme in (None, Geometry(1, 1))]
        return survival.result_table(200, outcomes, AT)

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_the_plot_is_small_and_has_every_scheme() -> None:
    one = survival.Outcome(None, {}, Estimate(0.1, 0.05, 0.2), Estimate(0.9, 0.8, 1.0))
    drawn = survival.plot(dict.fromkeys(survival.SIZES, [one] * len(survival.SCHEMES)))
    assert len(drawn) < 30_000
    assert re.findall(r">([^<]*\+[^<]*)<", drawn) == [survival.name(scheme) for scheme in SCHEMES]


def test_intervals_hold_what_they_are_for() -> None:
    assert wilson(0, 100).low == 0
    assert 0.03 < wilson(0, 100).high < 0.04
    assert wilson(100, 100).high == 1
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(400):
        parts = [(w, wilson(int(rng.binomial(500, p)), 500)) for w, p in ((0.9, 0.01), (0.1, 0.3))]
        total = weighted_sum(parts)
        held += total.low <= 0.9 * 0.01 + 0.1 * 0.3 <= total.high
    assert held > 0.92 * 400
