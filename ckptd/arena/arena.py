"""The arena: all slots and parity of a node, within a budget, in one locked folder of shared memory.

Decisions come from ``recycle`` (what may be reused) and ``room`` (what goes); bytes from ``slot`` and ``parity``.
Invariants, checked by ``check_invariants``: allocated bytes never exceed the budget once something new is made; no kept
or leased slot is handed out; every known slot has its file. Slots of some size are made by one background thread,
because the first touch of shared memory runs at a few GB/s.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ckptd.arena.budget import check_budget, read_memory_facts
from ckptd.arena.checksum import Checksummer
from ckptd.arena.folder import lock_folder
from ckptd.arena.parity import SUFFIX as PARITY_SUFFIX
from ckptd.arena.parity import ParityFile, ParityStore
from ckptd.arena.recycle import UNDECIDED, RunMarks, why_kept
from ckptd.arena.room import Holding, Order, to_drop
from ckptd.arena.slot import Slot
from ckptd.errors import BudgetRefused, Corrupt, FormatTooNew, InvalidRequest, NoSlot, SlotNotReady
from ckptd.files import sweep_temporaries
from ckptd.format.slot import SlotHeader, SlotState
from ckptd.model import Incarnation, SnapshotId

_SUFFIX: Final = ".slot"
_INLINE_BYTES: Final = 8 * 1024 * 1024
_LEASE_S: Final = 600.0

MarksOf = Callable[[str], RunMarks]


@dataclass(slots=True)
class Lease:
    """Keeps a slot from being recycled until released, or until ``deadline_s`` passes without progress."""

    id: int
    slot: Slot
    holder: str
    deadline_s: float


class Arena:
    """Slots by id. ``marks_of`` tells the recycle rule what the run has reached; set it before the first begin."""

    def __init__(self, folder: Path, memory_bytes: int, slots_per_rank: int) -> None:
        self.folder = folder
        self.memory_bytes = memory_bytes
        self.slots_per_rank = slots_per_rank
        self.marks_of: MarksOf = lambda _run: RunMarks()
        self.is_ended: Callable[[str], bool] = lambda _run: False
        self.checksummer = Checksummer()
        self.problems: list[str] = []
        self.lock = threading.RLock()
        self.parity = ParityStore(self)
        self._slots: dict[str, Slot] = {}
        self._owner: dict[str, tuple[str, int]] = {}  # slot id -> run, rank
        self._making: dict[tuple[str, int], int] = {}
        self._failed: dict[tuple[str, int], OSError] = {}
        self._leases: dict[int, Lease] = {}
        self._lease_ids = itertools.count(1)
        self._maker = ThreadPoolExecutor(1, thread_name_prefix="slot-maker")
        self._counter = itertools.count(1)
        self._lock_fd = -1
        self._may_grow = True

    # --- opening -------------------------------------------------------------------------------------------------
    def open(self) -> None:
        """Lock the folder, check the budget, adopt what a daemon before this one left; ArenaLocked, BudgetRefused, and
        NotPermitted when the folder is another user's.

        A daemon with slots or parity to adopt never refuses: it adopts, makes nothing new, and says so in ``problems``.
        """
        self._lock_fd = lock_folder(self.folder)
        sweep_temporaries([self.folder])
        try:
            check_budget(self.memory_bytes, read_memory_facts(self.folder), self.folder)
        except BudgetRefused as error:
            if not any(path.suffix in (_SUFFIX, PARITY_SUFFIX) for path in self.folder.iterdir()):
                raise
            self._may_grow = False
            self.problems.append(f"no new slots or parity: {error.message}")
        for path in sorted(self.folder.glob(f"*{_SUFFIX}")):
            self._adopt(path)
        self.parity.open()

    def _adopt(self, path: Path) -> None:
        """Keep a sealed slot whose checksums hold, a slot a client still writes, and free files; drop the rest."""
        run, rank, number = path.name.removesuffix(_SUFFIX).rsplit(".", 2)
        self._counter = itertools.count(max(next(self._counter), int(number) + 1))
        try:
            slot = Slot(path, path.stat().st_size)
            slot.adopt()
            if slot.state is SlotState.SEALED:
                slot.check(self.checksummer.pool)
            elif slot.state is SlotState.WRITING and not slot.is_mapped_by_a_client():
                path.unlink()
                return
        except FormatTooNew as error:
            self.problems.append(str(error))
            return
        except (Corrupt, ValueError, OSError) as error:
            self.problems.append(f"slot set aside: {error}")
            path.unlink(missing_ok=True)
            return
        self._slots[slot.id] = slot
        self._owner[slot.id] = (run, int(rank))

    def close(self) -> None:
        """Stop the threads and give up the folder; sealed slots stay for the next daemon."""
        self._maker.shutdown(wait=True, cancel_futures=True)
        self.checksummer.close()
        os.close(self._lock_fd)

    # --- making --------------------------------------------------------------------------------------------------
    @property
    def used_bytes(self) -> int:
        with self.lock:
            slots = sum(s.capacity_bytes for s in self._slots.values()) + sum(self._making.values())
            return slots + self.parity.used_bytes

    def slots(self) -> list[Slot]:
        with self.lock:
            return list(self._slots.values())

    def slots_of(self, run: str, rank: int | None = None) -> list[Slot]:
        with self.lock:
            return [self._slots[i] for i, (r, k) in self._owner.items() if r == run and (rank is None or k == rank)]

    def owner_of(self, slot: Slot) -> tuple[str, int]:
        with self.lock:
            return self._owner[slot.id]

    def slot(self, slot_id: str) -> Slot:
        with self.lock:
            slot = self._slots.get(slot_id)
        if slot is None:
            raise InvalidRequest(f"slot {slot_id!r} is not known here")
        return slot

    def prepare(self, run: str, rank: int, slot_bytes: int, count: int) -> None:
        """Start to make slots of ``slot_bytes`` until the rank has ``count`` of them; NoSlot when they never fit."""
        with self.lock:
            have = sum(s.capacity_bytes >= slot_bytes for s in self.slots_of(run, rank))
            for _ in range(count - have):
                self._make_soon(run, rank, slot_bytes)

    def _make_soon(self, run: str, rank: int, slot_bytes: int) -> None:
        self._make_room(run, rank, slot_bytes)
        self._making[run, rank] = self._making.get((run, rank), 0) + slot_bytes
        path = self.folder / f"{run}.{rank:05d}.{next(self._counter):08d}{_SUFFIX}"
        if slot_bytes <= _INLINE_BYTES:
            self._make(run, rank, path, slot_bytes)
        else:
            self._maker.submit(self._make, run, rank, path, slot_bytes)

    def _make(self, run: str, rank: int, path: Path, slot_bytes: int) -> None:
        slot, failure = None, None
        try:
            slot = Slot.make(path, slot_bytes)
        except OSError as error:
            failure = error
        except Exception as error:  # noqa: BLE001  a thread's boundary: whoever waits for the slot must hear of it
            failure = OSError(0, f"{type(error).__name__}: {error}")
        with self.lock:
            left = self._making.pop((run, rank), 0) - slot_bytes
            if left > 0:
                self._making[run, rank] = left
            if slot is not None:
                self._slots[slot.id] = slot
                self._owner[slot.id] = (run, rank)
            elif failure is not None:
                self._failed[run, rank] = failure

    def _make_room(self, run: str, rank: int, slot_bytes: int) -> None:
        """Room for a slot, by what ``Order`` says; too small ones of its rank then go in any case."""
        if slot_bytes > self.memory_bytes:
            raise NoSlot(
                f"rank {rank} needs a slot of {slot_bytes} bytes but the daemon has {self.memory_bytes} in all",
                f"serve with --memory of at least {self.slots_per_rank} such slots a rank",
            )
        holdings: list[Holding[Slot | ParityFile]] = [*self.droppable_slots((run, rank))]
        self.make_room(slot_bytes, f"{slot_bytes}", [*holdings, *self.parity.droppable_for_slots()])
        for slot in self.slots_of(run, rank):
            if self.why_kept(slot) is None and slot.capacity_bytes < slot_bytes:
                self._remove(slot)

    def droppable_slots(self, own: tuple[str, int] | None = None) -> Iterator[Holding[Slot]]:
        """Slots that may go when something needs room, for ``own`` (run, rank) or not for a rank: free ones, and what
        ended runs hold unless it is leased."""
        for slot in self._slots.values():
            owner = self._owner[slot.id]
            is_ended = self.is_ended(owner[0])
            if self.why_kept(slot) is None:
                order = Order.OWN if owner == own else Order.FREE_OF_ENDED_RUN if is_ended else Order.FREE_SLOT
                yield Holding(order, slot.capacity_bytes, slot)
            elif is_ended and not slot.leases:
                yield Holding(Order.HELD_BY_ENDED_RUN, slot.capacity_bytes, slot)

    def make_room(self, needed_bytes: int, what: str, holdings: Iterable[Holding[Slot | ParityFile]]) -> None:
        """Drop of ``holdings`` what it takes until ``needed_bytes`` more fit the budget; NoSlot, and nothing is
        dropped, when that is not enough."""
        if not self._may_grow:
            raise NoSlot(
                "no new slots or parity: the budget exceeds what this machine has",
                "restart the daemon with less --memory",
            )
        used = self.used_bytes
        dropped = to_drop(holdings, used + needed_bytes - self.memory_bytes)
        if dropped is None:
            raise NoSlot(
                f"memory is full: {used} of {self.memory_bytes} bytes used, {what} more needed",
                f"serve with more --memory: {self.slots_per_rank} slots a rank are wanted",
            )
        for item in dropped:
            self._remove(item) if isinstance(item, Slot) else self.parity.remove(item)

    # --- begin, seal, free ---------------------------------------------------------------------------------------
    def why_kept(self, slot: Slot) -> str | None:
        run, _ = self._owner[slot.id]
        snapshot = slot.header.snapshot if slot.header else None
        return why_kept(slot.state, snapshot, bool(slot.leases), self.marks_of(run))

    def begin(self, header: SlotHeader) -> Slot:
        """A slot of this rank, WRITING for ``header``. SlotNotReady while one is being made; NoSlot with the reason."""
        return self._begin(header, self.slots_per_rank)

    def begin_restore(self, header: SlotHeader) -> Slot:
        """The same for what is restored from elsewhere: every slot of the rank may wait for this very restore's
        decision, so it may have one more, and when memory has no room the oldest that waits (never the newest) goes."""
        try:
            return self._begin(header, self.slots_per_rank + 1)
        except NoSlot:
            with self.lock:
                waiting = [s for s in self.slots_of(header.run, header.rank) if self.why_kept(s) == UNDECIDED]
                waiting.sort(key=lambda slot: slot.sealed_header.snapshot)
                if len(waiting) < 2:
                    raise
                self.free(waiting[0])
            return self._begin(header, self.slots_per_rank + 1)

    def _begin(self, header: SlotHeader, most_slots: int) -> Slot:
        needed = header.layout.slot_bytes
        key = (header.run, header.rank)
        with self.lock:
            mine = self.slots_of(*key)
            free = [s for s in mine if self.why_kept(s) is None and s.capacity_bytes >= needed]
            if not free:
                self._grow_or_refuse(header, mine, most_slots)
                free = [s for s in self.slots_of(*key) if s.capacity_bytes >= needed and self.why_kept(s) is None]
                if not free:
                    raise SlotNotReady(f"a slot of {needed} bytes is being made")
            slot = min(free, key=lambda s: s.capacity_bytes)
            slot.begin(header)
        self.checksummer.follow(slot)
        return slot

    def _grow_or_refuse(self, header: SlotHeader, mine: list[Slot], most_slots: int) -> None:
        key, needed = (header.run, header.rank), header.layout.slot_bytes
        if failure := self._failed.pop(key, None):
            raise NoSlot(f"no shared memory for a slot of {needed} bytes: {failure.strerror}", "free shared memory")
        if key in self._making:
            return
        usable = [s for s in mine if s.capacity_bytes >= needed or self.why_kept(s)]
        if len(usable) >= most_slots:
            held = "; ".join(f"{s.header.snapshot if s.header else '?'}: {self.why_kept(s)}" for s in usable)
            raise NoSlot(f"all {len(usable)} slots of rank {header.rank} are held ({held})", "serve with more --slots")
        # Slack of a block: the non-tensor state may grow a little without a new slot.
        self._make_soon(*key, needed + header.layout.block_bytes)

    def writing(self, slot_id: str, generation: int) -> Slot:
        """The slot, when it is still in that generation; InvalidRequest when it was taken back."""
        slot = self.slot(slot_id)
        if slot.generation != generation or slot.state is SlotState.FREE:
            raise InvalidRequest(f"slot {slot_id} was taken back: its step is dead")
        return slot

    def free(self, slot: Slot) -> None:
        """Give a slot back, whatever it holds, unless it is leased."""
        with self.lock:
            if not slot.leases:
                slot.free()

    def remove_run(self, run: str) -> None:
        """Drop every slot and all parity of a run that is not leased."""
        with self.lock:
            self.parity.remove_run(run)
            for slot in self.slots_of(run):
                if not slot.leases:
                    self._remove(slot)

    def set_aside(self, slot: Slot, problem: str) -> None:
        """A sealed slot that failed its checksums: it is not offered again."""
        with self.lock:
            self.problems.append(f"slot set aside: {problem}")
            self._remove(slot)

    def _remove(self, slot: Slot) -> None:
        # Clients may still map it: unlinking leaves their mapping whole.
        slot.path.unlink(missing_ok=True)
        self._slots.pop(slot.id, None)
        self._owner.pop(slot.id, None)

    def sealed(self, run: str) -> list[Slot]:
        return [s for s in self.slots_of(run) if s.state is SlotState.SEALED]

    def find_sealed(self, run: str, snapshot: SnapshotId, rank: int) -> Slot | None:
        return next(
            (s for s in self.sealed(run) if s.header and (s.header.snapshot, s.header.rank) == (snapshot, rank)), None
        )

    def drop_writing_before(self, run: str, incarnation: Incarnation) -> None:
        """A newer incarnation began: what older ones were still writing will never be finished."""
        for slot in self.slots_of(run):
            if slot.state is SlotState.WRITING and slot.header and slot.header.snapshot.incarnation < incarnation:
                self.take_back(slot)

    def take_back(self, slot: Slot) -> None:
        """Give back a slot whose writer is taken for gone. One that is only halted still maps it and may write on: then
        the file is dropped, so that its late bytes never reach a slot that somebody else was given."""
        with self.lock:
            if slot.is_mapped_by_a_client():
                self._remove(slot)
            else:
                self.free(slot)

    # --- leases --------------------------------------------------------------------------------------------------
    def lease(self, slot: Slot, holder: str) -> Lease:
        """Keep ``slot`` until released; ``holder`` says who for (released together by ``release_holder``)."""
        with self.lock:
            lease = Lease(next(self._lease_ids), slot, holder, time.monotonic() + _LEASE_S)
            self._leases[lease.id] = lease
            slot.leases.add(lease.id)
            return lease

    def leased(self, lease_id: int) -> Slot:
        """The slot under a lease, which this counts as progress."""
        with self.lock:
            lease = self._leases.get(lease_id)
            if lease is None:
                raise InvalidRequest(f"lease {lease_id} is not known: released or expired")
            lease.deadline_s = time.monotonic() + _LEASE_S
            return lease.slot

    def release(self, lease_id: int) -> None:
        with self.lock:
            lease = self._leases.pop(lease_id, None)
            if lease is not None:
                lease.slot.leases.discard(lease_id)

    def release_holder(self, holder: str) -> None:
        with self.lock:
            for lease_id in [i for i, lease in self._leases.items() if lease.holder == holder]:
                self.release(lease_id)

    def expire_leases(self) -> None:
        now = time.monotonic()
        with self.lock:
            for lease_id in [i for i, lease in self._leases.items() if lease.deadline_s < now]:
                self.release(lease_id)

    def check_invariants(self) -> None:
        """AssertionError when the arena contradicts itself; tests run it after every event."""
        with self.lock:
            files = {path.name for path in self.folder.glob(f"*{_SUFFIX}")}
            assert set(self._slots) <= files, "a known slot has no file"
            assert self._slots.keys() == self._owner.keys(), "slots and owners differ"
            self.parity.check_invariants()
            assert all(lease.id in lease.slot.leases for lease in self._leases.values()), "a lease is not on its slot"
