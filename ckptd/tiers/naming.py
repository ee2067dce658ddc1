"""Where things lie in a tier on a path, and how messages name them.

Layer: tiers, pure. Invariants: run and record names are checked before they become part of a path.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ckptd.format.blocks import SlotLayout
from ckptd.format.manifest import (
    INDEX_NAME,
    MANIFEST_NAME,
    Manifest,
    RankRecord,
    folder_name,
    parse_folder_name,
    rank_folder,
)
from ckptd.model import Segment, SnapshotId, check_run_name

INCARNATIONS: Final = "incarnations"
_TEMPORARY: Final = ".tmp-"


@dataclass(frozen=True)
class CheckpointPaths:
    """The paths of one checkpoint."""

    url: str
    root: Path
    run: str
    snapshot: SnapshotId

    def __post_init__(self) -> None:
        check_run_name(self.run)

    @property
    def run_folder(self) -> Path:
        return self.root / self.run

    @property
    def folder(self) -> Path:
        return self.run_folder / folder_name(self.snapshot)

    @property
    def manifest(self) -> Path:
        return self.folder / MANIFEST_NAME

    def rank(self, rank: int) -> Path:
        return self.folder / rank_folder(rank)

    def index(self, rank: int) -> Path:
        return self.rank(rank) / INDEX_NAME

    def what(self, rank: int | None = None, part: str = "") -> str:
        """``file:///ckpt RUN/step-.../rank-00003/float32``, for messages."""
        parts = [self.run, folder_name(self.snapshot), *([] if rank is None else [rank_folder(rank)]), part]
        return f"{self.url} {'/'.join(filter(None, parts))}"

    def new_temporary(self, rank: int) -> Path:
        """A folder name for the unfinished part of ``rank``, unlike any other."""
        return self.folder / f"{_TEMPORARY}{rank_folder(rank)}.{os.getpid()}.{os.urandom(4).hex()}"

    def temporaries(self, rank: int) -> list[Path]:
        """What writers of ``rank`` left unfinished."""
        return sorted(self.folder.glob(f"{_TEMPORARY}{rank_folder(rank)}.*"))


def snapshot_of_folder(name: str) -> SnapshotId | None:
    """The snapshot a folder is for, or None unless this is the one name that ckptd gives it."""
    snapshot = parse_folder_name(name)
    return snapshot if snapshot is not None and folder_name(snapshot) == name else None


def layout_of_record(record: RankRecord, block_bytes: int) -> SlotLayout:
    segments = [Segment(array.dtype, array.size_bytes) for array in record.arrays]
    return SlotLayout.plan(record.index_bytes, segments, block_bytes)


def record_of(manifest: Manifest, rank: int) -> RankRecord | None:
    return next((record for record in manifest.ranks if record.rank == rank), None)
