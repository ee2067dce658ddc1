"""Step marks: one a step, with the reasons why it says nothing about hardware."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from timed_alone import collecting, masks, one_rank_group, take_steps

from ckptd.errors import InvalidRequest
from ckptd.format.timings import OPERATION, Mask
from ckptd_client.timing import Timing, communicators, steps
from ckptd_client.timing.collection import Collection
from ckptd_client.timing.ring import Ring


@pytest.fixture(autouse=True)
def no_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(steps.WARM_UP_ENV, "0")


def started() -> Collection:
    """Marked once, so that the next step has a beginning."""
    collection = Collection()
    collection.steps.mark(0)
    take_steps(collection)
    return collection


def test_a_step_is_marked_once_however_often_it_is_named() -> None:
    collection = started()
    for step in (1, 1, 2, 2, 2):
        collection.steps.mark(step)
    rows = take_steps(collection)
    assert rows["step"].tolist() == [1, 2]
    assert rows["end_ns"][1] >= rows["end_ns"][0] > 0
    assert rows["mask"].tolist() == [0, 0]


def test_the_first_steps_after_a_start_are_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(steps.WARM_UP_ENV, "2")
    collection = Collection()
    for step in range(4):
        collection.steps.mark(step)
    assert [bool(mask & Mask.WARM_UP) for mask in masks(collection)] == [True, True, False, False]


def test_without_a_word_twenty_steps_are_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(steps.WARM_UP_ENV)
    collection = Collection()
    for step in range(30):
        collection.steps.mark(step)
    assert sum(bool(mask & Mask.WARM_UP) for mask in masks(collection)) == 20


def test_a_warm_up_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(steps.WARM_UP_ENV, "soon")
    with pytest.raises(InvalidRequest, match="CKPTD_WARM_UP_STEPS"):
        Timing()


@given(st.lists(st.sampled_from([Mask.CHECKPOINT, Mask.EVALUATION, Mask.COMPILE, None]), max_size=12))
def test_a_reason_is_of_the_step_under_way_alone(reasons: list[Mask | None]) -> None:
    collection = Collection()
    collection.steps.mark(0)
    collection.steps._warm_up = 0
    take_steps(collection)
    for step, reason in enumerate(reasons, 1):
        if reason is not None:
            collection.steps.flag(reason)
        collection.steps.mark(step)
    assert masks(collection) == [reason or 0 for reason in reasons]


def test_every_step_that_a_masked_block_touches_is_masked() -> None:
    collection = started()
    collection.steps.mark(1)
    with collection.steps.masked("evaluation"):
        collection.steps.mark(2)
        collection.steps.mark(3)
    collection.steps.mark(4)
    collection.steps.mark(5)
    assert masks(collection) == [0, Mask.EVALUATION, Mask.EVALUATION, Mask.EVALUATION, 0]


def test_blocks_may_lie_within_one_another() -> None:
    collection = started()
    with collection.steps.masked("evaluation"):
        with collection.steps.masked("checkpoint"), collection.steps.masked("evaluation"):
            collection.steps.mark(1)
        collection.steps.mark(2)
        collection.steps.mark(3)
    assert masks(collection) == [Mask.EVALUATION | Mask.CHECKPOINT] * 2 + [Mask.EVALUATION]


def test_what_is_in_force_is_what_the_open_blocks_say_and_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(steps.WARM_UP_ENV, "1")
    made = Collection().steps
    assert made.in_force == Mask.WARM_UP
    made.mark(0)
    assert made.in_force == Mask.NONE
    made.flag(Mask.COMPILE)
    assert made.in_force == Mask.NONE  # it is of the step, which may have moments without
    with made.masked("evaluation"), made.during(Mask.CHECKPOINT):
        made.mark(1)
        assert made.in_force == Mask.EVALUATION | Mask.CHECKPOINT
    assert made.in_force == Mask.NONE


def test_a_program_that_names_no_steps_does_not_warm_up_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(steps.WARM_UP_ENV, "2")
    made = Collection().steps
    made._since_ns -= steps._UNMARKED_NS
    assert made.in_force == Mask.NONE
    made.mark(0)
    assert made.in_force == Mask.WARM_UP


def test_a_reason_in_force_between_marks_masks_no_step() -> None:
    collection = started()
    with collection.steps.during(Mask.CHECKPOINT):
        pass
    collection.steps.mark(1)
    assert masks(collection) == [0]


def test_a_step_with_an_operation_of_a_group_too_many_is_incomplete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(communicators, "MOST", 1)
    with one_rank_group(), collecting() as collection:
        group = dist.new_group([0])
        dist.barrier()
        collection.steps.mark(0)
        dist.barrier(group=group)
        collection.steps.mark(1)
        dist.barrier()
        collection.steps.mark(2)
        assert masks(collection)[1:] == [Mask.INCOMPLETE, 0]


def test_an_unknown_reason_is_refused_with_those_there_are() -> None:
    with pytest.raises(InvalidRequest, match="evaluation"), Collection().steps.masked("lunch"):
        pass


def test_a_step_without_a_beginning_or_of_several_steps_is_incomplete() -> None:
    collection = Collection()
    for step in (7, 8, 10, 11, 3):
        collection.steps.mark(step)
    assert masks(collection) == [Mask.INCOMPLETE, 0, Mask.INCOMPLETE, 0, Mask.INCOMPLETE]


def test_a_step_whose_operations_were_dropped_is_incomplete() -> None:
    with one_rank_group(), collecting() as collection:
        collection.recorder.ring = Ring(OPERATION, 2)
        collection.steps.mark(0)
        for step in (1, 2):
            for _ in range(2):
                dist.barrier()
            collection.steps.mark(step)
        collection.steps.mark(3)
        assert masks(collection)[1:] == [0, Mask.INCOMPLETE, 0]


def test_a_step_in_which_something_was_compiled_is_masked() -> None:
    torch_dynamo = pytest.importorskip("torch._dynamo.utils")
    collection = started()
    collection.steps.mark(1)
    torch_dynamo.counters["frames"]["total"] += 1
    collection.steps.mark(2)
    collection.steps.mark(3)
    assert masks(collection)[1:] == [Mask.COMPILE, 0]


def test_what_is_no_step_changes_nothing() -> None:
    collection = started()
    collection.steps.mark("1")  # type: ignore[arg-type]
    assert (collection.steps.last, masks(collection)) == (0, [])


def test_timing_that_is_off_does_nothing() -> None:
    timing = Timing(is_on=False)
    timing.mark(1)
    timing.flag(Mask.CHECKPOINT)
    with timing.masked("evaluation"):
        pass
    timing.close()
    assert (timing.last_step, timing.is_reported) == (-1, False)
