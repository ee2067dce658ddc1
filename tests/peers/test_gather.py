"""Gathering blocks from transports made up here: in step, checked, short images as zeros, failures by source."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field

import numpy as np
import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from ckptd.errors import DaemonUnreachable
from ckptd.memory import Bytes
from ckptd.model import Incarnation, SnapshotId
from ckptd.peers.gather import Source, SourceFailed, gather
from ckptd.peers.rate import TokenBucket
from ckptd.peers.shelf import Blocks
from ckptd.peers.transport import Piece

SIZE = 64
UNLIMITED = TokenBucket(0)
PIECE = Piece("gathered", SnapshotId(Incarnation(1, 7), 3), (0,))


def blocks_of(data: bytes) -> Blocks:
    crcs = [crc32c(data[at : at + SIZE]) for at in range(0, len(data), SIZE)]
    return Blocks(np.array(crcs, np.uint32), memoryview(data))


@dataclass
class Held:
    """A transport that serves ``data``; ``spoil(batch number, blocks)`` may change what it sends, or raise."""

    data: bytes
    spoil: Callable[[int, Blocks], Blocks | None] = lambda _number, blocks: blocks
    asked: list[tuple[int, int, int]] = field(default_factory=list)
    closed: int = 0

    def pull(self, address: str, piece: Piece, first: int, blocks: int, batch: int) -> Generator[Blocks, None, None]:
        self.asked.append((first, blocks, batch))
        try:
            for number, at in enumerate(range(first, first + blocks, batch)):
                count = min(batch, first + blocks - at)
                sent = self.spoil(number, blocks_of(self.data[at * SIZE : (at + count) * SIZE]))
                if sent is None:
                    return
                yield sent
        finally:
            self.closed += 1


def source(transport: Held, first: int = 0, blocks: int | None = None, name: str = "node x") -> Source:
    there = len(transport.data) // SIZE - first if blocks is None else blocks
    return Source(transport, "there", name, PIECE, first, there)


def random_bytes(blocks: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(blocks * SIZE)


def joined(sources: list[Source | None], first: int, blocks: int, batch: int) -> list[bytes]:
    """What came of each source, in one piece."""
    columns: list[list[bytes]] = [[] for _ in sources]
    expected = first
    for at, count, parts in gather(sources, first, blocks, batch, SIZE, UNLIMITED):
        assert at == expected
        expected += count
        for column, part in zip(columns, parts, strict=True):
            assert part is None or len(part) == count * SIZE
            column.append(bytes(count * SIZE) if part is None else bytes(part))
    assert expected == first + blocks
    return [b"".join(column) for column in columns]


def test_pieces_come_side_by_side_batch_by_batch() -> None:
    held = [Held(random_bytes(10, seed)) for seed in range(3)]
    assert joined([source(h) for h in held], 0, 10, 4) == [h.data for h in held]
    assert [h.asked for h in held] == [[(0, 10, 4)]] * 3
    assert [h.closed for h in held] == [1, 1, 1]


def test_an_image_that_ends_earlier_is_continued_by_zeros_that_nobody_sends() -> None:
    long, short, empty = Held(random_bytes(9)), Held(random_bytes(5)), Held(b"")
    sources = [source(long), source(short), source(empty), None]
    found = list(gather(sources, 0, 9, 4, SIZE, UNLIMITED))
    assert [at for at, _, _ in found] == [0, 4, 8]
    assert joined(sources, 0, 9, 4) == [long.data, short.data + bytes(4 * SIZE), bytes(9 * SIZE), bytes(9 * SIZE)]
    assert found[2][2][1] is None  # beyond its end
    assert {asked[:2] for asked in short.asked} == {(0, 5)}
    assert empty.asked == []


def test_a_piece_begins_where_its_source_says() -> None:
    held = Held(random_bytes(20))
    assert joined([source(held, first=12, blocks=8)], 3, 5, 2) == [held.data[15 * SIZE :]]
    assert held.asked == [(15, 5, 2)]


@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=5),
    first=st.integers(0, 6),
    blocks=st.integers(1, 12),
    batch=st.integers(1, 5),
)
def test_any_range_of_any_images_is_what_they_hold_and_zeros(
    lengths: list[int], first: int, blocks: int, batch: int
) -> None:
    held = [Held(random_bytes(length, seed)) for seed, length in enumerate(lengths)]
    padded = [h.data.ljust((first + blocks) * SIZE, b"\0") for h in held]
    wanted = [data[first * SIZE : (first + blocks) * SIZE] for data in padded]
    assert joined([source(h) for h in held], first, blocks, batch) == wanted


def flip(data: Bytes | memoryview, at: int) -> memoryview:
    spoiled = bytearray(data)
    spoiled[at] ^= 16
    return memoryview(bytes(spoiled))


SPOILED: dict[str, Callable[[int, Blocks], Blocks | None]] = {
    "a flipped bit": lambda n, b: Blocks(b.crcs, flip(b.data, 70)) if n == 1 else b,
    "another block's checksum": lambda n, b: Blocks(b.crcs[::-1].copy(), b.data) if n == 1 else b,
    "too few blocks": lambda n, b: Blocks(b.crcs[:1], b.data[:SIZE]) if n == 1 else b,
    "too many blocks": lambda n, b: Blocks(np.tile(b.crcs, 2), memoryview(bytes(b.data) * 2)) if n == 1 else b,
    "a block cut short": lambda n, b: Blocks(b.crcs, b.data[:-1]) if n == 1 else b,
    "checksums alone": lambda n, b: Blocks(b.crcs, b.data[:0]) if n == 1 else b,
    "an early end": lambda n, b: None if n == 1 else b,
    "nothing": lambda _n, _b: None,
}


@pytest.mark.parametrize("how", SPOILED)
def test_what_is_not_the_blocks_that_were_asked_for_is_never_seen(how: str) -> None:
    good, bad = Held(random_bytes(9)), Held(random_bytes(9, 1), SPOILED[how])
    culprit = source(bad, name="node bad")
    stream = gather([source(good), culprit], 0, 9, 3, SIZE, UNLIMITED)
    seen: list[tuple[int, list[bytes]]] = []

    def read() -> None:
        seen.extend((at, [bytes(column) for column in columns if column is not None]) for at, _, columns in stream)

    with pytest.raises(SourceFailed, match="node bad: it sent") as caught:
        read()
    assert caught.value.source == culprit
    wanted = [] if how == "nothing" else [(0, [good.data[: 3 * SIZE], bad.data[: 3 * SIZE]])]
    assert seen == wanted
    assert good.closed == bad.closed == 1


def test_a_source_that_cannot_be_reached_is_named_and_the_other_streams_are_closed() -> None:
    def break_off(number: int, blocks: Blocks) -> Blocks:
        if number == 1:
            raise DaemonUnreachable("no daemon answers at there", "start one")
        return blocks

    good, bad = Held(random_bytes(9)), Held(random_bytes(9), break_off)
    culprit = source(bad)
    with pytest.raises(SourceFailed) as caught:
        list(gather([source(good), culprit], 0, 9, 3, SIZE, UNLIMITED))
    assert (caught.value.source, caught.value.message) == (culprit, "node x: no daemon answers at there")
    assert isinstance(caught.value.__cause__, DaemonUnreachable)
    assert good.closed == 1


def test_a_reader_that_stops_closes_every_stream() -> None:
    held = [Held(random_bytes(9, seed)) for seed in range(3)]
    stream = gather([source(h) for h in held], 0, 9, 2, SIZE, UNLIMITED)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert [h.closed for h in held] == [1, 1, 1]


def test_only_bytes_that_are_sent_count_against_the_rate() -> None:
    taken = []

    class Counting(TokenBucket):
        def take(self, size_bytes: int) -> None:
            taken.append(size_bytes)

    held = Held(random_bytes(5))
    list(gather([source(held), None, source(Held(b""))], 0, 8, 4, SIZE, Counting(1)))
    assert taken == [4 * SIZE, 1 * SIZE]
