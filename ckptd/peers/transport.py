"""How blocks come from another daemon: a seam of one method, and its implementation over gRPC streams."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from ckptd.errors import Corrupt
from ckptd.model import SnapshotId
from ckptd.peers.channels import Channels
from ckptd.peers.shelf import Blocks, Shelf
from ckptd_api.convert import snapshot_to_pb
from ckptd_api.raw import decode, encode
from ckptd_api.v1 import peers_pb2 as pb

_CRCS, _DATA = 1, 2
MESSAGE_BYTES: Final = 1 << 20


def batch_blocks(block_bytes: int) -> int:
    """Blocks in a message: as many as make ``MESSAGE_BYTES``, at least one."""
    return max(1, MESSAGE_BYTES // block_bytes)


@dataclass(frozen=True, slots=True)
class Piece:
    """Something made of blocks that a daemon holds: an image (``ranks``), or a parity fragment (``group``, ``stripe``,
    ``row``)."""

    run: str
    snapshot: SnapshotId
    ranks: tuple[int, ...] = ()
    group: int = 0
    stripe: int = 0
    row: int = 0


class Transport(Protocol):
    """Moves blocks between daemons.

    ``pull`` yields ``blocks`` blocks of ``piece`` from ``first`` on, in order, ``batch`` at a time (fewer at the end),
    from the daemon at ``address``. It may end early in a CkptdError, retryable or not, at any block: nothing is retried
    inside, the caller asks again from where it was. What was yielded is valid until the next is asked for. Checksums
    are passed on, not checked. Safe to call from any thread; closing the iterator ends the transfer.
    """

    def pull(
        self, address: str, piece: Piece, first: int, blocks: int, batch: int
    ) -> Generator[Blocks, None, None]: ...


class GrpcTransport:
    """PeerService.Pull; a daemon that sends nothing for ``silence_s`` ends the stream in DaemonUnreachable."""

    def __init__(self, channels: Channels, silence_s: float) -> None:
        self._channels = channels
        self._silence_s = silence_s

    def pull(self, address: str, piece: Piece, first: int, blocks: int, batch: int) -> Generator[Blocks, None, None]:
        request = pb.PullRequest(
            run=piece.run,
            snapshot=snapshot_to_pb(piece.snapshot),
            first_block=first,
            blocks=blocks,
            batch_blocks=batch,
        )
        if piece.ranks:
            request.image.ranks.extend(piece.ranks)
        else:
            fragment = pb.Fragment(stripe=piece.stripe, row=piece.row)
            request.parity.CopyFrom(pb.ParityRange(group=piece.group, fragment=fragment))
        for message in self._channels.peer(address).pull(request, self._silence_s):
            yield decode_blocks(message, address)


class LocalTransport:
    """This node's own arena, where a piece happens to be held here: no socket in between. ``address`` is not used."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf

    def pull(self, address: str, piece: Piece, first: int, blocks: int, batch: int) -> Generator[Blocks, None, None]:
        if piece.ranks:
            return self._shelf.read_image(piece.run, piece.snapshot, piece.ranks, first, blocks, batch)
        return self._shelf.read_parity(
            piece.run, piece.snapshot, piece.group, piece.stripe, piece.row, first, blocks, batch
        )


def encode_blocks(blocks: Blocks) -> bytes:
    """A PullResponse."""
    return encode({_CRCS: np.ascontiguousarray(blocks.crcs, "<u4").tobytes(), _DATA: blocks.data})


def decode_blocks(message: bytes, where: str) -> Blocks:
    """The inverse; Corrupt when ``message``, from the daemon at ``where``, is no PullResponse."""
    try:
        fields = decode(message)
        return Blocks(np.frombuffer(fields.data(_CRCS), "<u4"), fields.data(_DATA))
    except ValueError as error:
        raise Corrupt(f"the daemon at {where} sent what is no PullResponse: {error}") from error
