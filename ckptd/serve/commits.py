"""Commits and retention in tiers: by the coordinator in shared ones, by each node in its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence

import structlog

from ckptd.errors import CkptdError, CommitConflict
from ckptd.format.manifest import Manifest, RankRecord
from ckptd.model import Roster, SnapshotId
from ckptd.tiers.retention import expendable
from ckptd.tiers.tier import Tier

log = structlog.get_logger()


def commit(tier: Tier, manifest: Manifest) -> None:
    """Put the manifest; CommitConflict only when another checkpoint of the same name was committed."""
    try:
        tier.commit(manifest)
    except CommitConflict:
        # Somebody finished this very checkpoint before us (`prune --finish`, or we, before a restart).
        if tier.manifest(manifest.run, manifest.snapshot).ranks != manifest.ranks:
            raise


def retain(tiers: Iterable[Tier], run: str, keeps: set[SnapshotId]) -> None:
    """Delete what the retention rule lets go; a tier that cannot be read is asked again after the next drain."""
    for tier in tiers:
        try:
            for deletion in expendable_in(tier, run, keeps):
                tier.delete(run, deletion)
        except CkptdError as error:
            log.warning("retention postponed", run=run, tier=tier.spec.url, reason=error.message)


def expendable_in(tier: Tier, run: str, keeps: set[SnapshotId]) -> list[SnapshotId]:
    """What retention lets go in ``tier``. ``keeps`` are leased or being drained. A checkpoint counts as verified when
    its commit is complete: every array and index that the manifest names is there."""
    stored = tier.snapshots(run)
    committed = sorted((s.snapshot for s in stored if s.is_committed), reverse=True)
    verified = set()
    for snapshot in committed[: tier.spec.keep + 1]:
        try:
            if not tier.missing(tier.manifest(run, snapshot)):
                verified.add(snapshot)
        except CkptdError as error:
            log.warning("checkpoint does not count as verified", run=run, snapshot=str(snapshot), reason=error.message)
    return [d.snapshot for d in expendable(stored, tier.spec.keep, verified, keeps, keeps)]


def manifest_of_node(
    run: str, snapshot: SnapshotId, parent: SnapshotId | None, roster: Roster, records: Sequence[RankRecord]
) -> Manifest:
    """The manifest of one node's ranks, for a tier of its own."""
    return Manifest(
        run=run,
        snapshot=snapshot,
        parent=parent,
        world_size=roster.world_size,
        roster_version=roster.version,
        block_bytes=roster.block_bytes,
        created_at_s=time.time(),
        ranks=tuple(records),
    )


class NodeCommits:
    """Commits of one incarnation in tiers of this node's own: a manifest of this node's ranks, once all are written.

    ``manifest_of(snapshot, records)`` makes the manifest, ``keeps()`` says what retention must leave alone.
    """

    def __init__(
        self,
        ranks: Callable[[], set[int]],
        manifest_of: Callable[[SnapshotId, list[RankRecord]], Manifest],
        keeps: Callable[[], set[SnapshotId]],
    ) -> None:
        self._ranks = ranks
        self._manifest_of = manifest_of
        self._keeps = keeps
        self._lock = threading.Lock()
        self._written: dict[str, tuple[SnapshotId, dict[int, RankRecord]]] = {}

    def written(self, tier: Tier, snapshot: SnapshotId, record: RankRecord) -> None:
        """A rank's shard is in ``tier``; the last of the node commits. Errors are those of ``Tier.commit``."""
        with self._lock:
            of, records = self._written.get(tier.spec.url, (snapshot, {}))
            if of != snapshot:
                records = {}
            records[record.rank] = record
            self._written[tier.spec.url] = (snapshot, records)
            if not self._ranks() <= records.keys():
                return
            del self._written[tier.spec.url]
        manifest = self._manifest_of(snapshot, [records[rank] for rank in sorted(records)])
        commit(tier, manifest)
        retain([tier], manifest.run, self._keeps())
