"""The tier on a local or mounted path: one Zarr v3 group per checkpoint, the manifest last.

Layer: tiers; the facade over ``rank_writer``, ``rank_reader`` and ``audit``. Invariants: a checkpoint exists when its
manifest does; the manifest is put only after everything it names was seen through this tier; it is removed first.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from ckptd import files
from ckptd.errors import (
    CommitConflict,
    Corrupt,
    DrainFailed,
    FormatTooNew,
    InvalidRequest,
    TierFailed,
    TierNotShared,
    UnknownStep,
)
from ckptd.failpoints import failpoint
from ckptd.format.blocks import SlotLayout
from ckptd.format.manifest import MANIFEST_NAME, Manifest, RankRecord, decode_manifest, encode_manifest
from ckptd.model import SnapshotId, check_run_name
from ckptd.tiers import audit, rank_reader, rank_writer
from ckptd.tiers.failures import file_errors
from ckptd.tiers.naming import INCARNATIONS, CheckpointPaths, layout_of_record, record_of, snapshot_of_folder
from ckptd.tiers.spec import TierSpec
from ckptd.tiers.tier import Progress, StoredSnapshot, Tier

_RECORD_SUFFIX: Final = ".json"
_MARK_NAME: Final = ".ckptd-tier"


class ZarrTier(Tier):
    """See ``Tier`` for the contract. Holds its spec, and the mark by which it knows its root again."""

    def __init__(self, spec: TierSpec) -> None:
        self._spec = spec
        self._root = spec.path
        self._mark: bytes | None = None

    @property
    def spec(self) -> TierSpec:
        return self._spec

    def open(self) -> None:
        with file_errors(self._root, "open the tier"):
            files.make_folders(self._root, below=Path("/"))
            self.probe()
        with file_errors(self._root, "write to the tier"), tempfile.TemporaryFile(dir=self._root) as file:
            file.write(b"ckptd")
            file.flush()
        with file_errors(self._root / _MARK_NAME, "mark the tier"):
            with suppress(CommitConflict):  # marked before, by us or by another node
                files.write_new(self._root / _MARK_NAME, os.urandom(8).hex().encode())
            self._mark = (self._root / _MARK_NAME).read_bytes()

    def probe(self) -> None:
        """Also checks the mark: the empty mount point of an unmounted tier must not read as an empty tier."""
        with file_errors(self._root, "read the tier"), os.scandir(self._root) as entries:
            next(entries, None)
        if self._mark is not None:
            with file_errors(self._root / _MARK_NAME, "recognise the tier"):
                if (self._root / _MARK_NAME).read_bytes() != self._mark:
                    raise TierFailed(f"{self._root} is another tier than at the start", "mount what belongs there")

    # --- what is there --------------------------------------------------------------------------------------------
    def runs(self) -> list[str]:
        self.probe()
        with file_errors(self._root, "list the runs"):
            return sorted(path.name for path in self._root.iterdir() if _is_run(path))

    def snapshots(self, run: str) -> list[StoredSnapshot]:
        self.probe()  # an unmounted tier must not read as an empty one
        found = []
        with file_errors(self._root / check_run_name(run), "list the checkpoints"):
            try:
                names = os.listdir(self._root / run)
            except FileNotFoundError:
                return []
            for name in names:
                snapshot = snapshot_of_folder(name)
                if snapshot is not None:
                    found.append(StoredSnapshot(snapshot, (self._root / run / name / MANIFEST_NAME).exists()))
        return sorted(found)

    def manifest(self, run: str, snapshot: SnapshotId) -> Manifest:
        paths = self._paths(run, snapshot)
        self.probe()
        with file_errors(paths.manifest, "read"):
            try:
                data = paths.manifest.read_bytes()
            except FileNotFoundError as error:
                raise UnknownStep(f"{paths.what()}: no checkpoint") from error
        manifest = decode_manifest(data, paths.what(part=MANIFEST_NAME))
        if (manifest.run, manifest.snapshot) != (run, snapshot):
            raise Corrupt(f"{paths.what(part=MANIFEST_NAME)}: is of {manifest.run}, {manifest.snapshot}")
        return manifest

    def layout_of(self, manifest: Manifest, rank: int) -> SlotLayout:
        return layout_of_record(self._record(manifest, rank), manifest.block_bytes)

    # --- drain and commit -----------------------------------------------------------------------------------------
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
        self.probe()
        paths = self._paths(run, snapshot)
        return rank_writer.write_rank(
            paths, self._spec.codec, rank, layout, payload, table, on_progress or _ignore_progress
        )

    def missing(self, manifest: Manifest) -> list[str]:
        self.probe()
        unplanned = [f"rank {rank} is not in the manifest" for rank in self._left_out(manifest)]
        return unplanned + audit.missing(self._paths(manifest.run, manifest.snapshot), manifest)

    def commit(self, manifest: Manifest) -> None:
        paths = self._paths(manifest.run, manifest.snapshot)
        self.probe()
        with file_errors(paths.manifest, "commit"):
            if paths.manifest.exists():
                raise CommitConflict(f"{paths.what()}: is committed already")
            self._check_complete(paths, manifest)
            failpoint("tier.before_manifest")
            for folder in (self._root, paths.run_folder):  # another node may have made them and not synced yet
                files.fsync_path(folder)
            files.write_new(paths.manifest, encode_manifest(manifest))
            failpoint("tier.after_manifest")

    def delete(self, run: str, snapshot: SnapshotId) -> None:
        paths = self._paths(run, snapshot)
        self.probe()
        with file_errors(paths.folder, "delete"):
            if not paths.folder.exists():
                return
            paths.manifest.unlink(missing_ok=True)
            files.fsync_path(paths.folder)
            failpoint("tier.mid_delete")
            try:
                shutil.rmtree(paths.folder)
            except FileNotFoundError:  # another deletion of the same folder is under way
                shutil.rmtree(paths.folder, ignore_errors=True)
            files.fsync_path(paths.run_folder)

    # --- restore and verify ---------------------------------------------------------------------------------------
    def read_index(
        self, run: str, snapshot: SnapshotId, record: RankRecord, block_bytes: int
    ) -> tuple[bytes, npt.NDArray[np.uint32]]:
        return rank_reader.read_index(self._paths(run, snapshot), record, block_bytes)

    def read_rank(
        self, manifest: Manifest, rank: int, payload: memoryview, on_progress: Progress | None = None
    ) -> tuple[SlotLayout, npt.NDArray[np.uint32]]:
        paths, record = self._paths(manifest.run, manifest.snapshot), self._record(manifest, rank)
        return rank_reader.read_rank(paths, manifest, record, payload, on_progress or _ignore_progress)

    def verify(self, run: str, snapshot: SnapshotId, on_progress: Progress | None = None) -> list[str]:
        try:
            manifest = self.manifest(run, snapshot)
        except (Corrupt, FormatTooNew) as error:
            return [error.message]
        return audit.verify(self._paths(run, snapshot), manifest, on_progress or _ignore_progress)

    # --- records of incarnations ----------------------------------------------------------------------------------
    def record_incarnation(self, run: str, name: str, data: bytes) -> None:
        folder = self._root / check_run_name(run) / INCARNATIONS
        path = folder / f"{check_run_name(name)}{_RECORD_SUFFIX}"
        self.probe()
        with file_errors(path, "write"):
            files.make_folders(folder, below=self._root)
            try:
                files.write_new(path, data)
            except CommitConflict:
                if path.read_bytes() != data:
                    raise

    def incarnations(self, run: str) -> dict[str, bytes]:
        folder = self._root / check_run_name(run) / INCARNATIONS
        self.probe()
        with file_errors(folder, "read"):
            try:
                names = sorted(os.listdir(folder))
            except FileNotFoundError:
                return {}
            found = [name.removesuffix(_RECORD_SUFFIX) for name in names if name.endswith(_RECORD_SUFFIX)]
            return {name: (folder / f"{name}{_RECORD_SUFFIX}").read_bytes() for name in found}

    # --------------------------------------------------------------------------------------------------------------
    def _paths(self, run: str, snapshot: SnapshotId) -> CheckpointPaths:
        return CheckpointPaths(self._spec.url, self._root, run, snapshot)

    def _left_out(self, manifest: Manifest) -> list[int]:
        """Ranks of the world that the manifest does not name; a node tier's manifest names those of its node only."""
        named = {record.rank for record in manifest.ranks}
        planned = range(manifest.world_size) if self._spec.scope == "shared" else ()
        return [rank for rank in planned if rank not in named]

    def _check_complete(self, paths: CheckpointPaths, manifest: Manifest) -> None:
        left_out = self._left_out(manifest)
        if left_out or not manifest.ranks:
            raise DrainFailed(f"{paths.what()}: ranks {_some(left_out)} are not in the manifest")
        unseen = [record.rank for record in manifest.ranks if not paths.index(record.rank).exists()]
        if unseen:
            raise TierNotShared(f"{paths.what()}: ranks {_some(unseen)} were written but are not to be seen here")
        for record in manifest.ranks:
            rank_reader.read_index(paths, record, manifest.block_bytes)
            rank_writer.discard_temporaries(paths, record.rank)
        problems = audit.missing(paths, manifest)
        if problems:
            raise Corrupt(problems[0] + (f"; and {len(problems) - 1} more" if len(problems) > 1 else ""))

    def _record(self, manifest: Manifest, rank: int) -> RankRecord:
        record = record_of(manifest, rank)
        if record is None:
            raise UnknownStep(f"{self._spec.url} {manifest.run}: {manifest.snapshot} has no rank {rank}")
        return record


def _is_run(path: Path) -> bool:
    try:
        check_run_name(path.name)
    except InvalidRequest:
        return False
    try:
        return any(name == INCARNATIONS or snapshot_of_folder(name) for name in os.listdir(path))
    except (NotADirectoryError, FileNotFoundError, PermissionError):
        return False  # a file, a run that went meanwhile, or one that is another user's: ``snapshots`` tells them apart


def _some(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (" ..." if len(ranks) > 8 else "")


def _ignore_progress(_: int) -> None:
    pass
