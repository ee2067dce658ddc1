"""From wished intervals to steps: ranks that learn of a schedule late still agree on the past."""

from __future__ import annotations

import itertools
import math

from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.model import Schedule
from ckptd.peers.pace import LONGEST_S, STALL_SHARE, Pace, Wish

NEVER = Wish("steps", 0)
wishes = st.one_of(
    st.builds(Wish, st.just("steps"), st.integers(0, 100)),
    st.builds(Wish, st.just("seconds"), st.floats(0.01, 1000)),
    st.just(Wish("auto")),
)
reports = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 50), st.floats(1e-4, 30), st.one_of(st.just(-1.0), st.floats(0, 60))),
    max_size=30,
)


def test_a_wish_in_steps_is_due_from_the_first_step_on() -> None:
    schedule = Pace(Wish("steps", 5), Wish("steps", 10)).schedule
    assert [s for s in range(1, 21) if schedule.is_due(s)] == [5, 10, 15, 20]
    assert [s for s in range(1, 21) if schedule.is_persisted(s)] == [10, 20]


def test_a_wish_in_seconds_becomes_steps_once_the_step_time_is_known() -> None:
    pace = Pace(Wish("seconds", 10), NEVER)
    pace.report(0, 1, 0.5, -1)
    entry = pace.schedule.entries[-1]
    assert entry.every_steps == 20
    assert entry.from_step > 1


def test_the_slowest_rank_counts() -> None:
    pace = Pace(Wish("seconds", 10), NEVER)
    pace.report(0, 1, 5.0, -1)
    pace.report(1, 1, 0.5, -1)
    assert pace.schedule.entries[-1].every_steps == 2


def test_auto_loses_at_most_its_share_of_the_time_to_stalls() -> None:
    pace = Pace(Wish("auto"), NEVER)
    for _ in range(3):
        pace.report(0, 1, 0.1, 0.05)
    every = pace.schedule.entries[-1].every_steps
    assert STALL_SHARE * every * 0.1 + 1e-9 >= 0.05


def test_auto_takes_a_snapshot_at_least_every_ten_minutes() -> None:
    pace = Pace(Wish("auto"), NEVER)
    for _ in range(3):
        pace.report(0, 1, 100.0, 500.0)
    assert pace.schedule.entries[-1].every_steps * 100.0 <= LONGEST_S


def test_auto_does_not_judge_by_the_first_snapshots_wait_for_slots() -> None:
    pace = Pace(Wish("auto"), NEVER)
    for stall_s in (2.0, 0.001, 0.001):
        pace.report(0, 1, 0.5, stall_s)
    assert pace.schedule.at(10**9).every_steps == 1


def test_a_small_change_of_pace_changes_no_schedule() -> None:
    pace = Pace(Wish("seconds", 10), NEVER)
    pace.report(0, 1, 0.1, -1)
    before = pace.schedule
    pace.report(0, before.entries[-1].from_step + 1, 0.11, -1)
    assert pace.schedule == before


@given(every=wishes, persist=wishes, reports=reports)
@settings(max_examples=150)
def test_a_schedule_only_ever_changes_in_the_future(
    every: Wish, persist: Wish, reports: list[tuple[int, int, float, float]]
) -> None:
    """What was due at a step stays so once any rank may have reached it, and persisted steps are due steps."""
    pace = Pace(every, persist)
    newest = 0
    heard: Schedule = pace.schedule
    for rank, ahead, step_s, stall_s in reports:
        step = newest + ahead
        pace.report(rank, step, step_s, stall_s)
        newest = max(newest, step)
        for past in range(max(0, newest - 60), newest + 1):
            assert heard.is_due(past) == pace.schedule.is_due(past)
            assert heard.is_persisted(past) == pace.schedule.is_persisted(past)
        heard = pace.schedule
        entry = pace.schedule.entries[-1]
        assert entry.every_steps >= 0
        if every.kind != "steps" or every.value:
            assert entry.every_steps >= 1
        if entry.persist_steps and entry.every_steps and len(pace.schedule.entries) > 1:
            assert entry.persist_steps % entry.every_steps == 0
        froms = [e.from_step for e in pace.schedule.entries]
        assert froms == sorted(froms)


@given(every=st.integers(1, 50), persist=st.integers(1, 200), step_s=st.floats(1e-3, 10))
def test_a_durable_interval_in_steps_always_meets_due_steps(every: int, persist: int, step_s: float) -> None:
    """Whatever the two intervals are, some due step is durable, and not later than asked for by more than one due
    interval."""
    pace = Pace(Wish("steps", every), Wish("steps", persist))
    pace.report(0, 1, step_s, -1)
    horizon = 2 * math.lcm(every, persist) + pace.schedule.entries[-1].from_step
    durable = [s for s in range(1, min(horizon, 200_000) + 1) if pace.schedule.is_persisted(s)]
    assert durable
    if len(durable) > 1:
        in_force = [s for s in durable if s >= pace.schedule.entries[-1].from_step]
        assert all(b - a < persist + every for a, b in itertools.pairwise(in_force))
