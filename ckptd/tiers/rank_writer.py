"""Writing the shard of one rank: into a folder with a temporary name, synced whole, then renamed.

Layer: tiers. Invariants: ``rank-00003`` appears with everything in it on the device or not at all, so a late or doubled
writer can never tear what another one finished; a folder that is there with the same bytes stays untouched.
"""

from __future__ import annotations

import shutil

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from ckptd import files
from ckptd.errors import CommitConflict, Corrupt, InvalidRequest
from ckptd.failpoints import failpoint
from ckptd.format.blocks import SlotLayout, check_blocks, digest
from ckptd.format.manifest import INDEX_NAME, ArrayRecord, RankRecord
from ckptd.model import DTYPE_CODE, DTYPES
from ckptd.tiers import metadata
from ckptd.tiers.arrays import StoredArray, sync_folders, write_array
from ckptd.tiers.failures import file_errors
from ckptd.tiers.flush import Flusher
from ckptd.tiers.naming import CheckpointPaths
from ckptd.tiers.spec import Codec
from ckptd.tiers.tier import Progress


def record_for(
    rank: int, layout: SlotLayout, payload: memoryview, table: npt.NDArray[np.uint32], what: str
) -> RankRecord:
    """What the manifest says of a rank. The index is checked against its CRCs on the way."""
    if len(payload) < layout.payload_bytes or len(table) != layout.blocks:
        raise InvalidRequest(f"{what}: payload of {len(payload)} bytes, {len(table)} CRCs: not those of the layout")
    index = payload[: layout.index_bytes]
    check_blocks(index, layout.block_bytes, table[layout.blocks_of(0, layout.index_bytes)], f"{what}/{INDEX_NAME}")
    arrays = tuple(
        ArrayRecord(segment.dtype, segment.size_bytes, digest(table[layout.blocks_of(offset, segment.size_bytes)]))
        for segment, offset in zip(layout.segments, layout.segment_offsets, strict=True)
    )
    return RankRecord(rank, layout.index_bytes, int(crc32c(index)), arrays)


def write_rank(
    paths: CheckpointPaths,
    codec: Codec,
    rank: int,
    layout: SlotLayout,
    payload: memoryview,
    table: npt.NDArray[np.uint32],
    on_progress: Progress,
) -> RankRecord:
    """See ``Tier.write_rank``."""
    record = record_for(rank, layout, payload, table, paths.what(rank))
    index_file = bytes(payload[: layout.index_bytes]) + np.ascontiguousarray(table, dtype="<u4").tobytes()
    folder = paths.rank(rank)
    with file_errors(paths.folder, "write the checkpoint"):
        if holds(paths, record, layout, index_file):
            files.fsync_path(paths.folder)  # a crash may have come between the rename and its fsync
            on_progress(layout.payload_bytes)
            return record
        if paths.manifest.exists():
            raise CommitConflict(f"{paths.what(rank)}: committed already, with other bytes")
        files.make_folders(paths.folder, below=paths.root)
        metadata.put_group(paths.folder, {"run": paths.run, "step": paths.snapshot.step})
        discard_temporaries(paths, rank)
        temporary = paths.new_temporary(rank)
        try:
            temporary.mkdir()
            _fill(paths, temporary.name, codec, record, layout, payload, index_file, on_progress)
            if not files.publish_folder(temporary, folder) and not holds(paths, record, layout, index_file):
                shutil.rmtree(folder)  # damaged: it was written whole, and bytes of a rank never differ
                if not files.publish_folder(temporary, folder):
                    raise CommitConflict(f"{paths.what(rank)}: another writer keeps writing it")
        finally:
            discard_temporaries(paths, rank)
    return record


def _fill(
    paths: CheckpointPaths,
    temporary: str,
    codec: Codec,
    record: RankRecord,
    layout: SlotLayout,
    payload: memoryview,
    index_file: bytes,
    on_progress: Progress,
) -> None:
    folder = paths.folder / temporary
    metadata.put_group(folder, {"rank": record.rank, "block_bytes": layout.block_bytes})
    with Flusher() as flusher:
        for segment, offset in zip(layout.segments, layout.segment_offsets, strict=True):
            failpoint("tier.before_array")
            data = payload[offset : offset + segment.size_bytes]
            dtype = DTYPES[DTYPE_CODE[segment.dtype]]
            write_array(folder / dtype.name, dtype, data, layout.block_bytes, codec, flusher, on_progress)
            failpoint("tier.after_array")
        flusher.finish()
        for segment in layout.segments:
            sync_folders(folder / segment.dtype, flusher)
        failpoint("tier.before_index")
        files.write_atomic(folder / INDEX_NAME, index_file)
        flusher.finish()


def holds(paths: CheckpointPaths, record: RankRecord, layout: SlotLayout, index_file: bytes) -> bool:
    """Whether the rank's folder is there with these bytes: the same index and CRCs, every chunk of the right size."""
    folder = paths.rank(record.rank)
    try:
        if (folder / INDEX_NAME).read_bytes() != index_file:
            return False
        return not any(
            StoredArray.describe(folder / a.dtype, paths.what(record.rank, a.dtype), a, layout.block_bytes).missing()
            for a in record.arrays
        )
    except (FileNotFoundError, NotADirectoryError, Corrupt):
        return False


def discard_temporaries(paths: CheckpointPaths, rank: int) -> None:
    """Remove what unfinished writers of ``rank`` left. What cannot be removed now is harmless: no name leads to it,
    and ``delete`` takes it along."""
    for leftover in paths.temporaries(rank):
        shutil.rmtree(leftover, ignore_errors=True)
