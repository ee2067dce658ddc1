"""Operations become self time, waits, gaps and samples."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.detect.positions import position
from ckptd.detect.records import Communicator
from ckptd.detect.reduce import (
    MOST_MARKS,
    MOST_OPERATIONS,
    RATE_STEPS,
    SAMPLES,
    STEPS_PER_SECOND,
    Reducer,
    is_chosen,
)
from ckptd.detect.signature import Signatures
from ckptd.format.timings import OPERATION, POSITIONS, ROOTED, STEP, SYNCHRONISING, Mask, Op, Rows

TABLE = {0: Communicator("w", tuple(range(8))), 1: Communicator("t", (0, 1), "tp"), 2: Communicator("p", (0, 4), "pp")}
SECOND = 1_000_000_000
NO_MARKS = np.zeros(0, STEP)


def operation(start_s: float, end_s: float, op: Op = Op.ALL_REDUCE, communicator: int = 0, seq: int = 1) -> tuple:
    peer = 4 if op in (Op.SEND, Op.RECV) else -1
    return communicator, op, peer, seq, 1 << 20, round(start_s * SECOND), round(end_s * SECOND)


def rows(*operations: tuple) -> Rows:
    return np.array(sorted(operations, key=lambda row: row[6]), OPERATION)


def marks(*ends_s: float, mask: int = 0) -> Rows:
    return np.array([(step, round(end * SECOND), mask) for step, end in enumerate(ends_s)], STEP)


def after(end_s: float) -> tuple:
    """What shows that a step which ended at ``end_s`` is over."""
    return operation(end_s + 0.001, end_s + 0.002)


def reduce(operations: Rows, step_marks: Rows) -> Rows:
    return Reducer().take(operations, step_marks, TABLE)[0]


def test_self_time_is_what_no_operation_covers_and_waits_go_by_kind() -> None:
    done = reduce(
        rows(
            operation(1.0, 3.0),
            operation(2.0, 4.0, Op.ALL_GATHER),
            operation(3.5, 5.0, Op.BROADCAST),
            operation(6.0, 6.5, Op.SEND, 2),
            operation(6.25, 7.0, Op.RECV, 2),
            after(10.0),
        ),
        marks(0.0, 10.0),
    )
    assert done["step"].tolist() == [1]
    assert done["length_s"][0] == 10.0
    assert done["self_s"][0] == 5.0
    assert done["waits_s"][0].tolist() == [3.0, 1.5, 1.0]


def test_what_spans_a_mark_counts_in_both_steps_by_its_overlap() -> None:
    done = reduce(rows(operation(0.5, 2.25), operation(2.5, 2.75), after(3.0)), marks(0.0, 1.0, 2.0, 3.0))
    assert done["self_s"].tolist() == [0.5, 0.0, 0.5]


def test_a_step_waits_for_operations_that_are_still_on_their_way() -> None:
    reducer = Reducer()
    assert len(reducer.take(rows(), marks(0.0, 1.0), TABLE)[0]) == 0
    assert len(reducer.take(rows(operation(0.5, 1.5)), NO_MARKS, TABLE)[0]) == 0
    done, samples = reducer.take(rows(after(1.5)), NO_MARKS, TABLE)
    assert done["self_s"].tolist() == [0.5]
    assert (samples["step"].tolist(), samples["duration_s"].tolist()) == ([1], [1.0])


def test_a_rank_that_communicates_no_more_is_not_waited_for() -> None:
    done = reduce(rows(), marks(*range(MOST_MARKS + 3)))
    assert done["step"].tolist() == [1, 2]
    assert done["self_s"].tolist() == [1.0, 1.0]


def test_masks_are_those_of_the_marks() -> None:
    assert reduce(rows(after(1.0)), marks(0.0, 1.0, mask=Mask.CHECKPOINT))["mask"].tolist() == [Mask.CHECKPOINT]


def test_steps_that_count_anew_begin_anew() -> None:
    step_marks = np.array([(7, 0, 0), (8, SECOND, 0), (3, 9 * SECOND, 0), (4, 11 * SECOND, 0)], STEP)
    done = reduce(rows(after(11.0)), step_marks)
    assert (done["step"].tolist(), done["length_s"].tolist()) == ([8, 4], [1.0, 2.0])


def test_an_unknown_communicator_and_an_unknown_kind_count_all_the_same() -> None:
    strange = operation(0.25, 0.5)
    done = reduce(rows((99, 200, *strange[2:]), after(1.0)), marks(0.0, 1.0))
    assert done["self_s"].tolist() == [0.75]
    assert done["waits_s"][0].tolist() == [0.0, 0.0, 0.0]


def test_more_operations_than_are_kept_make_the_step_incomplete() -> None:
    count = MOST_OPERATIONS + 10
    many = np.zeros(count, OPERATION)
    many["start_ns"] = np.arange(count) * 10 + 1
    many["end_ns"] = many["start_ns"] + 5
    reducer = Reducer()
    reducer.take(rows(after(-1.0)), np.array([(0, 0, 0)], STEP), TABLE)
    half = count // 2
    reducer.take(many[:half], NO_MARKS, TABLE)
    done, _ = reducer.take(many[half:], np.array([(1, count * 10 - 10, 0)], STEP), TABLE)
    assert (done["step"].tolist(), done["mask"].tolist()) == ([1], [Mask.INCOMPLETE])
    assert len(reducer._rows) <= MOST_OPERATIONS


intervals = st.lists(
    st.tuples(st.integers(0, 60), st.integers(0, 25), st.sampled_from(list(Op)), st.integers(0, 2)), max_size=25
)


@given(intervals, st.lists(st.integers(1, 20), min_size=1, max_size=4))
def test_reduced_steps_are_what_counting_tick_by_tick_gives(
    spans: list[tuple[int, int, Op, int]], lengths: list[int]
) -> None:
    ends = np.cumsum([0, *lengths]).tolist()
    done = reduce(rows(*(operation(s, s + d, op, c) for s, d, op, c in spans), after(100.0)), marks(*ends))
    assert done["step"].tolist() == list(range(1, len(ends)))
    for row, begin, end in zip(done, ends[:-1], ends[1:], strict=True):
        ticks = np.zeros((2, end - begin), bool)
        for s, d, op, _ in spans:
            inside = slice(max(0, s - begin), max(0, s + d - begin))
            ticks[0, inside] = True
            ticks[1, inside] |= op in SYNCHRONISING
        assert row["self_s"] == pytest.approx((~ticks[0]).sum())
        assert row["waits_s"][0] == pytest.approx(ticks[1].sum())
        assert row["gaps_s"].sum() == pytest.approx(row["self_s"])


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5), st.sampled_from(list(Op))), max_size=40),
    st.lists(st.integers(0, 41), max_size=6),
)
def test_batches_make_no_difference(spans: list[tuple[int, int, Op]], batches: list[int]) -> None:
    """Operations one after the other, and a mark every 20 seconds that comes with what had ended by then."""
    at, operations = 0, []
    for gap, length, op in spans:
        operations.append(operation(at + gap, at + gap + length, op))
        at += gap + length
    every = rows(*operations, after(at))
    step_marks = marks(*range(0, at + 1, 20))
    reducer, steps, samples, came = Reducer(), [], [], 0
    for part in np.split(every, sorted(batches)):
        until = max([came, *(np.searchsorted(step_marks["end_ns"], part["end_ns"], side="right"))])
        done = reducer.take(part, step_marks[came:until], TABLE)
        came = until
        steps.append(done[0])
        samples.append(done[1])
    whole = Reducer().take(every, step_marks, TABLE)
    assert np.concatenate(steps).tobytes() == whole[0].tobytes()
    assert np.concatenate(samples).tobytes() == whole[1].tobytes()


def test_gaps_lie_between_the_operation_entered_last_and_the_one_entered_next() -> None:
    done = reduce(
        rows(operation(1.0, 4.0), operation(2.0, 3.0, Op.ALL_GATHER, 1), operation(6.0, 7.0, Op.SEND, 2), after(10.0)),
        marks(0.0, 10.0),
    )
    expected = np.zeros(POSITIONS)
    names = ("8 ranks:all_reduce:<2^21B", "tp:all_gather:<2^21B", "pp:send:<2^21B")
    for name, seconds in (
        (f"step -> {names[0]}", 1.0),
        (f"{names[1]} -> {names[2]}", 2.0),
        (f"{names[2]} -> step", 3.0),
    ):
        expected[position(name)] += seconds
    assert done["gaps_s"][0].tolist() == expected.tolist()


def test_ranks_of_other_groups_agree_on_positions() -> None:
    operations = rows(operation(1.0, 4.0), operation(5.0, 5.5, Op.REDUCE_SCATTER, 1), after(10.0))
    elsewhere = {5: Communicator("x", tuple(range(8, 16))), 9: Communicator("y", (8, 9), "tp")}
    moved = operations.copy()
    moved["communicator"] = np.where(operations["communicator"] == 0, 5, 9)
    # Numbers of signatures are a rank's own: this one has seen others before.
    other = Reducer()
    other.take(rows(operation(-5.0, -4.0, Op.BARRIER, 1)), NO_MARKS, TABLE)
    here, _ = Reducer().take(operations, marks(0.0, 10.0), TABLE)
    there, _ = other.take(moved, marks(0.0, 10.0), elsewhere)
    assert here["gaps_s"].tolist() == there["gaps_s"].tolist()


def test_positions_do_not_depend_on_the_process() -> None:
    program = "from ckptd.detect.positions import position; print(position('step -> dp:all_reduce:<2^21B'))"
    seen = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert seen == {f"{position('step -> dp:all_reduce:<2^21B')}\n".encode()}


def test_positions_have_names() -> None:
    reducer = Reducer()
    reducer.take(rows(operation(1.0, 4.0), after(10.0)), marks(0.0, 10.0), TABLE)
    name = "8 ranks:all_reduce:<2^21B -> step"
    assert name in reducer.position_names[position(name)]
    assert len(reducer.position_names) == POSITIONS


def test_few_operations_are_all_sampled() -> None:
    operations = rows(*(operation(i, i + 0.5, seq=10 + i) for i in range(1, 1 + SAMPLES)), after(100.0))
    _, samples = Reducer().take(operations, marks(0.0, 50.0), TABLE)
    assert samples["seq"].tolist() == [10 + i for i in range(1, 1 + SAMPLES)]
    assert (samples["size_bytes"] == 1 << 20).all()


@given(st.integers(1, 400), st.integers(1, 10**6), st.integers(0, 2**32))
def test_members_sample_the_same_operations(count: int, first: int, seed: int) -> None:
    """Two kinds in turns, other times on each member, and another group besides on one of them."""
    random = np.random.default_rng(seed)

    def member(extra: int) -> set[tuple[int, int]]:
        ends = np.sort(random.uniform(1, 99, count + extra))
        operations = rows(
            *(
                operation(end - 0.01, end, (Op.ALL_GATHER, Op.REDUCE_SCATTER)[i % 2], 0, first + i)
                for i, end in enumerate(ends[:count])
            ),
            *(operation(end - 0.01, end, Op.SEND, 2, i) for i, end in enumerate(ends[count:])),
            after(100.0),
        )
        _, samples = Reducer().take(operations, marks(0.0, 100.0), TABLE)
        return {(int(row["op"]), int(row["seq"])) for row in samples if row["communicator"] == 0}

    assert member(0) == member(7)


@pytest.mark.parametrize("turns", [1, 2, 3, 4])
def test_no_kind_is_passed_over_where_kinds_take_turns(turns: int) -> None:
    kinds = [Op.ALL_REDUCE, Op.ALL_GATHER, Op.REDUCE_SCATTER, Op.BARRIER][:turns]
    for count in (16, 100, 300):
        sampled = np.zeros(turns)
        steps = 20
        for step in range(steps):
            operations = rows(*(operation(i, i, kinds[i % turns], 0, step * count + i + 1) for i in range(count)))
            chosen = operations[is_chosen(operations, np.zeros(count, np.int64))]
            sampled += [(chosen["op"] == kind).sum() for kind in kinds]
        wanted = steps * min(SAMPLES, count / turns)
        assert (sampled >= 0.4 * wanted).all()
        assert (sampled <= 1.5 * wanted).all()


def test_both_ends_of_a_pair_sample_the_same_messages() -> None:
    """The middle stage of a pipeline sends twice as much as the last, but to two peers."""
    middle = rows(
        *(operation(i, i + 0.5, Op.SEND, 2, i) for i in range(1, 41)),
        *((2, Op.SEND, 6, i, 1 << 20, i * SECOND, i * SECOND + 5) for i in range(1, 41)),
    )
    last = rows(*(operation(i, i + 0.5, Op.RECV, 2, i) for i in range(1, 41)))
    sent = middle[is_chosen(middle, np.zeros(80, np.int64)) & (middle["peer"] == 4)]
    assert sent["seq"].tolist() == last[is_chosen(last, np.zeros(40, np.int64))]["seq"].tolist()


def test_a_program_that_marks_no_steps_is_cut_where_it_repeats() -> None:
    program = [(Op.ALL_GATHER, 0), (Op.ALL_REDUCE, 1), (Op.SEND, 2), (Op.REDUCE_SCATTER, 0)]
    count = 400
    operations = rows(*(operation(i, i + 0.25, *program[i % 4], seq=i) for i in range(count)))
    reducer = Reducer()
    done = np.concatenate(
        [reducer.take(part, NO_MARKS, TABLE)[0] for part in np.split(operations, 7 * np.arange(1, 57))]
    )
    assert len(done) >= count // 4 - 3
    assert set(done["length_s"]) == {4.0}
    assert set(done["self_s"]) == {3.0}
    assert (done["mask"][20:] == 0).all()


def test_marks_take_over_from_what_was_found() -> None:
    reducer = Reducer()
    operations = rows(*(operation(i, i + 0.25, (Op.ALL_GATHER, Op.BARRIER)[i % 2]) for i in range(300)))
    found, _ = reducer.take(operations, NO_MARKS, TABLE)
    assert len(found) > 100
    done, _ = reducer.take(rows(after(303.0)), np.array([(1, 301 * SECOND, 0), (2, 303 * SECOND, 0)], STEP), TABLE)
    assert (done["step"].tolist(), done["length_s"].tolist()) == ([2], [2.0])


def test_rooted_operations_are_waited_in_but_synchronise_nobody() -> None:
    done = reduce(
        rows(*(operation(i, i + 0.5, op) for i, op in enumerate(sorted(ROOTED))), after(9.0)), marks(-1.0, 9.0)
    )
    assert done["waits_s"][0].tolist() == [0.0, 0.5 * len(ROOTED), 0.0]


def short_steps(step_s: float, count: int, per_step: int = 4, scale: float = 1.0) -> tuple[Rows, Rows]:
    """Operations one after the other, and marks that number the steps from 1."""
    at = np.arange(count * per_step)
    every = np.zeros(len(at), OPERATION)
    every["start_ns"] = (at + 0.25) * step_s / per_step * SECOND * scale
    every["end_ns"] = (at + 0.75) * step_s / per_step * SECOND * scale
    every["op"], every["seq"], every["peer"] = Op.ALL_REDUCE, at + 1, -1
    step_marks = np.zeros(count, STEP)
    step_marks["step"] = np.arange(1, count + 1)
    step_marks["end_ns"] = step_marks["step"] * step_s * SECOND * scale
    return every, step_marks


@pytest.mark.parametrize("batch", [7, 100, 1000])
@pytest.mark.parametrize(("step_s", "stride"), [(0.1, 1), (0.03125, 1), (0.01, 4), (0.001, 32)])
def test_of_short_steps_every_so_manieth_is_reduced_however_they_come(step_s: float, stride: int, batch: int) -> None:
    count, per_step = 1000, 4
    every, step_marks = short_steps(step_s, count, per_step)
    reducer, steps, samples = Reducer(), [], []
    for at in range(0, count, batch):
        done = reducer.take(every[at * per_step : (at + batch) * per_step], step_marks[at : at + batch], TABLE)
        steps.append(done[0])
        samples.append(done[1])
    found, sampled = np.concatenate(steps), np.concatenate(samples)
    late = found[found["step"] > RATE_STEPS + 1]
    assert (np.diff(late["step"]) == stride).all()
    assert (late["step"] % stride == 0).all()
    assert len(late) * step_s >= 0.9 * min(1.0, STEPS_PER_SECOND * step_s / 2) * (count * step_s - 1) / SECOND
    assert np.allclose(late["length_s"], step_s)
    assert np.allclose(late["self_s"], step_s / 2, rtol=1e-4)
    assert set(sampled["step"].tolist()) == set(found["step"].tolist())


def test_ranks_whose_clocks_differ_a_little_share_every_other_step_at_least() -> None:
    """31.9 and 32.1 steps a second: one power of two apart."""
    found = []
    for scale in (0.997, 1.003):
        every, step_marks = short_steps(0.03125, 500, scale=scale)
        found.append(set(Reducer().take(every, step_marks, TABLE)[0]["step"].tolist()))
    fewer, more = sorted(found, key=len)
    assert fewer - {step for step in fewer if step <= RATE_STEPS} < more
    assert len(fewer) > 200


def test_every_step_of_which_operations_were_dropped_is_incomplete() -> None:
    """More operations than are kept, and all the marks only after them."""
    per_step = MOST_OPERATIONS // 4
    every, step_marks = short_steps(10.0, 8, per_step)
    reducer = Reducer()
    reducer.take(rows(after(-1.0)), np.array([(0, 0, 0)], STEP), TABLE)
    reducer.take(every, NO_MARKS, TABLE)
    found, _ = reducer.take(rows(after(80.0)), step_marks, TABLE)
    assert found["step"].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert (found["mask"] == Mask.INCOMPLETE).tolist() == [True] * 5 + [False] * 3


def test_a_clock_that_goes_back_begins_anew() -> None:
    reducer = Reducer()
    first, _ = reducer.take(rows(after(12.0)), np.array([(1, 10 * SECOND, 0), (2, 12 * SECOND, 0)], STEP), TABLE)
    later = np.array([(3, 5 * SECOND, 0), (4, 6 * SECOND, 0), (5, 8 * SECOND, 0)], STEP)
    found, _ = reducer.take(rows(operation(5.25, 5.75), after(8.0)), later, TABLE)
    assert first["step"].tolist() == [2]
    assert (found["step"].tolist(), found["length_s"].tolist()) == ([4, 5], [1.0, 2.0])
    assert found["self_s"][0] == 0.5


def test_an_operation_across_thousands_of_steps_counts_in_each() -> None:
    count = 3000
    _, step_marks = short_steps(0.1, count)
    across = rows(*(operation(0.05, 0.1 * count - 0.05, communicator=c % 3) for c in range(100)), after(0.1 * count))
    found, _ = Reducer().take(across, step_marks, TABLE)
    assert found["step"].tolist() == list(range(2, count + 1))
    assert np.abs(found["self_s"][:-1]).max() == 0.0
    assert np.allclose(found["waits_s"][:-1, 0], 0.1)


def test_signatures_stay_few_whatever_sizes_are_sent() -> None:
    signatures = Signatures()
    for row in range(3000):
        signatures.number(
            rows(operation(0, 1, communicator=row)), {row: Communicator(str(row), (0, 1), f"group {row}")}
        )
    assert len(signatures.known) <= 1024
