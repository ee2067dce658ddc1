"""Health of a node: what it learns as normal, what it calls out of line, and what it leaves alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.detect.health import (
    BLOCK,
    FIGURES,
    FORGOTTEN,
    HELD,
    MOST_FIGURES,
    RELEARN,
    SUSTAINED,
    UNWELL,
    WARM_UP,
    Health,
    NodeNormal,
    Resource,
    name_of,
    score_of,
    split_name,
)

Series = dict[str, npt.NDArray[np.float64]]

DAY = 17_280  # samples of 5 s
PEERS = tuple(f"10.0.0.{host}" for host in range(2, 6))
SOFT = sorted(family for family, figure in FIGURES.items() if not figure.is_hard)
HARD = sorted(family for family, figure in FIGURES.items() if figure.is_hard)


def wander(rng: np.random.Generator, count: int, memory: float, spread: float) -> npt.NDArray[np.float64]:
    """Noise in which each value remembers the one before it."""
    steps = rng.normal(0, spread * math.sqrt(1 - memory**2), count)
    noise = np.empty(count)
    level = 0.0
    for at in range(count):
        level = memory * level + steps[at]
        noise[at] = level
    return noise


def a_well_node(seed: int, count: int, memory: float = 0.6) -> Series:
    """What a node tells by day and by night: load moves all of it, most of it is skewed, some of it drifts."""
    rng = np.random.default_rng(seed)
    load = 0.5 + 0.5 * np.sin(2 * np.pi * (np.arange(count) / DAY + rng.random()))
    series = {
        "cpu_steal_share": np.abs(rng.normal(0.002, 0.002, count)),
        "cpu_pressure_share": np.clip(0.05 + 0.1 * load + wander(rng, count, memory, 0.02), 0, 1),
        "io_pressure_share": np.clip(0.01 + 0.03 * load + np.abs(wander(rng, count, memory, 0.01)), 0, 1),
        "memory_available_share": np.clip(0.5 - 0.2 * load + wander(rng, count, 0.95, 0.02), 0.02, 1),
        "memory_pressure_share": rng.exponential(0.0005, count),
        "memory_major_faults_per_s": rng.exponential(2, count) * (rng.random(count) < 0.3),
        "disk_latency_s{vda}": 2e-3 * np.exp(0.4 * load + wander(rng, count, memory, 0.4)),
        "tcp_retransmit_share": rng.exponential(3e-4, count) * (1 + load),
        "gpu_temperature_c{0000:3b:00}": 60 + 10 * load + wander(rng, count, 0.9, 1.5),
        "gpu_clock_hz{0000:3b:00}": 1.7e9 + wander(rng, count, memory, 1e7),
    }
    for peer in PEERS:
        series[f"tcp_peer_rtt_s{{{peer}}}"] = 2e-4 * np.exp(0.5 * load + wander(rng, count, memory, 0.3))
        series[f"tcp_peer_retransmit_share{{{peer}}}"] = rng.exponential(3e-4, count)
    return series


def samples_of(series: Series) -> Iterable[dict[str, float]]:
    names = list(series)
    for row in np.stack([series[name] for name in names], axis=1).tolist():
        yield dict(zip(names, row, strict=True))


def judged(series: Series) -> list[Health]:
    node = NodeNormal()
    return [node.observe(sample) for sample in samples_of(series)]


@dataclass(frozen=True)
class Trouble:
    """What goes wrong, ``name: (factor, plus)``, and how its sign begins."""

    change: Mapping[str, tuple[float, float]]
    sign: str

    def put_into(self, series: Series, during: slice) -> None:
        for name, (factor, plus) in self.change.items():
            series[name][during] = series[name][during] * factor + plus


STEAL = Trouble({"cpu_steal_share": (1, 0.38), "cpu_pressure_share": (1, 0.4)}, "cpu steal 38")
DISK = Trouble({"disk_latency_s{vda}": (20, 0), "io_pressure_share": (1, 0.3)}, "latency of disk vda ")
RETRANSMITS = Trouble(
    {"tcp_retransmit_share": (1, 0.02)} | {f"tcp_peer_retransmit_share{{{peer}}}": (1.0, 0.02) for peer in PEERS[:3]},
    "TCP segments sent again 2",
)
ONE_PEER = Trouble(
    {f"tcp_peer_retransmit_share{{{PEERS[0]}}}": (1, 0.02), f"tcp_peer_rtt_s{{{PEERS[0]}}}": (20, 0)},
    f"round trip to {PEERS[0]} ",
)
ONSET = 400
END = 460


def troubled(trouble: Trouble, seed: int, count: int = 520) -> list[Health]:
    series = a_well_node(seed, count)
    trouble.put_into(series, slice(ONSET, END))
    return judged(series)


# --- normal -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("seed", "memory"), [(0, 0.6), (1, 0.95)])
def test_a_node_that_is_well_is_never_unwell_in_a_day_and_hardly_gives_a_sign(seed: int, memory: float) -> None:
    history = judged(a_well_node(seed, DAY, memory))
    assert max(health.score for health in history) < UNWELL
    assert sum(bool(health.signs) for health in history) < DAY / 1000
    assert history[-1].is_learned


def test_there_is_no_verdict_on_soft_figures_before_the_warm_up() -> None:
    series = a_well_node(2, WARM_UP + SUSTAINED)
    STEAL.put_into(series, slice(WARM_UP - 20, WARM_UP))
    history = judged(series)
    assert not any(health.signs or health.score or health.is_learned for health in history[: WARM_UP - 1])
    assert history[-1].is_learned


def test_trouble_for_less_than_half_of_the_warm_up_is_not_learned() -> None:
    series = a_well_node(3, 200)
    STEAL.put_into(series, slice(10, 35))
    STEAL.put_into(series, slice(150, 200))
    assert judged(series)[-1].signs[0].startswith("cpu steal")


def test_a_node_that_is_sick_from_the_start_is_not_taken_for_well_where_a_ceiling_is_known() -> None:
    series = a_well_node(4, 200)
    STEAL.put_into(series, slice(0, 200))
    assert "cpu steal 38" in " ".join(judged(series)[-1].signs)


def test_a_step_of_load_becomes_the_new_normal() -> None:
    series = a_well_node(5, 1200)
    series["cpu_pressure_share"][300:] += 0.4
    history = judged(series)
    assert history[310].signs
    assert history[300 + RELEARN - 10].signs
    assert not any(health.signs for health in history[300 + RELEARN + SUSTAINED :])
    # And the old normal is not out of line when it comes back: less of what is bad never is.
    series = a_well_node(5, 1300)
    series["cpu_pressure_share"][300:1200] += 0.4
    assert not any(health.signs for health in judged(series)[1200 + SUSTAINED :])


def test_what_lasts_is_not_learned_above_the_ceiling() -> None:
    series = a_well_node(6, 1200)
    STEAL.put_into(series, slice(300, 1200))
    last = judged(series)[-1]
    assert any(sign.startswith("cpu steal") for sign in last.signs)


def test_samples_out_of_line_do_not_move_the_normal() -> None:
    quiet, burst = a_well_node(7, 800), a_well_node(7, 800)
    DISK.put_into(burst, slice(300, 400))
    DISK.put_into(quiet, slice(700, 800))
    DISK.put_into(burst, slice(700, 800))
    before, after = judged(quiet)[-1], judged(burst)[-1]
    assert before.signs
    assert [sign.split(" (")[0] for sign in before.signs] == [sign.split(" (")[0] for sign in after.signs]
    for family in ("disk_latency_s", "io_pressure_share"):
        # A burst that was learned from would have made the second look half as bad.
        assert after.severities[family] == pytest.approx(before.severities[family], abs=0.1)
        assert after.severities[family] > 0.8


# --- trouble ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("trouble", [STEAL, DISK, RETRANSMITS], ids=["steal", "disk", "retransmits"])
@pytest.mark.parametrize("seed", range(10, 20))
def test_trouble_is_told_while_it_lasts_and_not_after(trouble: Trouble, seed: int) -> None:
    history = troubled(trouble, seed)
    assert not any(health.signs for health in history[:ONSET])
    for health in history[ONSET + SUSTAINED : END]:
        assert health.score >= UNWELL
        assert any(sign.startswith(trouble.sign.rstrip("0123456789")) for sign in health.signs)
    assert any(sign.startswith(trouble.sign) for health in history[ONSET:END] for sign in health.signs)
    assert not any(health.signs for health in history[END + SUSTAINED :])


def test_a_sign_says_what_is_and_what_is_normal() -> None:
    node = NodeNormal()
    for _ in range(WARM_UP):
        node.observe({"cpu_steal_share": 0.002, "disk_latency_s{vda}": 0.002})
    for _ in range(SUSTAINED):
        health = node.observe({"cpu_steal_share": 0.38, "disk_latency_s{vda}": 0.04})
    assert health.signs == ("cpu steal 38 % (normal 0.2 %)", "latency of disk vda 40 ms (normal 2 ms)")


@pytest.mark.parametrize("length", range(1, SUSTAINED // 2 + 1))
def test_a_spike_is_nothing(length: int) -> None:
    series = a_well_node(8, 300)
    for trouble in (STEAL, DISK, RETRANSMITS):
        trouble.put_into(series, slice(200, 200 + length))
    assert not any(health.signs or health.score for health in judged(series))


def test_what_is_wrong_with_one_peer_is_told_but_is_not_this_nodes() -> None:
    history = troubled(ONE_PEER, 9)
    during = history[END - 1]
    assert any(sign.startswith(ONE_PEER.sign) for sign in during.signs)
    assert during.score == 0.0


def test_less_of_what_is_bad_is_never_out_of_line() -> None:
    series = a_well_node(9, 300)
    for name in ("cpu_pressure_share", "disk_latency_s{vda}", "gpu_temperature_c{0000:3b:00}"):
        series[name][200:] *= 0.01
    series["memory_available_share"][200:] = 1.0
    assert not any(health.signs for health in judged(series))


@settings(max_examples=60)
@given(
    family=st.sampled_from(SOFT),
    values=st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=20, max_size=60),
    seed=st.integers(0, 99),
)
def test_one_soft_figure_alone_never_makes_a_node_unwell(family: str, values: list[float], seed: int) -> None:
    node = NodeNormal()
    name = name_of(family, "x")
    rng = np.random.default_rng(seed)
    for value in [*np.abs(rng.normal(1, 0.1, WARM_UP)).tolist(), *values]:
        health = node.observe({name: value, "memory_available_share": 0.5})
        assert health.score < UNWELL
        assert all(math.isfinite(severity) for severity in health.severities.values())


@settings(max_examples=200)
@given(family=st.sampled_from(SOFT), power=st.floats(-9, 6), other_power=st.floats(-9, 6))
def test_levels_rise_with_what_is_bad_and_can_be_read_back(family: str, power: float, other_power: float) -> None:
    figure = FIGURES[family]
    value, other = ((figure.reference or 1.0) * 10**exponent for exponent in (power, other_power))
    worse, better = (value, other) if figure.is_low_bad == (value < other) else (other, value)
    assert figure.level(worse) >= figure.level(better)
    assert figure.value(figure.level(value)) == pytest.approx(value, rel=1e-6)


@given(st.dictionaries(st.sampled_from(SOFT), st.floats(0, 1)), st.sampled_from(SOFT))
def test_the_score_is_that_of_the_second_worst_and_never_falls_when_one_gets_worse(
    severities: dict[str, float], family: str
) -> None:
    ranked = sorted([*severities.values(), 0.0, 0.0], reverse=True)
    score = score_of(severities)
    assert ranked[1] <= score <= max(ranked[1], ranked[0] / 3)
    assert score_of(severities | {family: 1.0}) >= score


# --- hard signs ---------------------------------------------------------------------------------------------------
def test_an_event_counts_at_once_without_any_normal_and_for_long_but_not_for_ever() -> None:
    node = NodeNormal()
    first = node.observe({"gpu_xid{79 on GPU 0000:3b:00}": 1.0})
    assert (first.score, first.signs, first.is_learned) == (1.0, ("Xid 79 on GPU 0000:3b:00",), False)
    history = [node.observe({}) for _ in range(HELD)]
    assert all(health.score == 1.0 for health in history[:-1])
    assert history[-1] == Health()


def test_throttling_counts_when_it_is_sustained() -> None:
    node = NodeNormal()
    name = "gpu_thermal_throttle{0000:3b:00}"
    scores = [node.observe({name: value}).score for value in (0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0)]
    assert scores == [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("family", HARD)
def test_a_hard_figure_of_zero_is_no_sign(family: str) -> None:
    node = NodeNormal()
    for _ in range(SUSTAINED):
        health = node.observe({name_of(family, "x"): 0.0})
    assert (health.score, health.signs) == (0.0, ())


# --- what is not judged -------------------------------------------------------------------------------------------
def test_what_the_daemon_loads_itself_is_neither_judged_nor_learned() -> None:
    series = a_well_node(20, 700)
    DISK.put_into(series, slice(200, 600))
    node = NodeNormal()
    for at, sample in enumerate(samples_of(series)):
        health = node.observe(sample, {Resource.DISK} if 200 <= at < 600 else ())
        assert not health.signs
    DISK.put_into(series, slice(600, 700))
    for sample in list(samples_of(series))[600:]:
        health = node.observe(sample)
    assert health.score >= UNWELL


def test_unknown_and_impossible_figures_are_ignored() -> None:
    node = NodeNormal()
    for value in (1.0, math.nan, math.inf):
        assert node.observe({"phase_of_the_moon": 1.0, "cpu_steal_share": value * math.inf}) == Health()


def test_a_figure_that_is_no_longer_told_is_no_longer_judged() -> None:
    node = NodeNormal()
    for _ in range(WARM_UP):
        node.observe({"cpu_steal_share": 0.0, "cpu_pressure_share": 0.0})
    for _ in range(SUSTAINED):
        health = node.observe({"cpu_steal_share": 0.5, "cpu_pressure_share": 0.5})
    assert health.score >= UNWELL
    for _ in range(SUSTAINED):
        health = node.observe({})
    assert health == Health()


def test_the_number_of_figures_that_are_learned_is_bounded_and_room_comes_back() -> None:
    node = NodeNormal()
    node.observe({f"tcp_peer_rtt_s{{{peer}}}": 1e-3 for peer in range(MOST_FIGURES)})
    normal, bad = [{"cpu_steal_share": 0.0}] * WARM_UP, [{"cpu_steal_share": 0.5}] * SUSTAINED
    assert not any(node.observe(sample).signs for sample in normal + bad)
    for _ in range(FORGOTTEN):
        node.observe({})
    assert [node.observe(sample).signs for sample in normal + bad][-1] == ("cpu steal 50 % (normal 0 %)",)


@given(st.sampled_from(sorted(FIGURES)), st.text(st.characters(exclude_characters="{}"), max_size=20))
def test_names_are_taken_apart_as_they_were_put_together(family: str, label: str) -> None:
    assert split_name(name_of(family, label)) == (family, label)


def test_blocks_are_short_against_what_must_last_to_be_learned() -> None:
    assert SUSTAINED < BLOCK < RELEARN <= HELD
