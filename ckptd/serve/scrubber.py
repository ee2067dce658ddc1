"""The scrubber: reads again what is sealed in memory, round after round, and has what it can made again.

Two threads that yield to others. One goes round over the slots and the parity of runs that have not ended, within a
rate: every block against its CRC-32C, and a few blocks of each parity fragment against the data it was made of. The
other mends what that, or `ckptd verify`, found. A corrupt fragment is set aside and reported lost: the coordinator
starts protection of the snapshot again, and only what is missing is made. A corrupt slot is made again from peers, as a
restore does it, and set aside once the good one is sealed, or before when there is no room for both. Shards that are
not here though the coordinator counts on them are made again too. Invariants: nothing that is being written is touched;
no lease is held that could leave a due step without a slot.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np
import structlog

from ckptd.arena.arena import Lease
from ckptd.arena.checksum import yield_to_others
from ckptd.arena.parity import ParityFile
from ckptd.arena.recycle import UNDECIDED
from ckptd.arena.slot import Slot
from ckptd.erasure.holdings import Holder
from ckptd.errors import CkptdError, Corrupt, NoSlot
from ckptd.model import SnapshotId
from ckptd.peers.rate import TokenBucket
from ckptd.restore.inventory import MEMORY
from ckptd.serve.node_run import NodeRun
from ckptd.serve.verification import (
    Copy,
    Damage,
    NotCompared,
    ParityCopy,
    SlotCopy,
    check,
    expected_holders,
    find_copy,
    is_protected,
    located_holders,
    match,
    run_here,
)

if TYPE_CHECKING:
    from ckptd.serve.node import Node

_MIB: Final = 1 << 20
_LEAST_RATE: Final = 16 * _MIB  # bytes a second: below it a part would be waited for too long
_MOST_RATE: Final = 256 * _MIB
_SAMPLED_BLOCKS: Final = 4  # of each parity fragment, a round
_TICK_S: Final = 0.5
_BACKOFF_S: Final = (5.0, 15.0, 60.0, 300.0)
_AWAIT_S: Final = 600.0
_CLOSE_S: Final = 1.0
_MOST_PROBLEMS: Final = 100
_MOST_COUNTED: Final = 4096
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Missing:
    """A shard that should be in memory here and is not."""

    run: str
    snapshot: SnapshotId
    rank: int


@dataclass(frozen=True, slots=True)
class _Fragment:
    """Parity that was set aside and is to come back."""

    run: str
    snapshot: SnapshotId
    group: int
    stripe: int
    row: int


class Scrubber:
    """See the module. ``found`` takes what others found."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._random = np.random.default_rng(node.instance)
        self._stop = threading.Event()
        self._queue: queue.SimpleQueue[Damage | _Missing | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._counted: dict[tuple[str, int], None] = {}  # file and use of what was counted, in that order
        self._pending: set[tuple[str, int]] = set()
        self._later: list[Damage] = []
        self._awaited: dict[_Fragment, float] = {}
        self._tries: dict[_Missing, tuple[int, float]] = {}  # how many failed, and when the next is due
        self._ticked_s = 0.0
        self._threads = [
            threading.Thread(target=self._run, name="scrub", daemon=True),
            threading.Thread(target=self._mend_all, name="mend", daemon=True),
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop; a repair that waits for a peer is not waited for: the next daemon finds what is missing."""
        self._stop.set()
        self._queue.put(None)
        for thread in self._threads:
            if thread.is_alive():
                thread.join(_CLOSE_S)

    def found(self, damage: Damage) -> None:
        """A copy is corrupt: counted and logged once, and mended soon."""
        copy, key = damage.copy, (damage.copy.file.id, damage.copy.use)
        with self._lock:
            is_new = key not in self._counted
            self._counted[key] = None
            while len(self._counted) > _MOST_COUNTED:
                del self._counted[next(iter(self._counted))]
            is_waiting = key in self._pending
            self._pending.add(key)
        if is_new:
            log.error(
                "corrupt copy", run=copy.run, place=copy.place, snapshot=str(copy.snapshot), problem=damage.problem
            )
            self._node.metrics.corrupt_total.labels(copy.run, copy.place).inc()
        if not is_waiting:
            self._queue.put(damage)

    # --- rounds --------------------------------------------------------------------------------------------------
    def _run(self) -> None:
        yield_to_others()
        every_s = self._node.settings.scrub_every_s
        due_s = time.monotonic() + every_s
        while not self._stop.wait(_TICK_S if not every_s else min(_TICK_S, max(0.0, due_s - time.monotonic()))):
            try:
                self._tick()
                if every_s and time.monotonic() >= due_s:
                    due_s = time.monotonic() + every_s
                    self._round(every_s)
            except Exception:  # a thread's boundary: the next round tries again
                log.exception("scrub failed")

    def _round(self, every_s: float) -> None:
        """Everything once. Only names are kept meanwhile: a copy would keep the memory of what is dropped."""
        node = self._node
        names, total = [], 0
        for run in [run for run in list(node.records) if not node.is_ended(run)]:
            held: list[Slot | ParityFile] = [*node.arena.sealed(run), *node.arena.parity.sealed(run)]
            names += [(run, file.id) for file in held]
            total += sum(file.capacity_bytes for file in held)
            del held
        bucket = TokenBucket(int(min(max(total / every_s, _LEAST_RATE), _MOST_RATE)))
        for run, file_id in names:
            copy = find_copy(node.arena, run, file_id)
            if copy is not None:
                self._scrub(copy, bucket)
            if self._stop.is_set():
                return

    def _scrub(self, copy: Copy, bucket: TokenBucket) -> None:
        try:
            for size_bytes in self._read(copy):
                self._node.metrics.bytes_total.labels(copy.run, "scrubbed", MEMORY).inc(size_bytes)
                bucket.take(size_bytes)
                self._tick()
                if self._stop.is_set():
                    return
        except NotCompared as why:
            log.debug("parity not compared", run=copy.run, snapshot=str(copy.snapshot), copy=copy.name, reason=str(why))
        except Corrupt as error:
            if copy.is_current():
                self.found(Damage(copy, error.message))

    def _read(self, copy: Copy) -> Iterator[int]:
        """The bytes read after each part, those that came from peers among them."""
        yield from check(copy)
        run = run_here(self._node, copy.run)
        if isinstance(copy, ParityCopy) and run is not None and is_protected(run, copy.snapshot):
            blocks = copy.header.piece_blocks
            chosen = self._random.choice(blocks, min(blocks, _SAMPLED_BLOCKS), replace=False)
            holders = expected_holders(self._node, run, copy.snapshot)
            spans = [(block, 1) for block in sorted(chosen.tolist())]
            for size_bytes in match(copy, holders, self._node.peering.transport_to, spans):
                yield size_bytes * copy.header.group.geometry.k

    # --- what is due beside a round ------------------------------------------------------------------------------
    def _tick(self) -> None:
        """Twice a second: damage that could not be mended when it was found, parity that came back, missing shards."""
        now = time.monotonic()
        if now - self._ticked_s < _TICK_S:
            return
        self._ticked_s = now
        with self._lock:
            later, self._later = self._later, []
        for damage in later:
            self._queue.put(damage)
        self._count_parity(now)
        missing = set(self._missing())
        with self._lock:
            self._tries = {what: tries for what, tries in self._tries.items() if what in missing}
            due = [what for what in missing if self._tries.get(what, (0, 0.0))[1] <= now]
            for what in due:
                self._tries[what] = (self._tries.get(what, (0, 0.0))[0], float("inf"))
        for what in due:
            self._queue.put(what)

    def _count_parity(self, now: float) -> None:
        parity, metrics = self._node.arena.parity, self._node.metrics
        with self._lock:
            awaited = dict(self._awaited)
        for what, until_s in awaited.items():
            is_back = parity.find(what.run, what.snapshot, what.group, what.stripe, what.row) is not None
            if is_back:
                log.info("parity made again", run=what.run, snapshot=str(what.snapshot))
                metrics.repaired_total.labels(what.run, "parity").inc()
            if is_back or now > until_s:
                with self._lock:
                    self._awaited.pop(what, None)

    def _missing(self) -> Iterator[_Missing]:
        """Shards of this node that the coordinator counts on, or wants to protect, and that are not here. Those of an
        older incarnation are left to restores: another world may have saved them."""
        node = self._node
        for run in [run_here(node, name) for name in list(node.records) if not node.is_ended(name)]:
            for snapshot in (run.parity_id(), run.protecting_id()) if run else ():
                if run is None or snapshot is None or snapshot.incarnation != run.incarnation:
                    continue
                for rank in run.roster.ranks_of(node.node_id):
                    if node.arena.find_sealed(run.run, snapshot, rank) is None:
                        yield _Missing(run.run, snapshot, rank)

    # --- mending -------------------------------------------------------------------------------------------------
    def _mend_all(self) -> None:
        yield_to_others()
        while (item := self._queue.get()) is not None and not self._stop.is_set():
            try:
                if isinstance(item, _Missing):
                    self._mend_missing(item)
                else:
                    self._mend(item)
            except Exception:  # a thread's boundary: the next round finds it again
                log.exception("mending failed")
            del item  # a copy would keep the memory of what was set aside

    def _mend(self, damage: Damage) -> None:
        copy = damage.copy
        run = run_here(self._node, copy.run)
        with self._lock:
            if isinstance(copy, ParityCopy) and run and run.protecting_id() == copy.snapshot:
                # Parity that goes while its snapshot is being protected would be counted as made.
                self._later.append(damage)
                return
            self._pending.discard((copy.file.id, copy.use))
        if isinstance(copy, ParityCopy):
            self._mend_parity(run, copy, damage.problem)
        else:
            self._mend_slot(run, copy, damage.problem)
        problems = self._node.arena.problems
        del problems[: max(0, len(problems) - _MOST_PROBLEMS)]

    def _mend_parity(self, run: NodeRun | None, copy: ParityCopy, problem: str) -> None:
        arena, held = self._node.arena, copy.header
        with arena.lock:
            if not copy.is_current():
                return
            arena.parity.set_aside(copy.file, problem)
        if run is None:
            return
        what = _Fragment(run.run, copy.snapshot, held.group.key, held.stripe, held.row)
        with self._lock:
            self._awaited[what] = time.monotonic() + _AWAIT_S
        self._node.peering.protecting.withdraw(run, copy.snapshot, problem)

    def _mend_slot(self, run: NodeRun | None, copy: SlotCopy, problem: str) -> None:
        """The corrupt slot goes in any case; a good one comes first when it can."""
        arena = self._node.arena
        with arena.lock:
            if not copy.is_current():
                return
            why_kept = arena.why_kept(copy.file)
        # What nobody needs is not made again; what waits for the restore decision, the restore itself makes again.
        if run is None or why_kept in (None, UNDECIDED) or copy.header.rank not in run.roster.ranks_of(run.node_id):
            self._set_aside(copy, problem)
            return
        what = _Missing(copy.run, copy.snapshot, copy.header.rank)
        failure: CkptdError | None = None
        try:
            self._make_again(run, what, copy, problem)
        except NoSlot:
            self._set_aside(copy, f"{problem}; there was no room for another beside it")
            failure = self._attempt(run, what)
        except CkptdError as error:
            self._set_aside(copy, f"{problem}; it could not be made again: {error.message}")
            failure = error
        if failure is not None:
            self._give_up(run, what, f"its slot was corrupt, and cannot be made again: {failure.message}")

    def _mend_missing(self, what: _Missing) -> None:
        with self._lock:
            failed, _ = self._tries.get(what, (0, 0.0))
            delay_s = _BACKOFF_S[min(failed, len(_BACKOFF_S) - 1)]
        failure, run = None, run_here(self._node, what.run)
        try:
            if run is not None and what in self._missing():  # else the run has gone on meanwhile
                failure = self._attempt(run, what)
        finally:
            with self._lock:
                self._tries[what] = (failed + 1, time.monotonic() + delay_s)
        if failure is not None and not failed:
            log.warning(
                "a shard is missing", run=what.run, rank=what.rank, snapshot=str(what.snapshot), reason=failure.message
            )

    def _attempt(self, run: NodeRun, what: _Missing) -> CkptdError | None:
        """Make the shard again; why not."""
        try:
            self._make_again(run, what)
        except CkptdError as error:
            return error
        return None

    def _make_again(self, run: NodeRun, what: _Missing, corrupt: SlotCopy | None = None, problem: str = "") -> None:
        """The shard in a new slot, and the ``corrupt`` one set aside; CkptdError when it cannot be had."""
        node = self._node
        lease, source = self._rebuild(run, what)
        with node.arena.lock:
            if corrupt is not None:
                self._set_aside(corrupt, f"{problem}; it was made again ({source})")
            node.arena.release(lease.id)
        log.info("slot made again", run=what.run, rank=what.rank, snapshot=str(what.snapshot), source=source)
        node.metrics.repaired_total.labels(what.run, "slot").inc()

    def _rebuild(self, run: NodeRun, what: _Missing) -> tuple[Lease, str]:
        """(lease of the new slot, source). The nodes of the group are tried first, then whoever is known to hold it."""
        holders = expected_holders(self._node, run, what.snapshot)
        if holders:
            try:
                return self._fetch(what, holders)
            except NoSlot:
                raise
            except CkptdError as error:
                log.info("repair is tried elsewhere", run=what.run, rank=what.rank, reason=error.message)
        return self._fetch(what, located_holders(self._node, run, what.snapshot))

    def _fetch(self, what: _Missing, holders: list[Holder]) -> tuple[Lease, str]:
        """What this node holds of the shard itself is no source: it is corrupt."""
        here, others = holders[0], holders[1:]
        ranks = {snapshot: ranks - {what.rank} for snapshot, ranks in here.ranks.items()}
        held = [replace(here, ranks=ranks), *others]
        return self._node.peering.fetcher.repair(what.run, what.snapshot, what.rank, f"scrub/{what.run}", held)

    def _set_aside(self, copy: SlotCopy, problem: str) -> None:
        with self._node.arena.lock:
            if copy.is_current():
                self._node.arena.set_aside(copy.file, problem)

    def _give_up(self, run: NodeRun, what: _Missing, reason: str) -> None:
        """The shard is lost here: whoever counts on it hears of it."""
        log.error("shard lost", run=what.run, rank=what.rank, snapshot=str(what.snapshot), reason=reason)
        if what.snapshot.incarnation == run.incarnation:  # staged already: then it cannot die, and this says nothing
            run.report(run.dead(what.rank, what.snapshot.step, "Corrupt", reason))
        if run.parity_id() == what.snapshot:
            self._node.peering.protecting.withdraw(run, what.snapshot, f"rank {what.rank}: {reason}")
