"""The last steps of all ranks: late, twice, never, masked, damaged."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.detect.history import ANEW_STEPS, LIVE_STEPS, READY_STEPS, History
from ckptd.errors import InvalidRequest
from ckptd.format.timings import SELF, Mask, Rows


def rows(steps: list[int], self_s: float = 1.0, mask: int = 0) -> Rows:
    """SELF rows whose every time tells the step, so that a mix-up shows."""
    made = np.zeros(len(steps), SELF)
    made["step"], made["mask"] = steps, mask
    made["self_s"] = self_s + np.array(steps)
    made["length_s"] = made["self_s"] + 0.25
    made["waits_s"] = np.array(steps)[:, None] + np.array([0.1, 0.2, 0.3])
    made["gaps_s"] = np.arange(16) + np.array(steps)[:, None] / 1024
    return made


def filled(world_size: int, steps: list[int], capacity_steps: int = 192) -> History:
    history = History(world_size, capacity_steps)
    for rank in range(world_size):
        history.put(rank, rows(steps, rank / 8))
    return history


def test_what_was_put_comes_back_as_matrices() -> None:
    history = filled(3, [4, 5, 6])
    steps = history.judged_steps()
    assert steps.tolist() == [4, 5, 6]
    assert history.self_s(steps).tolist() == [[4 + r / 8, 5 + r / 8, 6 + r / 8] for r in range(3)]
    assert np.allclose(history.length_s(steps) - history.self_s(steps), 0.25)
    assert np.allclose(history.waits_s(steps[:1], np.array([1, 2]))[:, :, 0], [[4.1, 4.1], [4.2, 4.2], [4.3, 4.3]])
    gaps = history.gaps_s(steps, np.array([2]))
    assert gaps.shape == (16, 1, 3)
    assert np.allclose(gaps[7, 0], 7 + np.array([4, 5, 6]) / 1024)
    assert not history.masks(steps).any()


@given(st.permutations([(rank, step) for rank in range(3) for step in range(5)]), st.integers(1, 15))
def test_the_order_in_which_rows_come_makes_no_difference(order: list[tuple[int, int]], batch: int) -> None:
    history = History(3, 5)
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        made = np.concatenate([rows([step], rank / 8) for rank, step in some])
        history.put(np.array([rank for rank, _ in some]), made)
    steps = history.judged_steps()
    assert steps.tolist() == list(range(5))
    assert history.self_s(steps).tolist() == filled(3, list(range(5))).self_s(steps).tolist()


@given(st.lists(st.integers(0, 40), min_size=1, max_size=60), st.integers(1, 8))
def test_the_newest_steps_are_held_and_no_others(order: list[int], capacity_steps: int) -> None:
    history = History(1, capacity_steps)
    held: set[int] = set()
    for step in order:
        history.put(0, rows([step]))
        held = set(sorted(held | {step})[-capacity_steps:])
        assert history.judged_steps().tolist() == sorted(held)


def test_a_batch_longer_than_the_history_leaves_its_newest() -> None:
    assert filled(2, list(range(10)), 4).judged_steps().tolist() == [6, 7, 8, 9]


def test_a_step_that_a_rank_has_not_reported_waits_for_it() -> None:
    history = filled(4, [1, 2])
    for rank in (0, 1, 3):
        history.put(rank, rows([3]))
    assert history.judged_steps().tolist() == [1, 2]
    history.put(2, rows([3]))
    assert history.judged_steps().tolist() == [1, 2, 3]


def test_one_rank_of_many_is_not_waited_for() -> None:
    history = filled(100, [1])
    for rank in range(99):
        history.put(rank, rows([2]))
    assert history.judged_steps().tolist() == [1, 2]
    assert np.isnan(history.self_s(np.array([2]))[99, 0])


def test_a_rank_that_has_long_been_silent_is_not_waited_for() -> None:
    history = filled(4, [0])
    steps = list(range(1, LIVE_STEPS + 1))
    for rank in range(3):
        history.put(rank, rows(steps[:-1]))
    assert history.judged_steps().tolist() == [0]
    for rank in range(3):
        history.put(rank, rows(steps[-1:]))
    assert history.judged_steps().tolist() == [0, *steps]


def test_a_rank_that_never_reports_is_not_waited_for() -> None:
    history = History(3)
    for rank in range(2):
        history.put(rank, rows([7]))
    assert history.judged_steps().tolist() == [7]


def test_a_masked_step_of_one_rank_is_left_out_for_that_rank() -> None:
    history = filled(4, [1, 2])
    history.put(3, rows([2], mask=Mask.EVALUATION))
    steps = history.judged_steps()
    assert steps.tolist() == [1, 2]
    assert np.isnan(history.self_s(steps)[3]).tolist() == [False, True]
    assert history.masks(steps)[3].tolist() == [0, Mask.EVALUATION]


@pytest.mark.parametrize("mask", [mask for mask in Mask if mask])
def test_a_step_that_most_ranks_mask_is_left_out_for_all(mask: Mask) -> None:
    history = filled(4, [1, 2, 3])
    for rank in range(3):
        history.put(rank, rows([2], mask=mask))
    assert history.judged_steps().tolist() == [1, 3]


def test_the_last_row_for_a_step_counts() -> None:
    history = filled(2, [1])
    history.put(0, np.concatenate([rows([1], 7.0), rows([1], 5.0)]))
    assert history.self_s(history.judged_steps()).tolist() == [[6.0], [1.125]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
@pytest.mark.parametrize("field", ["self_s", "length_s", "waits_s", "gaps_s"])
def test_times_that_are_none_make_the_step_incomplete(field: str, value: float) -> None:
    history = filled(2, [1])
    damaged = rows([1])
    damaged[field] = value
    history.put(0, damaged)
    assert history.masks(np.array([1]))[:, 0].tolist() == [Mask.INCOMPLETE, 0]
    assert np.isnan(history.self_s(np.array([1]))[0, 0])


def test_a_step_before_all_steps_is_dropped() -> None:
    history = filled(2, [1])
    history.put(0, rows([-1]))
    assert history.judged_steps().tolist() == [1]


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_outside_of_the_world_is_refused(rank: int) -> None:
    with pytest.raises(InvalidRequest, match="not one of 2"):
        History(2).put(rank, rows([1]))


@pytest.mark.parametrize(("world_size", "capacity_steps"), [(0, 1), (1, 0)])
def test_a_history_of_nothing_is_refused(world_size: int, capacity_steps: int) -> None:
    with pytest.raises(InvalidRequest, match="holds nothing"):
        History(world_size, capacity_steps)


def test_an_empty_history_judges_nothing() -> None:
    history = History(2)
    history.put(0, rows([]))
    assert history.judged_steps().tolist() == []
    assert history.step_p99_s == 0
    assert not history.is_ready


def test_it_is_ready_once_there_are_steps_and_knows_how_long_they_are() -> None:
    history = filled(2, list(range(READY_STEPS)))
    assert history.is_ready
    assert history.step_p99_s == pytest.approx(READY_STEPS - 1 + 0.125 + 0.25, abs=0.1)


def sent_in_turn(history: History, steps: list[int], batch: int = 10, world_size: int = 4) -> None:
    """Each rank reports ``batch`` steps, then the next does."""
    for at in range(0, len(steps), batch):
        for rank in range(world_size):
            history.put(rank, rows(steps[at : at + batch], rank / 8))


@pytest.mark.parametrize("first", [range(100), range(5000, 5100), range(1000), range(0, 64000, 320)])
@pytest.mark.parametrize("batch", [1, 10, 64])
def test_steps_that_count_anew_are_judged_and_said_to_be_new(first: range, batch: int) -> None:
    history = History(4)
    sent_in_turn(history, list(first), batch)
    assert history.generation == 0
    sent_in_turn(history, list(range(50)), batch)
    assert history.generation >= 1
    judged = history.judged_steps().tolist()
    assert judged[-20:] == list(range(30, 50))
    assert max(history.held_steps()) == 49


def test_each_epoch_may_count_anew() -> None:
    history = History(4)
    for epoch in range(5):
        sent_in_turn(history, list(range(300)))
        assert history.generation == epoch
        assert history.judged_steps().tolist() == list(range(300 - 192, 300))


def test_rows_of_both_countings_in_one_report_leave_only_those_of_the_second() -> None:
    history = History(4)
    sent_in_turn(history, list(range(100)))
    for rank in range(4):
        history.put(rank, rows([*range(100, 140), 0, 1, 2]))
    sent_in_turn(history, list(range(3, 30)))
    assert history.judged_steps().tolist()[-27:] == list(range(3, 30))
    assert history.held_steps().max() == 29


def test_a_minority_that_counts_anew_changes_nothing() -> None:
    history = filled(5, list(range(100)))
    for rank in range(2):
        history.put(rank, rows(list(range(50))))
    assert history.generation == 0
    assert history.judged_steps().tolist() == list(range(100))


@pytest.mark.parametrize("strange", [0, 2, 4])
@pytest.mark.parametrize("batch", [1, 10, 192])
def test_a_rank_with_huge_steps_blinds_nobody(strange: int, batch: int) -> None:
    """Wherever it is in the order of reports, with as many steps as the others or at once with all that fit."""
    history = History(5)
    for at in range(0, 400, batch):
        for rank in range(5):
            far = 10**12 if rank == strange else 0
            history.put(rank, rows(list(range(far + at, far + at + batch))))
    last = (400 + batch - 1) // batch * batch - 1
    others = [rank for rank in range(5) if rank != strange]
    held = history.held_steps()
    held = held[held <= last]
    assert held.tolist()[-100:] == list(range(last - 99, last + 1))
    assert np.isfinite(history.self_s(held[-100:], np.array(others))).all()


def test_a_rank_that_is_ahead_by_less_than_is_held_is_kept() -> None:
    """Steps are recorded each 32nd: what a second brings is a thousand steps further."""
    steps = list(range(0, 32 * 400, 32))
    history = History(3)
    sent_in_turn(history, steps[:200], world_size=3)
    history.put(0, rows(steps[200:300]))
    for rank in (1, 2):
        history.put(rank, rows(steps[200:300]))
    assert history.judged_steps().tolist() == steps[300 - 192 : 300]
    assert np.isfinite(history.self_s(history.judged_steps())).all()


def test_a_late_report_that_is_not_far_behind_changes_nothing() -> None:
    history = filled(4, list(range(100)))
    for rank in range(4):
        history.put(rank, rows(list(range(100 - ANEW_STEPS, 100 - ANEW_STEPS // 2))))
    assert history.generation == 0
    assert history.judged_steps().tolist() == list(range(100))
