"""Bring one rank's shard of a snapshot into a sealed, checked and leased slot, from memory or from a tier."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from crc32c import crc32c

from ckptd.arena.arena import Arena, Lease
from ckptd.errors import Corrupt, RestoreFailed, SlotNotReady, StateMismatch, UnknownStep
from ckptd.failpoints import failpoint
from ckptd.format.manifest import Manifest
from ckptd.format.slot import SlotHeader, write_mark
from ckptd.model import SnapshotId
from ckptd.restore.inventory import MEMORY
from ckptd.tiers.tier import Tier

SLOT_DEADLINE_S = 120.0

OnCorrupt = Callable[[str, str, str], None]


class Fetcher:
    """``on_corrupt(run, place, problem)`` hears of every copy set aside; place is "memory" or a tier's URL."""

    def __init__(self, arena: Arena, tiers: Sequence[Tier], on_corrupt: OnCorrupt) -> None:
        self._arena = arena
        self._tiers = tiers
        self._on_corrupt = on_corrupt

    def fetch(
        self, run: str, snapshot: SnapshotId, rank: int, world_size: int, source: str, uid: int, holder: str
    ) -> tuple[Lease, str]:
        """(lease of the slot, the source that served). A source that fails its checksums is set aside and the next
        serves; Corrupt or RestoreFailed when none is left, naming what was wrong with each."""
        problems: list[str] = []
        if source in ("", MEMORY):
            lease = self._from_memory(run, snapshot, rank, world_size, holder, problems)
            if lease:
                return lease, MEMORY
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
        lease = self._begin(header, holder)
        slot = lease.slot
        try:
            self._fill(tier, manifest, lease)
        except BaseException:
            self._arena.release(lease.id)
            self._arena.free(slot)
            raise
        return lease

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

    def _begin(self, header: SlotHeader, holder: str) -> Lease:
        deadline = time.monotonic() + SLOT_DEADLINE_S
        while True:
            try:
                with self._arena.lock:  # nobody may take the slot before it is leased
                    return self._arena.lease(self._arena.begin_restore(header), holder)
            except SlotNotReady:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.005)


def _check_world(snapshot: SnapshotId, saved: int, wanted: int) -> None:
    if saved != wanted:
        raise StateMismatch(
            f"{snapshot} was saved by {saved} ranks, this job has {wanted}",
            f"start the job with {saved} ranks: restores into another world size are not supported yet",
        )
