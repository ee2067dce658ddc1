"""Reading the shard of one rank, every byte checked against the manifest.

Layer: tiers. The chain: the manifest carries its own CRC; it vouches for the index (by CRC) and for the block CRCs of
every array (by digest); the index vouches for its own entries of the table; the table vouches for every block.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from ckptd.errors import Corrupt, InvalidRequest
from ckptd.format.blocks import CRC_BYTES, SlotLayout, check_blocks, digest
from ckptd.format.manifest import INDEX_NAME, Manifest, RankRecord
from ckptd.tiers.arrays import StoredArray
from ckptd.tiers.failures import file_errors
from ckptd.tiers.naming import CheckpointPaths, layout_of_record
from ckptd.tiers.reading import read_checked
from ckptd.tiers.tier import Progress


def read_index(paths: CheckpointPaths, record: RankRecord, block_bytes: int) -> tuple[bytes, npt.NDArray[np.uint32]]:
    """See ``Tier.read_index``."""
    layout, what = layout_of_record(record, block_bytes), paths.what(record.rank, INDEX_NAME)
    path = paths.index(record.rank)
    with file_errors(path, "read"):
        try:
            data = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise Corrupt(f"{what}: is not there") from error
    expected = layout.index_bytes + layout.blocks * CRC_BYTES
    if len(data) != expected:
        raise Corrupt(f"{what}: has {len(data)} bytes, not {expected}")
    index = data[: layout.index_bytes]
    table = np.frombuffer(data, dtype="<u4", offset=layout.index_bytes).astype(np.uint32, copy=False)
    if crc32c(index) != record.index_crc:
        raise Corrupt(f"{what}: index bytes do not match their CRC-32C in the manifest")
    check_blocks(memoryview(index), block_bytes, table[layout.blocks_of(0, len(index))], what)
    for array, offset in zip(record.arrays, layout.segment_offsets, strict=True):
        if digest(table[layout.blocks_of(offset, array.size_bytes)]) != array.digest:
            raise Corrupt(f"{what}: block CRCs of {array.dtype} do not match their digest in the manifest")
    return index, table


def read_rank(
    paths: CheckpointPaths, manifest: Manifest, record: RankRecord, payload: memoryview, on_progress: Progress
) -> tuple[SlotLayout, npt.NDArray[np.uint32]]:
    """See ``Tier.read_rank``."""
    layout = layout_of_record(record, manifest.block_bytes)
    if payload.readonly or len(payload) < layout.payload_bytes:
        raise InvalidRequest(f"{paths.what(record.rank)}: needs a writable buffer of {layout.payload_bytes} bytes")
    index, table = read_index(paths, record, manifest.block_bytes)
    payload[: len(index)] = index
    end = len(index)
    for array, offset in zip(record.arrays, layout.segment_offsets, strict=True):
        payload[end:offset] = bytes(offset - end)
        end = offset + array.size_bytes
        what = paths.what(record.rank, array.dtype)
        stored = StoredArray.describe(paths.rank(record.rank) / array.dtype, what, array, manifest.block_bytes)
        crcs = table[layout.blocks_of(offset, array.size_bytes)]
        problems = read_checked(stored, payload[offset:end], crcs, manifest.block_bytes, on_progress)
        if problems:
            raise Corrupt("; ".join(problems[:3]))
    payload[end : layout.payload_bytes] = bytes(layout.payload_bytes - end)
    return layout, table
