"""Reading an array with its checks: while zarrs reads the next window, another thread checks the blocks of the last.

Layer: tiers. Invariants: without a target two windows are held, no more; every block is either checked or named in a
problem.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import zarr

from ckptd.errors import Corrupt
from ckptd.format.blocks import Buffer, find_corrupt_block
from ckptd.tiers.arrays import StoredArray
from ckptd.tiers.tier import Progress

MAX_NAMED_BLOCKS: Final = 8
TARGET_CHUNKS: Final = 4  # per call into zarrs, which decodes straight into the target
SCRATCH_CHUNKS: Final = 2


def read_checked(
    stored: StoredArray,
    target: memoryview | None,
    table: npt.NDArray[np.uint32],
    block_bytes: int,
    on_progress: Progress,
) -> list[str]:
    """Read the whole array, into ``target`` or, with None, only to check it. Every problem found, a line each.

    Args:
        target: ``stored.size_bytes`` writable bytes.
        table: the CRCs of the array's blocks.
    """
    array = stored.open()
    window = max(1, stored.chunk_bytes * (SCRATCH_CHUNKS if target is None else TARGET_CHUNKS))
    scratch = [] if target is not None else [memoryview(bytearray(min(window, stored.size_bytes))) for _ in range(2)]
    problems: list[str] = []
    corrupt: list[int] = []
    with ThreadPoolExecutor(1, thread_name_prefix="ckptd-check") as pool:
        last: Future[list[int]] | None = None
        for turn, start in enumerate(range(0, stored.size_bytes, window)):
            end = min(start + window, stored.size_bytes)
            view = target[start:end] if target is not None else scratch[turn % 2][: end - start]
            parts = _read_window(stored, array, start, view, problems)
            if last is not None:
                corrupt += last.result()
            last = pool.submit(_check, parts, block_bytes, table)
            on_progress(end - start)
        if last is not None:
            corrupt += last.result()
    return problems + _name_blocks(stored.what, corrupt)


def _read_window(
    stored: StoredArray, array: zarr.Array[Any], start: int, view: memoryview, problems: list[str]
) -> list[tuple[int, Buffer]]:
    """The parts of the window that could be read, with their offsets. A failed window is read again chunk by chunk, to
    name the ones that are broken."""
    try:
        stored.read(array, start, view)
        return [(start, view)]
    except Corrupt:
        parts: list[tuple[int, Buffer]] = []
        for offset in range(0, len(view), stored.chunk_bytes):
            part = view[offset : offset + stored.chunk_bytes]
            try:
                stored.read(array, start + offset, part)
                parts.append((start + offset, part))
            except Corrupt as error:
                chunk = (start + offset) // stored.chunk_bytes
                problems.append(f"{stored.what}: chunk {chunk} cannot be decoded: {error.message}")
        return parts


def _check(parts: list[tuple[int, Buffer]], block_bytes: int, table: npt.NDArray[np.uint32]) -> list[int]:
    """The corrupt blocks of some parts of an array, each of which begins on a block boundary."""
    corrupt = []
    for offset, data in parts:
        first, count = offset // block_bytes, -(-len(data) // block_bytes)
        crcs = table[first : first + count]
        block = find_corrupt_block(data, block_bytes, crcs)
        while block is not None:
            corrupt.append(first + block)
            block = find_corrupt_block(data, block_bytes, crcs, block + 1)
    return corrupt


def _name_blocks(what: str, corrupt: list[int]) -> list[str]:
    lines = [f"{what}: block {block} does not match its CRC-32C" for block in corrupt[:MAX_NAMED_BLOCKS]]
    if len(corrupt) > MAX_NAMED_BLOCKS:
        lines.append(f"{what}: {len(corrupt) - MAX_NAMED_BLOCKS} more blocks do not match")
    return lines
