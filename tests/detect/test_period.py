"""Steps of a program that marks none: where they are cut, and that all ranks cut at the same operation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.detect.period import MOST_OPERATIONS, WARM_UP_STEPS, PeriodFinder, find_period
from ckptd.detect.signature import Signature
from ckptd.format.timings import Mask, Op, Rows

TP = Signature("tp", 8, Op.ALL_REDUCE, 20)
GRADS = Signature("dp", 32, Op.REDUCE_SCATTER, 24)
PARAMS = Signature("dp", 32, Op.ALL_GATHER, 24)
NORM = Signature("256 ranks", 256, Op.ALL_REDUCE, 3)
SEND = Signature("pp", 4, Op.SEND, 22)
BARRIER = Signature("256 ranks", 256, Op.BARRIER, 0)
KNOWN = [Signature("", 0, Op.OTHER, 0), TP, GRADS, PARAMS, NORM, SEND, BARRIER]

MEGATRON = [PARAMS, *[TP] * 40, SEND, *[TP] * 40, SEND, GRADS, NORM]
DDP = [GRADS, TP, PARAMS]
FSDP = [*[PARAMS] * 100, *[PARAMS, GRADS] * 100, NORM]
MICROBATCHES = [*[*[TP] * 20, SEND] * 12, GRADS, PARAMS, NORM]


def ids(program: list[Signature], steps: int) -> np.ndarray:
    return np.array([KNOWN.index(signature) for signature in program] * steps, np.int64)


def cut(sequence: np.ndarray | list[int], batches: list[int] | None = None) -> Rows:
    """The marks of operations that take 1 of 2 ns each, taken in batches."""
    finder, sequence = PeriodFinder(KNOWN), np.asarray(sequence)
    starts = np.arange(len(sequence)) * 2
    parts = np.split(np.arange(len(sequence)), batches or [])
    return np.concatenate([finder.take(sequence[part], starts[part], starts[part] + 1) for part in parts])


@pytest.mark.parametrize("program", [MEGATRON, DDP, FSDP, MICROBATCHES], ids=["megatron", "ddp", "fsdp", "microbatch"])
def test_a_step_is_one_period_of_the_program(program: list[Signature]) -> None:
    marks = cut(ids([*[BARRIER] * 5, *program], 1).tolist() + ids(program, 199).tolist())
    assert set(np.diff(marks["end_ns"])) == {2 * len(program)}
    assert marks["step"].tolist() == list(range(1, 201))


@pytest.mark.parametrize("program", [MEGATRON, DDP, FSDP, MICROBATCHES], ids=["megatron", "ddp", "fsdp", "microbatch"])
def test_steps_are_found_within_thirty_three_times_a_period(program: list[Signature]) -> None:
    most = max(128, 33 * len(program))
    assert len(cut(ids(program, 200)[:most])) > 0


def test_a_step_ends_with_the_operation_that_most_ranks_leave_together() -> None:
    period = find_period(ids(MEGATRON, 20), KNOWN)
    assert period is not None
    assert KNOWN[period.anchor] == NORM
    assert (period.operations, period.occurrences) == (len(MEGATRON), 1)


def test_equal_operations_by_the_hundred_are_not_taken_for_steps() -> None:
    program = [*[TP] * 1500, GRADS, NORM]
    marks = cut(ids(program, 12))
    assert set(np.diff(marks["end_ns"])) == {2 * len(program)}


def test_a_program_of_one_operation_is_cut_at_each_once_that_is_certain() -> None:
    assert len(cut(ids([TP], MOST_OPERATIONS - 1))) == 0
    assert len(cut(ids([TP], MOST_OPERATIONS + 5))) == MOST_OPERATIONS + 5


def test_no_step_is_found_where_nothing_repeats() -> None:
    sequence = np.random.default_rng(3).integers(1, len(KNOWN), 2000)
    assert len(cut(sequence)) == 0


@settings(max_examples=60)
@given(st.lists(st.integers(0, 1200), max_size=12), st.sampled_from([MEGATRON, DDP]), st.integers(1, 3))
def test_batches_do_not_move_the_boundaries(batches: list[int], program: list[Signature], changes: int) -> None:
    sequence = np.concatenate([ids(program, 400 // len(program)), ids([*program, *[BARRIER] * changes], 12)])
    assert cut(sequence, sorted(batches)).tolist() == cut(sequence).tolist()


def test_ranks_agree_on_boundaries_when_concurrent_operations_end_in_another_order() -> None:
    """Two buckets in flight: entered in one order, ended in either."""
    program = ids([PARAMS, GRADS, TP, NORM], 300)
    starts = np.arange(len(program)) * 10
    random = np.random.default_rng(5)
    boundaries = []
    for _ in range(4):
        ends = starts + np.where(program == KNOWN.index(GRADS), random.integers(1, 19, len(program)), 5)
        order = np.argsort(ends, kind="stable")
        marks = PeriodFinder(KNOWN).take(program[order], starts[order], ends[order])
        assert len(marks) >= 299
        boundaries.append((marks["step"].tolist(), marks["end_ns"].tolist()))
    assert all(other == boundaries[0] for other in boundaries[1:])


def test_a_single_event_does_not_move_the_boundaries() -> None:
    sequence = ids(MEGATRON, 100)
    at = 50 * len(MEGATRON) + 7
    marks = cut(np.insert(sequence, at, [KNOWN.index(BARRIER)] * 2))
    lengths = np.diff(marks["end_ns"]) // 2
    assert sorted(set(lengths.tolist())) == [len(MEGATRON), len(MEGATRON) + 2]
    assert (lengths == len(MEGATRON) + 2).sum() == 1


def test_another_program_is_noticed_and_cut_anew() -> None:
    other = [TP, PARAMS, PARAMS, GRADS, TP]
    steps = 1 + MOST_OPERATIONS // len(MEGATRON)
    marks = cut(np.concatenate([ids(MEGATRON, steps), ids(other, 400)]))
    lengths = np.diff(marks["end_ns"]) // 2
    assert (lengths[: steps - 2] == len(MEGATRON)).all()
    assert (lengths[-300:] == len(other)).all()
    assert (np.diff(marks["step"]) == 1).all()


def test_the_first_steps_are_marked_as_warm_up() -> None:
    masks = cut(ids(DDP, 100))["mask"]
    assert (masks[:WARM_UP_STEPS] == Mask.WARM_UP).all()
    assert (masks[WARM_UP_STEPS:] == Mask.NONE).all()
