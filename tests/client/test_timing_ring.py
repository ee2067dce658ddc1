"""The ring: every row that was written is delivered whole, in order and once, or counted as dropped."""

from __future__ import annotations

import threading

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ckptd.format.timings import OPERATION, STEP, unpack
from ckptd_client.timing.ring import Ring


def numbers(data: bytes) -> list[int]:
    rows = unpack(data, STEP, "rows", 1 << 20)
    assert (rows["end_ns"] == rows["step"] * 2).all()
    assert (rows["mask"] == rows["step"] % 7).all()
    return rows["step"].tolist()


def write(ring: Ring, number: int) -> None:
    ring.write(number, number * 2, number % 7)


@given(
    size=st.integers(1, 9),
    moves=st.lists(st.tuples(st.sampled_from(["write", "peek", "commit"]), st.integers(1, 12)), max_size=40),
)
def test_a_row_is_delivered_in_order_or_counted(size: int, moves: list[tuple[str, int]]) -> None:
    ring, written, delivered = Ring(STEP, size), 0, list[int]()
    shown, end = list[int](), 0
    for move, count in [*moves, ("peek", 1 << 20), ("commit", 0)]:
        if move == "write":
            for _ in range(count):
                write(ring, written)
                written += 1
        elif move == "peek":
            data, end = ring.peek(count)
            shown = numbers(data)
            assert len(shown) <= min(count, size)
            assert shown == list(range(end - len(shown), end))
        else:
            delivered += [number for number in shown if not delivered or number > delivered[-1]]
            ring.commit(end)
            shown = []
    assert delivered == sorted(set(delivered))
    assert len(delivered) + ring.dropped == written


@given(size=st.integers(1, 50), count=st.integers(0, 200))
def test_the_newest_rows_survive(size: int, count: int) -> None:
    ring = Ring(STEP, size)
    for number in range(count):
        write(ring, number)
    assert ring.dropped == max(0, count - size)
    assert numbers(ring.peek(1000)[0]) == list(range(max(0, count - size), count))
    assert ring.dropped == max(0, count - size)


def test_what_was_not_committed_is_shown_again() -> None:
    ring = Ring(STEP, 10)
    write(ring, 1)
    first, _ = ring.peek(10)
    write(ring, 2)
    again, end = ring.peek(10)
    assert (numbers(first), numbers(again)) == ([1], [1, 2])
    ring.commit(end)
    assert ring.peek(10) == (b"", end)


def test_every_field_of_an_operation_comes_back_at_its_limits() -> None:
    ring = Ring(OPERATION, 2)
    values = ((1 << 32) - 1, 255, -1, (1 << 64) - 1, (1 << 64) - 1, -1, (1 << 63) - 1)
    ring.write(*values)
    rows = np.frombuffer(ring.peek(2)[0], OPERATION)
    assert tuple(rows[0].tolist()) == values


def test_threads_write_whole_rows_and_none_is_lost() -> None:
    ring, each = Ring(STEP, 10_000), 1000

    def run(first: int) -> None:
        for number in range(first, first + each):
            write(ring, number)

    threads = [threading.Thread(target=run, args=(each * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers(ring.peek(10_000)[0])) == list(range(4 * each))
