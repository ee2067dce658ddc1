"""The last operations of a rank are read when its process is gone, also by what did not see it end."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.format.timings import BLACK_BOX_ROWS, Op
from ckptd.serve.diagnosis.black_box import BlackBox as Kept
from ckptd_client.timing.black_box import BlackBox


def share(box: BlackBox, kept: Kept) -> None:
    box.move_to(kept.descriptor())


def write(box: BlackBox, first: int, count: int) -> None:
    for seq in range(first, first + count):
        box.write(seq % 3, Op.ALL_REDUCE, seq, seq * 10)


def numbers(kept: Kept) -> list[int]:
    rows = kept.read()
    assert (rows["communicator"] == rows["seq"] % 3).all()
    assert (rows["op"] == Op.ALL_REDUCE).all()
    assert (rows["size_bytes"] == rows["seq"] * 10).all()
    return rows["seq"].tolist()


def in_child(action: Callable[[], object]) -> int:
    """The signal that ended a forked child after ``action``."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@given(before=st.integers(0, 2 * BLACK_BOX_ROWS), after=st.integers(0, 2 * BLACK_BOX_ROWS))
def test_the_newest_are_kept_in_order_whether_written_before_or_after_they_are_shared(before: int, after: int) -> None:
    box, kept = BlackBox(), Kept()
    write(box, 1, before)
    share(box, kept)
    write(box, 1 + before, after)
    total = before + after
    assert numbers(kept) == list(range(max(0, total - BLACK_BOX_ROWS) + 1, total + 1))


def test_what_a_killed_process_wrote_is_there() -> None:
    kept = Kept()

    def enter() -> None:
        box = BlackBox()
        share(box, kept)
        write(box, 1, 5)

    assert in_child(enter) == -signal.SIGKILL
    assert numbers(kept) == [1, 2, 3, 4, 5]


def test_a_forked_child_does_not_write_to_its_parents() -> None:
    box, kept = BlackBox(), Kept()
    share(box, kept)
    write(box, 1, 2)
    assert in_child(lambda: write(box, 100, 50)) == -signal.SIGKILL
    write(box, 3, 1)
    assert numbers(kept) == [1, 2, 3]


def test_a_rank_can_neither_shrink_nor_grow_what_its_daemon_reads() -> None:
    kept = Kept()
    fd = kept.descriptor()
    for size_bytes in (0, 1 << 30):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size_bytes)
    os.close(fd)
    assert numbers(kept) == []
