"""Bytes of a shard index: magic, version, a JSON head (name table, segments), the columns, the tree.

The columns change only with the plan; the tree changes at every save. So a client encodes the columns once per plan
(``encode_columns``) and puts the tree behind them (``encode_index``).
"""

from __future__ import annotations

import json
import struct
from typing import Any, Final

import numpy as np

from ckptd.errors import Corrupt, FormatTooNew
from ckptd.model import DTYPES, Segment, ShardIndex

MAGIC: Final = b"CKPTINDX"
VERSION: Final = 1
_HEAD = struct.Struct("<8sIIQQ")  # magic, version, boxes, head bytes, column bytes; the tree is the rest
_COLUMNS: Final = (("name_ids", "<i4"), ("dtypes", "u1"), ("ndims", "u1"), ("dims", "<i8"), ("positions", "<i8"))


def encode_columns(index: ShardIndex) -> bytes:
    """Everything of the index but its tree."""
    head = json.dumps(
        {"names": index.names, "segments": [[s.dtype, s.size_bytes] for s in index.segments], "dims": len(index.dims)},
        separators=(",", ":"),
    ).encode()
    columns = b"".join(np.ascontiguousarray(getattr(index, name), dtype=dtype).tobytes() for name, dtype in _COLUMNS)
    return _HEAD.pack(MAGIC, VERSION, len(index.name_ids), len(head), len(columns)) + head + columns


def encode_index(index: ShardIndex) -> bytes:
    return encode_columns(index) + index.tree


def decode_index(data: bytes | memoryview, what: str) -> ShardIndex:
    """The inverse of ``encode_index``; Corrupt or FormatTooNew, naming ``what``, on bytes that are not one."""
    view = memoryview(data)
    if len(view) < _HEAD.size or bytes(view[:8]) != MAGIC:
        raise Corrupt(f"{what}: not a shard index (wrong magic)")
    _, version, boxes, head_bytes, column_bytes = _HEAD.unpack_from(view)
    if version > VERSION:
        raise FormatTooNew(
            f"{what}: index format {version} is newer than this ckptd reads ({VERSION})",
            f"use a ckptd that reads index format {version}",
        )
    start = _HEAD.size + head_bytes
    try:
        head: dict[str, Any] = json.loads(bytes(view[_HEAD.size : start]))
        counts = {"dims": int(head["dims"])}
        columns, at = {}, start
        for name, dtype in _COLUMNS:
            column = np.frombuffer(view, dtype=dtype, count=counts.get(name, boxes), offset=at)
            columns[name], at = column, at + column.nbytes
        segments = tuple(Segment(str(dtype), int(size)) for dtype, size in head["segments"])
        index = ShardIndex(tuple(head["names"]), **columns, segments=segments, tree=bytes(view[at:]))
    except (ValueError, KeyError, TypeError) as error:
        raise Corrupt(f"{what}: shard index cannot be decoded: {error}") from error
    if at != start + column_bytes or (boxes and int(index.dtypes.max()) >= len(DTYPES)):
        raise Corrupt(f"{what}: shard index columns are inconsistent")
    return index
