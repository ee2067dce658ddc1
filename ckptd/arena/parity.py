"""Parity fragments of an arena: files in shared memory beside the slots, within the same budget.

Invariants: a file is reused only when it is FREE and under no lease, and a WRITING one is given back only by whoever
began it (or with its whole run); SEALED is written last, so a fragment is there whole or not at all; all fields change
under the arena's lock. New files are made on the caller's thread, outside the lock: the first touch of shared memory
is slow and slots must not wait for it.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Collection, Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from ckptd.arena.mapped import allocate, map_path, touch
from ckptd.arena.room import Holding, Order
from ckptd.errors import Corrupt, FormatTooNew, InvalidRequest, NoSlot
from ckptd.failpoints import failpoint
from ckptd.format.blocks import HEADER_BYTES, digest, find_corrupt_block
from ckptd.format.parity import ParityHeader, decode_header, encode_header, file_bytes
from ckptd.format.slot import SlotState, read_state, write_state
from ckptd.memory import Bytes
from ckptd.model import SnapshotId

if TYPE_CHECKING:
    from ckptd.arena.arena import Arena
    from ckptd.arena.slot import Slot

SUFFIX: Final = ".parity"
_MOST_OVERSIZE: Final = 2  # a file is reused for what needs at least half of it


class ParityFile:
    """One file of parity. ``id`` is its name; ``run`` whose it is (or was last); ``use`` counts its uses, so that a
    reader can tell that it was reused; ``leases`` counts its readers."""

    def __init__(self, path: Path, capacity_bytes: int, lock: threading.RLock) -> None:
        self.id = path.name
        self.path = path
        self.capacity_bytes = capacity_bytes
        self._bytes = map_path(path, capacity_bytes)
        self._lock = lock
        self._view = self._bytes.data
        self.header: ParityHeader | None = None
        self.state = SlotState.FREE
        self.run = ""
        self.use = 0
        self.leases = 0
        self.is_kept = True

    @classmethod
    def make(cls, path: Path, capacity_bytes: int, lock: threading.RLock) -> ParityFile:
        """A new file with all of its memory allocated (so that no write can end in SIGBUS); OSError when there is
        none, and nothing is left behind."""
        allocate(path, capacity_bytes)
        try:
            file = cls(path, capacity_bytes, lock)
        except BaseException:
            path.unlink()
            raise
        touch(file._bytes)
        return file

    # --- views ---------------------------------------------------------------------------------------------------
    @property
    def held(self) -> ParityHeader:
        """The header; InvalidRequest when the file holds nothing."""
        if self.header is None:
            raise InvalidRequest(f"parity {self.id} holds nothing")
        return self.header

    @property
    def fragment(self) -> Bytes:
        """The bytes of the fragment, writable. A view of the file: what it shows after a reuse is something else."""
        header = self.held
        return self._bytes[header.fragment_offset : header.table_offset]

    @property
    def table(self) -> npt.NDArray[np.uint32]:
        """The CRC of each block of the fragment, writable."""
        header = self.held
        return np.frombuffer(self._view, "<u4", header.piece_blocks, header.table_offset)

    # --- life ----------------------------------------------------------------------------------------------------
    def begin(self, header: ParityHeader) -> None:
        """Make the file WRITING for ``header``, which must fit."""
        write_state(self._view, SlotState.WRITING)
        self.run, self.header, self.state = header.group.run, header, SlotState.WRITING
        self.use += 1
        self.is_kept = True
        self._bytes[HEADER_BYTES : header.fragment_offset] = 0
        self._view[HEADER_BYTES : HEADER_BYTES + len(header.record)] = header.record
        self._write_header(table_digest=0)

    def seal(self) -> None:
        """Write the table's digest, flip WRITING to SEALED last; fragment and table must be filled. Idempotent.

        Raises:
            InvalidRequest: the file was given back, or its run removed.
        """
        with self._lock:
            if self.state is SlotState.SEALED:
                return
            if self.state is not SlotState.WRITING:
                raise InvalidRequest(f"parity {self.id} was taken back")
            self._write_header(digest(self.table))
            failpoint("parity.before_flip")
            write_state(self._view, SlotState.SEALED)
            self.state = SlotState.SEALED

    def free(self) -> None:
        """Forget what the file holds, whatever it is."""
        with self._lock:
            write_state(self._view, SlotState.FREE)
            self.state, self.header = SlotState.FREE, None

    def adopt(self) -> None:
        """Take state and header from the file, as a daemon before this one left them; Corrupt when they do not hold."""
        if self.capacity_bytes < HEADER_BYTES:
            raise Corrupt(f"{self.id}: header: {self.capacity_bytes} of {HEADER_BYTES} bytes are there")
        state = read_state(self._view)
        if state is None:
            raise Corrupt(f"{self.id}: header: unknown state")
        if state is SlotState.SEALED:
            self.header = self._read_header()
            self.run = self.header.group.run
        self.state = state

    def check(self, pool: Executor, parts: int = 2) -> None:
        """Read every byte against its checksums, on ``parts`` threads; Corrupt names what differs."""
        header = self._read_header()
        bounds = np.linspace(0, header.piece_blocks, parts + 1).astype(int).tolist()
        for _ in pool.map(lambda span: self.check_blocks(span[0], span[1] - span[0]), itertools.pairwise(bounds)):
            pass

    def check_blocks(self, first_block: int, blocks: int) -> None:
        """Corrupt, naming the block, unless these blocks of the fragment match the table."""
        last = min(first_block + blocks, self.held.piece_blocks)
        block = find_corrupt_block(self.fragment.data, self.held.group.block_bytes, self.table, first_block, last)
        if block is not None:
            raise Corrupt(f"{self.id}: fragment: block {block} does not match its CRC-32C")

    def _read_header(self) -> ParityHeader:
        header, table_digest = decode_header(self._view, self.id)
        table = np.frombuffer(self._view, "<u4", header.piece_blocks, header.table_offset)
        if digest(table) != table_digest:
            raise Corrupt(f"{self.id}: CRC table does not match its digest")
        return header

    def _write_header(self, table_digest: int) -> None:
        encoded = encode_header(self.held, table_digest)
        self._view[: len(encoded)] = encoded


class ParityStore:
    """The parity files of an arena, by name. Whoever looks a file up and then leases it does both under
    ``arena.lock``."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._files: dict[str, ParityFile] = {}
        self._making_bytes = 0
        self._counter = itertools.count(1)

    def open(self) -> None:
        """Adopt what a daemon before this one sealed, every byte checked; remove the rest."""
        for path in sorted(self._arena.folder.glob(f"*{SUFFIX}")):
            self._adopt(path)

    def _adopt(self, path: Path) -> None:
        problems = self._arena.problems
        try:
            number = int(path.name.removesuffix(SUFFIX).rpartition(".")[2])
            self._counter = itertools.count(max(next(self._counter), number + 1))
            file = ParityFile(path, path.stat().st_size, self._arena.lock)
            file.adopt()
            if file.state is not SlotState.SEALED:
                path.unlink()  # its writer ended with the daemon
                return
            file.check(self._arena.checksummer.pool)
        except FormatTooNew as error:
            problems.append(str(error))
            return
        except (Corrupt, ValueError, OSError) as error:
            problems.append(f"parity set aside: {error}")
            path.unlink(missing_ok=True)
            return
        self._files[file.id] = file

    # --- what there is -------------------------------------------------------------------------------------------
    @property
    def used_bytes(self) -> int:
        with self._arena.lock:
            return sum(file.capacity_bytes for file in self._files.values()) + self._making_bytes

    def files(self) -> list[ParityFile]:
        with self._arena.lock:
            return list(self._files.values())

    def sealed(self, run: str) -> list[ParityFile]:
        return [file for file in self.files() if file.run == run and file.state is SlotState.SEALED]

    def find(self, run: str, snapshot: SnapshotId, key: int, stripe: int, row: int) -> ParityFile | None:
        """The sealed fragment of the group of that key, or None."""
        with self._arena.lock:
            for file in self.sealed(run):
                held = file.held
                if (held.group.snapshot, held.stripe, held.row) == (snapshot, stripe, row) and held.group.key == key:
                    return file
        return None

    # --- begin, give back ----------------------------------------------------------------------------------------
    def begin(self, header: ParityHeader) -> ParityFile:
        """A file WRITING for ``header``: a free one of about its size, else a new one, made on this thread. Whoever
        begins must seal or abort. NoSlot when memory does not suffice."""
        needed = file_bytes(header)
        # Slack of a block and a page: the piece or record of the next step may be a little longer and fit as well.
        capacity = needed + min(needed, header.group.block_bytes + HEADER_BYTES)
        with self._arena.lock:
            fitting = [file for file in self._reusable(header.group.run) if _fits(file, needed)]
            if fitting:
                file = min(fitting, key=lambda file: file.capacity_bytes)
                file.begin(header)
                return file
            self._arena.make_room(capacity, f"parity of {capacity} bytes", self._droppable_for_parity(header.group.run))
            path = self._arena.folder / f"{header.group.run}.{next(self._counter):08d}{SUFFIX}"
            self._making_bytes += capacity
        made = None
        try:
            made = ParityFile.make(path, capacity, self._arena.lock)
        except OSError as error:
            raise NoSlot(
                f"no shared memory for parity of {capacity} bytes: {error.strerror}", "free shared memory"
            ) from error
        finally:
            with self._arena.lock:
                self._making_bytes -= capacity
                if made is not None:
                    made.begin(header)
                    self._files[made.id] = made
        return made

    def _reusable(self, run: str) -> Iterator[ParityFile]:
        for file in self._files.values():
            if file.state is SlotState.FREE and (file.run == run or self._arena.is_ended(file.run)):
                yield file

    def abort(self, file: ParityFile) -> None:
        """Give back a file that was begun: what it holds is forgotten, at once or with its last lease. At
        most once a begin: afterwards the file may be somebody else's."""
        with self._arena.lock:
            file.is_kept = False
            self._free_unless_wanted(file)

    def recycle(self, run: str, keeps: Collection[SnapshotId]) -> None:
        """Free the sealed files of every snapshot of ``run`` but ``keeps``; those under a lease when it ends."""
        with self._arena.lock:
            for file in self.sealed(run):
                file.is_kept = file.held.group.snapshot in keeps
                self._free_unless_wanted(file)

    def set_aside(self, file: ParityFile, problem: str) -> None:
        """A sealed file that failed its checksums: it is not offered again."""
        with self._arena.lock:
            self._arena.problems.append(f"parity set aside: {problem}")
            self.remove(file)

    def remove_run(self, run: str) -> None:
        """Drop every file of a run; those under a lease are freed when it ends."""
        with self._arena.lock:
            for file in [file for file in self._files.values() if file.run == run]:
                if file.leases:
                    file.is_kept = False
                else:
                    self.remove(file)

    def remove(self, file: ParityFile) -> None:
        """Drop a file. Who still reads or writes it has a whole mapping, and finds that it cannot be sealed."""
        file.path.unlink(missing_ok=True)
        self._files.pop(file.id, None)
        file.free()

    # --- leases --------------------------------------------------------------------------------------------------
    def lease(self, file: ParityFile) -> None:
        """Keep a sealed file from being reused until ``release``; InvalidRequest when it is gone already."""
        with self._arena.lock:
            if file.state is not SlotState.SEALED:
                raise InvalidRequest(f"parity {file.id} was taken back")
            file.leases += 1

    def release(self, file: ParityFile) -> None:
        with self._arena.lock:
            file.leases -= 1
            self._free_unless_wanted(file)

    def _free_unless_wanted(self, file: ParityFile) -> None:
        if not file.is_kept and not file.leases:
            file.free()

    # --- room ----------------------------------------------------------------------------------------------------
    def droppable_for_slots(self) -> Iterator[Holding[ParityFile]]:
        """What may go when slots need room: free files of any run, and what ended runs hold."""
        for file in self._files.values():
            is_ended = self._arena.is_ended(file.run)
            if file.state is SlotState.FREE:
                yield Holding(Order.FREE_OF_ENDED_RUN if is_ended else Order.FREE_PARITY, file.capacity_bytes, file)
            elif is_ended and file.state is SlotState.SEALED and not file.leases:
                yield Holding(Order.HELD_BY_ENDED_RUN, file.capacity_bytes, file)

    def _droppable_for_parity(self, run: str) -> Iterator[Holding[Slot | ParityFile]]:
        """The same when parity of ``run`` needs room: its own free files, which do not fit, first; of slots only those
        of ended runs, because other runs would have to make theirs again at once."""
        for holding in self.droppable_for_slots():
            is_own = holding.item.run == run and holding.item.state is SlotState.FREE
            yield Holding(Order.OWN if is_own else holding.order, holding.size_bytes, holding.item)
        yield from (holding for holding in self._arena.droppable_slots() if holding.order is not Order.FREE_SLOT)

    def check_invariants(self) -> None:
        """AssertionError when the store contradicts itself."""
        with self._arena.lock:
            names = {path.name for path in self._arena.folder.glob(f"*{SUFFIX}")}
            assert self._files.keys() <= names, "a known parity file is not there"
            for file in self._files.values():
                assert read_state(file._view) is file.state, "a parity file is not in the state it is known to be in"
                assert (file.header is None) == (file.state is SlotState.FREE), "free parity, or none, has a header"
                assert file.leases == 0 or file.state is SlotState.SEALED, "a lease is on parity that is not sealed"
                assert file.leases >= 0, "parity was released more often than leased"
                assert file.header is None or file_bytes(file.header) <= file.capacity_bytes, "parity outgrows its file"


def _fits(file: ParityFile, needed_bytes: int) -> bool:
    return needed_bytes <= file.capacity_bytes <= _MOST_OVERSIZE * needed_bytes
