"""Parts made at once: told from the front, all ended by the first error."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.peers.side_by_side import side_by_side


def part(size: int, made: list[int], number: int) -> Callable[[], Iterator[int]]:
    def steps() -> Iterator[int]:
        for amount in range(1, size + 1):
            made[number] = amount
            yield amount

    return steps


@given(st.lists(st.integers(1, 9), max_size=8))
def test_what_is_told_rises_has_no_hole_and_ends_with_the_whole(sizes: list[int]) -> None:
    made = [0] * len(sizes)
    told: list[int] = []

    def progressed(amount: int) -> None:
        whole = next((i for i, size in enumerate(sizes) if made[i] < size), len(sizes))
        assert amount <= sum(sizes[:whole]) + (made[whole] if whole < len(sizes) else 0)
        told.append(amount)

    side_by_side([part(size, made, i) for i, size in enumerate(sizes)], sizes, progressed)
    assert made == sizes
    assert told == sorted(set(told))
    assert not sizes or told[-1] == sum(sizes)


def test_the_first_error_ends_the_others_and_is_raised() -> None:
    def fails() -> Iterator[int]:
        yield 1
        raise ValueError("no")

    def endless() -> Iterator[int]:
        while True:
            yield 1

    with pytest.raises(ValueError, match="no"):
        side_by_side([endless, fails, endless], [9, 9, 9], lambda _amount: None)
