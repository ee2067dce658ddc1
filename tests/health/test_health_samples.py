"""Figures from two samples: rates of counters, gauges as they are, and silence where there is nothing to say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.detect.health import FIGURES
from ckptd.health.samples import COUNTER, RATES, figures_between


def test_gauges_are_figures_as_they_are_also_of_the_first_sample() -> None:
    assert figures_between({}, {"memory_available_share": 0.5}, 5.0) == {"memory_available_share": 0.5}


def test_a_counter_says_nothing_alone() -> None:
    assert figures_between({}, {"memory_major_faults_total": 100.0}, 5.0) == {}


def test_a_counter_over_time_is_a_rate() -> None:
    figures = figures_between({"memory_major_faults_total": 100.0}, {"memory_major_faults_total": 150.0}, 5.0)
    assert figures == {"memory_major_faults_per_s": 10.0}


def test_a_counter_over_another_is_a_share_by_label() -> None:
    before = {"disk_requests_total{a}": 0, "disk_requests_s_total{a}": 0, "disk_requests_total{b}": 10}
    after = {"disk_requests_total{a}": 40, "disk_requests_s_total{a}": 0.08, "disk_requests_total{b}": 90}
    assert figures_between(before, after, 5.0) == {"disk_latency_s{a}": pytest.approx(0.002)}


def test_too_few_requests_say_nothing_of_latency() -> None:
    before = {"disk_requests_total{a}": 0, "disk_requests_s_total{a}": 0}
    assert figures_between(before, {"disk_requests_total{a}": 19, "disk_requests_s_total{a}": 9.0}, 5.0) == {}
    assert figures_between(before, {"disk_requests_total{a}": 0, "disk_requests_s_total{a}": 0.0}, 5.0) == {}


def test_a_counter_that_went_back_says_nothing() -> None:
    assert figures_between({"gpu_pcie_replays_total{x}": 9.0}, {"gpu_pcie_replays_total{x}": 1.0}, 5.0) == {}


@given(
    st.dictionaries(
        st.sampled_from([rate.counter for rate in RATES] + ["cpu_s_total", "tcp_segments_total"]), st.floats(0, 1e9)
    ),
    st.dictionaries(
        st.sampled_from([rate.counter for rate in RATES] + ["cpu_s_total", "tcp_segments_total"]), st.floats(0, 1e9)
    ),
    st.floats(0, 100),
)
def test_rates_are_never_negative_and_are_figures_that_are_judged(
    before: dict[str, float], after: dict[str, float], elapsed_s: float
) -> None:
    figures = figures_between(before, after, elapsed_s)
    assert all(value >= 0 for value in figures.values())
    assert figures.keys() <= FIGURES.keys()


def test_every_rate_is_of_counters_and_makes_a_figure_that_is_judged() -> None:
    for rate in RATES:
        assert rate.figure in FIGURES
        assert rate.counter.endswith(COUNTER)
        assert not rate.per or rate.per.endswith(COUNTER)
