"""One slot: a file in shared memory, mapped, with its header, payload and CRC table.

The daemon checksums behind the writer: a ``Slot`` knows how many blocks it has checksummed, and whoever has time (the
checksummer's threads, or the seal itself) brings it further under the slot's own lock.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import threading
import time
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from ckptd.arena.mapped import allocate, map_path, touch
from ckptd.errors import Corrupt, InvalidRequest
from ckptd.failpoints import failpoint
from ckptd.format.blocks import HEADER_BYTES, checksum_blocks, digest, find_corrupt_block
from ckptd.format.slot import (
    SlotHeader,
    SlotState,
    decode_header,
    encode_header,
    read_mark,
    read_state,
    write_mark,
    write_state,
)


class Slot:
    """A slot file. ``id`` is its file name; ``capacity_bytes`` its size. Fields change under the arena's lock only."""

    def __init__(self, path: Path, capacity_bytes: int) -> None:
        self.id = path.name
        self.path = path
        self.capacity_bytes = capacity_bytes
        self._bytes = map_path(path, capacity_bytes)
        self._view = self._bytes.data
        self.page = self._view[:HEADER_BYTES]
        self.header: SlotHeader | None = None
        self.state = SlotState.FREE
        self.generation = 0
        self.leases: set[int] = set()
        self._advance_lock = threading.Lock()
        self._checksummed = 0

    @classmethod
    def make(cls, path: Path, capacity_bytes: int) -> Slot:
        """A new file with all of its memory allocated (so that no write can end in SIGBUS); OSError when there is
        none, and nothing is left behind."""
        allocate(path, capacity_bytes)
        slot = cls(path, capacity_bytes)
        touch(slot._bytes)
        write_state(slot.page, SlotState.FREE)
        return slot

    # --- views ---------------------------------------------------------------------------------------------------
    @property
    def sealed_header(self) -> SlotHeader:
        if self.header is None:
            raise InvalidRequest(f"slot {self.id} holds nothing")
        return self.header

    @property
    def payload(self) -> memoryview:
        return self._view[HEADER_BYTES : HEADER_BYTES + self.sealed_header.layout.payload_bytes]

    @property
    def table(self) -> npt.NDArray[np.uint32]:
        layout = self.sealed_header.layout
        start = HEADER_BYTES + layout.payload_bytes
        return np.frombuffer(self._view, "<u4", layout.blocks, start)

    @property
    def index(self) -> memoryview:
        return self.payload[: self.sealed_header.layout.index_bytes]

    # --- life ----------------------------------------------------------------------------------------------------
    def begin(self, header: SlotHeader) -> None:
        """Make the slot WRITING for ``header``; its layout must fit."""
        with self._advance_lock:
            self.generation += 1
            self.header = replace(header, generation=self.generation)
            self.state = SlotState.WRITING
            self._checksummed = 0
            write_mark(self.page, 0)
            self._write_header(table_digest=0)
            write_state(self.page, SlotState.WRITING)

    def advance(self, max_blocks: int = 1 << 30) -> bool:
        """Checksum what the writer has finished, at most ``max_blocks``. True when there was something to do."""
        with self._advance_lock:
            if self.state is not SlotState.WRITING or self.header is None:
                return False
            layout = self.header.layout
            written = min(read_mark(self.page), layout.payload_bytes) // layout.block_bytes
            last = min(written, self._checksummed + max_blocks)
            if last <= self._checksummed:
                return False
            checksum_blocks(self.payload, layout.block_bytes, self._checksummed, last, self.table)
            self._checksummed = last
            return True

    def seal(self, index_crc: int, sealed_at_s: float | None = None) -> SlotHeader:
        """Checksum the rest, write the table's digest, flip WRITING to SEALED last. Idempotent. ``sealed_at_s`` (Unix
        time) is now, unless the slot is a copy of one that was sealed elsewhere.

        Corrupt when the payload is not complete or the index is not the one the writer meant; the slot stays WRITING.
        """
        if self.state is SlotState.SEALED:
            return self.sealed_header
        failpoint("seal.before_checksum")
        self.advance()
        with self._advance_lock:
            header = self.sealed_header
            if self.state is SlotState.FREE:
                raise InvalidRequest(f"slot {self.id} was taken back: its step is dead")
            if self._checksummed < header.layout.blocks:
                raise Corrupt(
                    f"{self.id}: sealed with {self._checksummed} of {header.layout.blocks} blocks written",
                    "the writer must publish the whole payload before seal",
                )
            found = crc32c(self.index)
            if found != index_crc:
                raise Corrupt(f"{self.id}: index does not match the writer's CRC-32C")
            failpoint("seal.before_table")
            self.header = replace(header, index_crc=index_crc, sealed_at_s=sealed_at_s or time.time())
            self._write_header(digest(self.table))
            failpoint("seal.before_flip")
            write_state(self.page, SlotState.SEALED)
            self.state = SlotState.SEALED
            failpoint("seal.after_flip")
            return self.header

    def free(self) -> None:
        with self._advance_lock:
            write_state(self.page, SlotState.FREE)
            self.state = SlotState.FREE

    def adopt(self) -> None:
        """Take state and header from the file, as a daemon before this one left them; Corrupt when they do not hold."""
        state = read_state(self.page)
        if state is None:
            raise Corrupt(f"{self.id}: header: unknown state")
        if state is not SlotState.FREE:
            self.header, table_digest = decode_header(self.page, self.id)
            if self.header.layout.slot_bytes > self.capacity_bytes:
                raise Corrupt(f"{self.id}: header: larger than its file")
            self.generation = self.header.generation
            if state is SlotState.SEALED and digest(self.table) != table_digest:
                raise Corrupt(f"{self.id}: CRC table does not match its digest")
        self.state = state

    def check(self, pool: Executor, parts: int = 2) -> None:
        """Read every byte of a sealed slot against its checksums, on ``parts`` threads; Corrupt names the region."""
        header, table_digest = decode_header(self.page, self.id)
        if digest(self.table) != table_digest:
            raise Corrupt(f"{self.id}: CRC table does not match its digest")
        layout = header.layout
        bounds = np.linspace(0, layout.blocks, parts + 1).astype(int).tolist()
        found = pool.map(
            lambda span: find_corrupt_block(self.payload, layout.block_bytes, self.table, *span),
            itertools.pairwise(bounds),
        )
        block = next((b for b in found if b is not None), None)
        if block is not None:
            raise Corrupt(f"{self.id}: {self.region_of(block)}: block {block} does not match its CRC-32C")

    def region_of(self, block: int) -> str:
        """ "index" or the dtype of the segment that ``block`` belongs to."""
        layout = self.sealed_header.layout
        name = "index"
        for part, offset, _ in layout.parts():
            if offset <= block * layout.block_bytes:
                name = part
        return name

    def is_mapped_by_a_client(self) -> bool:
        """True while a client holds its shared lock on the file (POSIX record lock: ends with the client's process)."""
        fd = os.open(self.path, os.O_RDWR)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        else:
            return False
        finally:
            os.close(fd)

    def _write_header(self, table_digest: int) -> None:
        encoded = encode_header(self.sealed_header, table_digest)
        self.page[: len(encoded)] = encoded
