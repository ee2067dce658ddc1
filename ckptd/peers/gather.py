"""The same blocks of several pieces, side by side: what encoding and reconstruction read.

Layer: ``peers``. Invariants: every block is checked against the CRC it came with before anybody sees it; memory is
one batch a piece; pieces are read in step, so the slowest decides. Nothing is retried here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass

import numpy as np

from ckptd.erasure.holdings import Holder
from ckptd.errors import CkptdError, Corrupt
from ckptd.format.blocks import find_corrupt_block
from ckptd.memory import Bytes
from ckptd.peers.rate import TokenBucket
from ckptd.peers.shelf import Blocks
from ckptd.peers.transport import Piece, Transport


@dataclass(frozen=True, slots=True)
class Source:
    """Where one fragment of a stripe comes from.

    Attributes:
        transport: what fetches it.
        address: the daemon that holds it.
        name: what to call it in messages.
        piece: what it is part of.
        first: block of ``piece`` at which the fragment begins.
        blocks: blocks that are there; beyond them the fragment is zeros, and zeros are not sent.
    """

    transport: Transport
    address: str
    name: str
    piece: Piece
    first: int
    blocks: int


def name_of(holder: Holder) -> str:
    """What to call a daemon in messages."""
    return f"node {holder.node_id} at {holder.address or 'this daemon'}"


def source_from(transport: Transport, holder: Holder, piece: Piece, first: int, blocks: int) -> Source:
    """``blocks`` blocks of ``piece`` from ``first`` on, of what ``holder`` has."""
    return Source(transport, holder.address, name_of(holder), piece, first, blocks)


class SourceFailed(CkptdError):
    """A source could not be read, or sent what does not match its checksums; ``source`` tells which it was."""

    grpc_code = "DATA_LOSS"

    def __init__(self, message: str, hint: str | None = None, source: Source | None = None) -> None:
        super().__init__(message, hint)
        self.source = source


def gather(
    sources: Sequence[Source | None], first: int, blocks: int, batch: int, block_bytes: int, bucket: TokenBucket
) -> Iterator[tuple[int, int, list[Bytes | None]]]:
    """(first block, number of blocks, bytes of each source) for blocks ``first .. first + blocks - 1``, ``batch`` at a
    time. None stands for zeros. The bytes are valid until the next are asked for.

    Raises:
        SourceFailed: a source cannot be read, or a block does not match its CRC.
    """
    with ExitStack() as stack:
        readers = [_open(source, first, blocks, batch, stack) for source in sources]
        padded = [np.zeros(0, np.uint8)] * len(sources)
        for at in range(first, first + blocks, batch):
            count = min(batch, first + blocks - at)
            columns: list[Bytes | None] = []
            due = [_there(source, at, count) for source in sources]
            bucket.take(sum(due) * block_bytes)
            for number, (source, reader, there) in enumerate(zip(sources, readers, due, strict=True)):
                if source is None or reader is None or not there:
                    columns.append(None)
                    continue
                data = _read(source, reader, there, block_bytes)
                if there < count:
                    padded[number] = np.zeros(count * block_bytes, np.uint8)
                    padded[number][: len(data)] = data
                    data = padded[number]
                columns.append(data)
            yield at, count, columns


def _there(source: Source | None, at: int, count: int) -> int:
    return max(0, min(count, source.blocks - at)) if source else 0


def _open(
    source: Source | None, first: int, blocks: int, batch: int, stack: ExitStack
) -> Callable[[], Blocks | None] | None:
    there = _there(source, first, blocks)
    if source is None or not there:
        return None
    stream = source.transport.pull(source.address, source.piece, source.first + first, there, batch)
    stack.enter_context(closing(stream))
    return lambda: next(stream, None)


def _read(source: Source, reader: Callable[[], Blocks | None], wanted: int, block_bytes: int) -> Bytes:
    try:
        return _checked(reader(), wanted, block_bytes)
    except CkptdError as error:
        raise SourceFailed(f"{source.name}: {error.message}", error.hint, source) from error


def _checked(blocks: Blocks | None, wanted: int, block_bytes: int) -> Bytes:
    if blocks is None or len(blocks.crcs) != wanted or len(blocks.data) != wanted * block_bytes:
        raise Corrupt("it sent other blocks than were asked for")
    if find_corrupt_block(blocks.data, block_bytes, blocks.crcs) is not None:
        raise Corrupt("it sent a block that does not match its CRC-32C")
    return np.frombuffer(blocks.data, np.uint8)
