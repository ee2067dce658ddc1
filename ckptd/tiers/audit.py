"""What a checkpoint lacks, by name and size (``missing``) or by reading every byte (``verify``).

Layer: tiers. Invariants: planned is compared with what is there, never with what a writer said; every problem becomes
one line that names its file.
"""

from __future__ import annotations

from collections.abc import Iterator

from ckptd.errors import CkptdError, Corrupt, TierFailed
from ckptd.format.blocks import CRC_BYTES
from ckptd.format.manifest import INDEX_NAME, Manifest, RankRecord
from ckptd.tiers import metadata
from ckptd.tiers.arrays import StoredArray
from ckptd.tiers.failures import file_errors
from ckptd.tiers.naming import CheckpointPaths, layout_of_record
from ckptd.tiers.rank_reader import read_index
from ckptd.tiers.reading import read_checked
from ckptd.tiers.tier import Progress


def missing(paths: CheckpointPaths, manifest: Manifest) -> list[str]:
    """See ``Tier.missing``."""
    return [line for record in manifest.ranks for line in missing_of_rank(paths, manifest, record)]


def missing_of_rank(paths: CheckpointPaths, manifest: Manifest, record: RankRecord) -> list[str]:
    """What is not there of one rank, or not as long as it must be."""
    layout = layout_of_record(record, manifest.block_bytes)
    expected, index = layout.index_bytes + layout.blocks * CRC_BYTES, paths.index(record.rank)
    lines = []
    with file_errors(index, "look at"):
        try:
            size = index.stat().st_size
            if size != expected:
                lines.append(f"{paths.what(record.rank, INDEX_NAME)}: has {size} bytes, not {expected}")
        except (FileNotFoundError, NotADirectoryError):
            lines.append(f"{paths.what(record.rank, INDEX_NAME)}: is not there")
    for array in record.arrays:
        what = paths.what(record.rank, array.dtype)
        try:
            folder = paths.rank(record.rank) / array.dtype
            lines += StoredArray.describe(folder, what, array, manifest.block_bytes).missing()
        except Corrupt as error:
            lines.append(error.message)
    return lines


def verify(paths: CheckpointPaths, manifest: Manifest, on_progress: Progress) -> list[str]:
    """See ``Tier.verify``; ``manifest`` is already checked."""
    lines = list(_group_problems(paths, manifest))
    for record in manifest.ranks:
        lines += missing_of_rank(paths, manifest, record)
        lines += _read_problems(paths, manifest, record, on_progress)
    return list(dict.fromkeys(lines))  # what is missing also fails to be read


def _group_problems(paths: CheckpointPaths, manifest: Manifest) -> Iterator[str]:
    folders = [(paths.folder, paths.what())]
    folders += [(paths.rank(record.rank), paths.what(record.rank)) for record in manifest.ranks]
    for folder, what in folders:
        try:
            metadata.load(folder, what)
        except CkptdError as error:
            yield error.message


def _read_problems(paths: CheckpointPaths, manifest: Manifest, record: RankRecord, on_progress: Progress) -> list[str]:
    layout = layout_of_record(record, manifest.block_bytes)
    try:
        _, table = read_index(paths, record, manifest.block_bytes)
    except (Corrupt, TierFailed) as error:
        return [error.message]  # without its table nothing of the rank can be checked
    lines = []
    for array, offset in zip(record.arrays, layout.segment_offsets, strict=True):
        what = paths.what(record.rank, array.dtype)
        crcs = table[layout.blocks_of(offset, array.size_bytes)]
        try:
            folder = paths.rank(record.rank) / array.dtype
            stored = StoredArray.describe(folder, what, array, manifest.block_bytes)
            lines += read_checked(stored, None, crcs, manifest.block_bytes, on_progress)
        except (Corrupt, TierFailed) as error:
            lines.append(error.message)
    return lines
