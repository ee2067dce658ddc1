"""The seam between the daemon and a place where checkpoints are kept.

Layer: tiers, pure. Implementations: ``zarr_tier.ZarrTier`` (a local or mounted path).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ckptd.format.blocks import SlotLayout
from ckptd.format.manifest import Manifest, RankRecord
from ckptd.model import SnapshotId
from ckptd.tiers.spec import TierSpec

Progress = Callable[[int], None]


class StoredSnapshot(NamedTuple):
    """A snapshot a tier holds something of. Without ``is_committed`` it is not a checkpoint and never restored."""

    snapshot: SnapshotId
    is_committed: bool


class Tier(Protocol):
    """A store of checkpoints.

    Contract. Methods block and may be called from several threads at once; a tier keeps no state between calls, so a
    restarted daemon goes on where it was. Nobody retries inside: an error means that this call did not succeed, and
    every call may be repeated. TierFailed says that the tier did not answer or could not store, which is never the
    same as "there is nothing"; Corrupt says that it answered with bytes that do not match their checksums. When a
    writing method returns, what it wrote survives a power cut. Buffers that were handed over are neither kept nor
    changed after return (``read_rank`` fills the one it is given). ``on_progress`` is called in the calling thread
    with the bytes done since the last call, at most some tens of MiB each.
    """

    @property
    def spec(self) -> TierSpec:
        """What the tier was made from."""
        ...

    def open(self) -> None:
        """Make the root and check that it can be written; TierFailed with a hint otherwise."""
        ...

    def probe(self) -> None:
        """A cheap health check that changes nothing: TierFailed when the tier does not answer."""
        ...

    def runs(self) -> list[str]:
        """The runs that have anything here, sorted."""
        ...

    def snapshots(self, run: str) -> list[StoredSnapshot]:
        """What is stored of ``run``, oldest first; ``[]`` for a run not known here."""
        ...

    def manifest(self, run: str, snapshot: SnapshotId) -> Manifest:
        """The manifest of a checkpoint; UnknownStep when it is not committed, Corrupt or FormatTooNew when it cannot
        be read."""
        ...

    def layout_of(self, manifest: Manifest, rank: int) -> SlotLayout:
        """The slot layout of a rank; UnknownStep when the manifest does not name the rank."""
        ...

    def write_rank(
        self,
        run: str,
        snapshot: SnapshotId,
        rank: int,
        layout: SlotLayout,
        payload: memoryview,
        table: npt.NDArray[np.uint32],
        on_progress: Progress | None = None,
    ) -> RankRecord:
        """Store the shard of one rank durably, whole or not at all, and say what the manifest must say of it.

        Idempotent: when the rank is there already with these bytes it stays. CommitConflict when the checkpoint is
        committed with other bytes.
        """
        ...

    def missing(self, manifest: Manifest) -> list[str]:
        """What a commit of ``manifest`` would still miss, a line each; ``[]`` when every planned object is whole."""
        ...

    def commit(self, manifest: Manifest) -> None:
        """Make the checkpoint exist. Every index is read again and checked and every planned array is compared with
        what is there before the manifest is put: TierNotShared when a rank's part is not to be seen, Corrupt when it
        is broken, CommitConflict when another commit won."""
        ...

    def read_index(
        self, run: str, snapshot: SnapshotId, record: RankRecord, block_bytes: int
    ) -> tuple[bytes, npt.NDArray[np.uint32]]:
        """A rank's index bytes and its whole table of block CRCs, both checked against ``record``."""
        ...

    def read_rank(
        self, manifest: Manifest, rank: int, payload: memoryview, on_progress: Progress | None = None
    ) -> tuple[SlotLayout, npt.NDArray[np.uint32]]:
        """Fill ``payload`` (at least ``layout_of(manifest, rank).payload_bytes``, writable) with a rank's shard, every
        block checked, padding zeroed; Corrupt names array and block, and ``payload`` is then undefined."""
        ...

    def verify(self, run: str, snapshot: SnapshotId, on_progress: Progress | None = None) -> list[str]:
        """Read everything of a checkpoint; every problem found as one line, ``[]`` when it is whole. Raises UnknownStep
        and TierFailed (the tier as a whole), never for corruption."""
        ...

    def delete(self, run: str, snapshot: SnapshotId) -> None:
        """Remove a checkpoint, its manifest first and durably. Resumable and idempotent."""
        ...

    def record_incarnation(self, run: str, name: str, data: bytes) -> None:
        """Keep a small record of an incarnation for ever; CommitConflict when ``name`` holds other bytes."""
        ...

    def incarnations(self, run: str) -> dict[str, bytes]:
        """Every record of ``record_incarnation``, by name; ``{}`` for a run not known here."""
        ...
