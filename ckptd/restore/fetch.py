"""Bring one rank's shard of a snapshot into a sealed, checked and leased slot: from this node's memory, from that of
its peers, or from a tier."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from ckptd.arena.arena import Arena, Lease
from ckptd.erasure.holdings import Holder
from ckptd.errors import CkptdError, Corrupt, NoSlot, RestoreFailed, SlotNotReady, StateMismatch, UnknownStep
from ckptd.failpoints import failpoint
from ckptd.format.manifest import Manifest
from ckptd.format.slot import SlotHeader, write_mark
from ckptd.memory import Bytes
from ckptd.model import SnapshotId
from ckptd.restore.inventory import MEMORY
from ckptd.tiers.tier import Tier

SLOT_DEADLINE_S = 120.0

OnCorrupt = Callable[[str, str, str], None]
Locate = Callable[[], Sequence[Holder]]


class Target(Protocol):
    """Where peers put a shard. ``begin`` gives the payload to fill, from its start on; a second ``begin`` takes the
    first back. ``progressed`` says how many bytes of it are there. ``seal`` takes the CRC of every block as it must be,
    and raises Corrupt when the payload is not that."""

    def begin(self, header: SlotHeader) -> Bytes: ...

    def progressed(self, written_bytes: int) -> None: ...

    def seal(self, table: npt.NDArray[np.uint32]) -> None: ...


class PeerSource(Protocol):
    """The memory of other nodes. ``rebuild`` fills and seals ``target`` and names the source; UnknownStep when no peer
    holds anything of it, RestoreFailed when what they hold will not do."""

    def rebuild(self, run: str, snapshot: SnapshotId, rank: int, holders: Sequence[Holder], target: Target) -> str: ...


class Fetcher:
    """``on_corrupt(run, place, problem)`` hears of every copy set aside; place is "memory" or a tier's URL.
    ``on_repaired(run)``: of one in this node's memory another was made."""

    def __init__(
        self,
        arena: Arena,
        tiers: Sequence[Tier],
        peers: PeerSource,
        on_corrupt: OnCorrupt,
        on_repaired: Callable[[str], None],
    ) -> None:
        self._arena = arena
        self._tiers = tiers
        self._peers = peers
        self._on_corrupt = on_corrupt
        self._on_repaired = on_repaired

    def fetch(
        self,
        run: str,
        snapshot: SnapshotId,
        rank: int,
        world_size: int,
        source: str,
        uid: int,
        holder: str,
        locate: Locate,
    ) -> tuple[Lease, str]:
        """(lease of the slot, the source that served). A source that fails its checksums is set aside and the next
        serves; Corrupt or RestoreFailed when none is left, naming what was wrong with each. ``locate`` asks who holds
        what of the snapshot, once this node's own memory cannot serve."""
        problems: list[str] = []
        if source in ("", MEMORY):
            lease = self._from_memory(run, snapshot, rank, world_size, holder, problems)
            if lease:
                return lease, MEMORY
            filling = _Filling(self, run, snapshot, rank, holder)
            try:
                place = self._peers.rebuild(run, snapshot, rank, locate(), filling)
                _check_world(snapshot, filling.leased.slot.sealed_header.world_size, world_size)
                if problems:
                    self._on_repaired(run)
                return filling.leased, place
            except UnknownStep:
                pass  # no peer has it
            except BaseException as error:
                filling.abandon()
                if isinstance(error, StateMismatch) or not isinstance(error, CkptdError):
                    raise
                problems.append(error.message)
        for tier in self._tiers:
            if source not in ("", tier.spec.url):
                continue
            try:
                return self._from_tier(tier, run, snapshot, rank, world_size, uid, holder), tier.spec.url
            except UnknownStep:
                continue  # this tier never had it
            except Corrupt as error:
                self._on_corrupt(run, tier.spec.url, error.message)
                problems.append(error.message)
        detail = "; ".join(problems) or "no source holds it"
        raise RestoreFailed(f"rank {rank} of {snapshot} cannot be restored: {detail}", "try an older step")

    def repair(
        self, run: str, snapshot: SnapshotId, rank: int, holder: str, holders: Sequence[Holder]
    ) -> tuple[Lease, str]:
        """(lease of a slot with the shard made again from ``holders``, the source that served). What this node holds of
        it already stays beside.

        Raises:
            NoSlot: there is no room for one more slot.
            UnknownStep: nobody holds anything of it.
            RestoreFailed: what they hold will not do.
        """
        filling = _Filling(self, run, snapshot, rank, holder)
        try:
            place = self._peers.rebuild(run, snapshot, rank, holders, filling)
        except BaseException as error:
            filling.abandon()
            if filling.refused is not None and isinstance(error, CkptdError):
                raise filling.refused from error
            raise
        return filling.leased, place

    def _from_memory(
        self, run: str, snapshot: SnapshotId, rank: int, world_size: int, holder: str, problems: list[str]
    ) -> Lease | None:
        slot = self._arena.find_sealed(run, snapshot, rank)
        if slot is None:
            return None
        _check_world(snapshot, slot.sealed_header.world_size, world_size)
        lease = self._arena.lease(slot, holder)
        try:
            slot.check(self._arena.checksummer.pool)
        except Corrupt as error:
            self._arena.release(lease.id)
            self._arena.set_aside(slot, error.message)
            self._on_corrupt(run, MEMORY, error.message)
            problems.append(error.message)
            return None
        return lease

    def _from_tier(
        self, tier: Tier, run: str, snapshot: SnapshotId, rank: int, world_size: int, uid: int, holder: str
    ) -> Lease:
        manifest = tier.manifest(run, snapshot)
        _check_world(snapshot, manifest.world_size, world_size)
        header = SlotHeader(
            run=run,
            rank=rank,
            world_size=manifest.world_size,
            uid=uid,
            snapshot=snapshot,
            parent=manifest.parent,
            roster_version=manifest.roster_version,
            index_crc=0,
            is_persisted=False,
            sealed_at_s=0.0,
            layout=tier.layout_of(manifest, rank),
        )
        lease = self.begin(header, holder)
        try:
            self._fill(tier, manifest, lease)
        except BaseException:
            self.give_back(lease)
            raise
        return lease

    def give_back(self, lease: Lease) -> None:
        """Free a slot that was begun and will not be filled."""
        self._arena.release(lease.id)
        self._arena.free(lease.slot)

    def renew(self, lease: Lease) -> None:
        """The slot is still being filled."""
        self._arena.leased(lease.id)

    def _fill(self, tier: Tier, manifest: Manifest, lease: Lease) -> None:
        slot = lease.slot
        layout = slot.sealed_header.layout

        def renew(_: int) -> None:
            self._arena.leased(lease.id)

        _, table = tier.read_rank(manifest, slot.sealed_header.rank, slot.payload, renew)
        failpoint("restore.after_read")
        write_mark(slot.page, layout.payload_bytes)
        slot.seal(crc32c(slot.index))
        if not np.array_equal(slot.table, table):
            raise Corrupt(f"{slot.id}: memory does not hold what was read from {tier.spec.url}")

    def begin(self, header: SlotHeader, holder: str) -> Lease:
        """A slot for ``header``, leased: nobody may take it before it is filled."""
        deadline = time.monotonic() + SLOT_DEADLINE_S
        while True:
            try:
                with self._arena.lock:  # nobody may take the slot before it is leased
                    return self._arena.lease(self._arena.begin_restore(header), holder)
            except SlotNotReady:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.005)


class _Filling:
    """The slot that peers fill: a Target."""

    def __init__(self, fetcher: Fetcher, run: str, snapshot: SnapshotId, rank: int, holder: str) -> None:
        self._fetcher = fetcher
        self._what = (run, snapshot, rank)
        self._holder = holder
        self._lease: Lease | None = None
        self.refused: NoSlot | None = None  # why there was no slot to fill

    @property
    def leased(self) -> Lease:
        assert self._lease is not None
        return self._lease

    def begin(self, header: SlotHeader) -> Bytes:
        if (header.run, header.snapshot, header.rank) != self._what:
            raise Corrupt(f"rank {header.rank} of {header.snapshot} was offered for rank {self._what[2]}")
        self.abandon()
        # The header as it was sealed: so the record of its image, and the parity that names it, stay what they are.
        try:
            self._lease = self._fetcher.begin(header, self._holder)
        except NoSlot as error:
            self.refused = error
            raise
        return np.frombuffer(self._lease.slot.payload, np.uint8)

    def progressed(self, written_bytes: int) -> None:
        self._fetcher.renew(self.leased)
        write_mark(self.leased.slot.page, written_bytes)

    def seal(self, table: npt.NDArray[np.uint32]) -> None:
        slot = self.leased.slot
        failpoint("restore.after_read")
        write_mark(slot.page, slot.sealed_header.layout.payload_bytes)
        slot.seal(crc32c(slot.index), slot.sealed_header.sealed_at_s)
        if not np.array_equal(slot.table, table):
            raise Corrupt(f"{slot.id}: memory does not hold what peers sent, or they sent what was not sealed")

    def abandon(self) -> None:
        if self._lease is not None:
            self._fetcher.give_back(self._lease)
            self._lease = None


def _check_world(snapshot: SnapshotId, saved: int, wanted: int) -> None:
    if saved != wanted:
        raise StateMismatch(
            f"{snapshot} was saved by {saved} ranks, this job has {wanted}",
            f"start the job with {saved} ranks: restores into another world size are not supported yet",
        )
