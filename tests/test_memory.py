"""Mapped files: aligned, shared or private as asked, and alive as long as a view of them."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd.memory import HUGE_BYTES, collapse, keep_from_forks, map_file, populate


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "memory", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 3 * HUGE_BYTES + 4096)
    yield fd
    os.close(fd)


def mapped_bytes(size_bytes: int) -> int:
    """How many mappings of this process are that large."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = (tuple(int(end, 16) for end in line.split()[0].split("-")) for line in lines)
    return sum(stop - start == size_bytes for start, stop in ranges)


def test_a_mapping_is_aligned_to_huge_pages_and_shared(file: int) -> None:
    one, other = map_file(file, 3 * HUGE_BYTES), map_file(file, 3 * HUGE_BYTES)
    for advise in (populate, collapse, keep_from_forks):
        advise(one)
    assert one.ctypes.data % HUGE_BYTES == 0
    one[5] = 7
    assert other[5] == 7
    assert os.pread(file, 1, 5) == b"\x07"


def test_what_is_written_to_a_private_mapping_stays_there(file: int) -> None:
    private = map_file(file, HUGE_BYTES, is_private=True)
    private[0] = 9
    assert os.pread(file, 1, 0) == b"\x00"


def test_a_mapping_goes_with_its_last_view(file: int) -> None:
    size = 3 * HUGE_BYTES + 4096
    before = mapped_bytes(size)
    view = map_file(file, size)[10:20]
    gc.collect()
    view[0] = 1
    assert mapped_bytes(size) == before + 1
    del view
    gc.collect()
    assert mapped_bytes(size) == before


def test_what_cannot_be_mapped_is_an_os_error(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(OSError, match="cannot map"):
        map_file(fd, HUGE_BYTES)
    os.close(fd)
