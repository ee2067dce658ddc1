"""What a node protects of one snapshot, and what a parity group protects together: records, as canonical JSON.

An image is, for each rank of the node in ascending order, the payload of its slot (index and segments, whole blocks),
then the slot's CRC table (uint32, little endian) zero-extended to whole blocks. The mutable header page is not in it:
the image's record has what is needed to write it again. A group's record lists the images of all its members by
position, and neither nodes nor addresses, so it stays the same when a node is replaced by one that holds the same
shards. Pure. Invariants: a record that exists is consistent (checked when it is made), and equal records have equal
bytes: what is decoded encodes to the bytes it came from.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, NamedTuple

from ckptd.errors import Corrupt, FormatTooNew, InvalidRequest
from ckptd.format.blocks import BOX_ALIGN_BYTES, CRC_BYTES, MAX_BLOCK_BYTES, SlotLayout
from ckptd.format.manifest import snapshot_from_json, snapshot_to_json
from ckptd.format.slot import SlotHeader
from ckptd.model import DTYPE_CODE, LARGEST_GROUP, Geometry, Segment, SnapshotId, check_run_name

VERSION: Final = 1
MOST_SHARDS: Final = 4096
_MOST_BYTES: Final = 1 << 48  # of one shard
_U32: Final = 1 << 32
_U64: Final = 1 << 64


def table_blocks_of(payload_blocks: int, block_bytes: int) -> int:
    """Blocks that the CRC table of a payload of ``payload_blocks`` fills in an image."""
    return -(-payload_blocks * CRC_BYTES // block_bytes)


class _Source(NamedTuple):
    """What all shards of a group have in common: written once."""

    run: str
    snapshot: SnapshotId
    block_bytes: int

    @classmethod
    def of(cls, shard: ShardRecord) -> _Source:
        return cls(shard.header.run, shard.header.snapshot, shard.header.layout.block_bytes)


@dataclass(frozen=True)
class ShardRecord:
    """One slot's part of an image: its header (generation 0) and the digest of its CRC table.

    Raises:
        InvalidRequest: a field is out of its range, or the layout is not that of the index and the segments.
    """

    header: SlotHeader
    table_digest: int

    def __post_init__(self) -> None:
        header, layout = self.header, self.header.layout
        _check_block_bytes(layout.block_bytes)
        _check_snapshot(header.run, header.snapshot)
        if header.parent is not None:
            _check_snapshot(header.run, header.parent)
        for name, value, bound in (
            ("rank", header.rank, header.world_size),
            ("world size", header.world_size, _U32),
            ("uid", header.uid, _U32),
            ("roster version", header.roster_version, _U64),
            ("generation", header.generation, 1),
            ("index CRC", header.index_crc, _U32),
            ("table digest", self.table_digest, _U32),
            ("index bytes", layout.index_bytes, _MOST_BYTES),
            *((f"{s.dtype} bytes", s.size_bytes, _MOST_BYTES) for s in layout.segments),
        ):
            _check_number(name, value, bound)
        if not isinstance(header.is_persisted, bool) or not math.isfinite(header.sealed_at_s):
            raise InvalidRequest(f"rank {header.rank}: flags or time of the seal cannot be")
        dtypes = [segment.dtype for segment in layout.segments]
        if len(set(dtypes)) != len(dtypes) or not set(dtypes) <= DTYPE_CODE.keys():
            raise InvalidRequest(f"rank {header.rank}: segments of dtypes {dtypes} cannot be")
        if layout != SlotLayout.plan(layout.index_bytes, layout.segments, layout.block_bytes):
            raise InvalidRequest(f"rank {header.rank}: layout is not that of its index and segments")

    @property
    def payload_blocks(self) -> int:
        return self.header.layout.blocks

    @property
    def table_blocks(self) -> int:
        return table_blocks_of(self.payload_blocks, self.header.layout.block_bytes)

    @property
    def blocks(self) -> int:
        return self.payload_blocks + self.table_blocks


@dataclass(frozen=True)
class Extent:
    """Blocks of an image that lie in one part of one shard.

    Attributes:
        shard: position in ``ImageRecord.shards``.
        is_table: they belong to the CRC table, else to the payload.
        first_block: of the part.
        blocks: how many, at least 1.
    """

    shard: int
    is_table: bool
    first_block: int
    blocks: int


@dataclass(frozen=True)
class ImageRecord:
    """What one node protects: its shards in ascending order of rank; empty for a node whose shards are not there.

    Raises:
        InvalidRequest: the shards are not of one snapshot, world size and block size, or their ranks do not ascend.
    """

    shards: tuple[ShardRecord, ...]

    def __post_init__(self) -> None:
        if len(self.shards) > MOST_SHARDS:
            raise InvalidRequest(f"an image of {len(self.shards)} shards cannot be: at most {MOST_SHARDS}")
        if any(one >= next_one for one, next_one in itertools.pairwise(self.ranks)):
            raise InvalidRequest(f"ranks of an image do not ascend: {list(self.ranks)}")
        _check_alike(self.shards)

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        return tuple(shard.header.rank for shard in self.shards)

    @property
    def blocks(self) -> int:
        return self._starts[-1]

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        """First image block of each shard's payload and table in turn; the image's end last."""
        lengths = itertools.chain.from_iterable((s.payload_blocks, s.table_blocks) for s in self.shards)
        return tuple(itertools.accumulate(lengths, initial=0))

    def extents(self, first_block: int, blocks: int) -> list[Extent]:
        """Where image blocks ``first_block .. first_block + blocks - 1`` lie, in order, clipped to the image."""
        at, end = max(0, first_block), min(first_block + blocks, self.blocks)
        found = []
        part = bisect.bisect_right(self._starts, at) - 1
        while at < end:
            start, stop = self._starts[part], min(end, self._starts[part + 1])
            if at < stop:
                found.append(Extent(part // 2, part % 2 == 1, at - start, stop - at))
                at = stop
            part += 1
        return found

    def span_of(self, rank: int) -> tuple[int, int]:
        """(first image block, blocks) of the payload and table of ``rank``; InvalidRequest when it is not in here."""
        if rank not in self.ranks:
            raise InvalidRequest(f"rank {rank} is not in this image: it has {list(self.ranks)}")
        shard = self.ranks.index(rank)
        return self._starts[2 * shard], self.shards[shard].blocks


@dataclass(frozen=True)
class GroupRecord:
    """What the members of a parity group protect together: their images by position, one for each of the k + m.

    Raises:
        InvalidRequest: the number of images is not that of the geometry, or an image is not of this snapshot.
    """

    run: str
    snapshot: SnapshotId
    geometry: Geometry
    block_bytes: int
    images: tuple[ImageRecord, ...]

    def __post_init__(self) -> None:
        _check_snapshot(self.run, self.snapshot)
        _check_block_bytes(self.block_bytes)
        k, m = self.geometry
        if k < 1 or m < 1 or k + m > LARGEST_GROUP or len(self.images) != k + m:
            raise InvalidRequest(f"a group of {len(self.images)} images cannot be {k}+{m}")
        shards = [shard for image in self.images for shard in image.shards]
        _check_alike(shards)
        if shards and _Source.of(shards[0]) != (self.run, self.snapshot, self.block_bytes):
            raise InvalidRequest(f"the images are not of {self.snapshot} of run {self.run!r}")
        if len({shard.header.rank for shard in shards}) < len(shards):
            raise InvalidRequest("a rank is in two images of a group")

    @cached_property
    def key(self) -> int:
        """A name for the record, 64 bit: the first 8 bytes of the SHA-256 of its encoding, little endian."""
        return int.from_bytes(hashlib.sha256(encode_group(self)).digest()[:8], "little")

    @cached_property
    def image_blocks(self) -> tuple[int, ...]:
        return tuple(image.blocks for image in self.images)


# --- encode -------------------------------------------------------------------------------------------------------
def encode_image(image: ImageRecord) -> bytes:
    source = _source_to_json(_Source.of(image.shards[0])) if image.shards else None
    return _json({"format": VERSION, "of": source, "shards": [_shard_to_json(s) for s in image.shards]})


def encode_group(group: GroupRecord) -> bytes:
    return _json(
        {
            "format": VERSION,
            "of": _source_to_json(_Source(group.run, group.snapshot, group.block_bytes)),
            "geometry": str(group.geometry),
            "images": [[_shard_to_json(shard) for shard in image.shards] for image in group.images],
        }
    )


def _source_to_json(source: _Source) -> dict[str, Any]:
    snapshot = snapshot_to_json(source.snapshot)
    return {"run": source.run, "snapshot": snapshot, "block_bytes": source.block_bytes}


def _shard_to_json(shard: ShardRecord) -> dict[str, Any]:
    header, layout = shard.header, shard.header.layout
    return {
        "rank": header.rank,
        "world_size": header.world_size,
        "uid": header.uid,
        "parent": snapshot_to_json(header.parent),
        "roster_version": header.roster_version,
        "index": {"bytes": layout.index_bytes, "crc32c": header.index_crc},
        "is_persisted": header.is_persisted,
        "sealed_at_s": float(header.sealed_at_s),
        "segments": [[segment.dtype, segment.size_bytes] for segment in layout.segments],
        "payload_bytes": layout.payload_bytes,
        "table_digest": shard.table_digest,
    }


def _json(body: dict[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


# --- decode -------------------------------------------------------------------------------------------------------
# What reading a value of the wrong type or shape may raise, beside the InvalidRequest of what cannot be.
_MALFORMED: Final = (InvalidRequest, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError)


def decode_image(data: bytes, what: str) -> ImageRecord:
    """The inverse of ``encode_image``; Corrupt or FormatTooNew, naming ``what``."""
    body = _load(data, what, "image record")
    try:
        source = _source_from_json(body["of"]) if body["of"] is not None else None
        image = _image_from_json(source, body["shards"])
    except _MALFORMED as error:
        raise Corrupt(f"{what}: image record: {_reason(error)}") from error
    if encode_image(image) != data:
        raise Corrupt(f"{what}: image record: not in canonical form")
    return image


def decode_group(data: bytes, what: str) -> GroupRecord:
    """The inverse of ``encode_group``; Corrupt or FormatTooNew, naming ``what``."""
    body = _load(data, what, "group record")
    try:
        source = _source_from_json(body["of"])
        geometry, images = Geometry.parse(body["geometry"]), body["images"]
        if len(images) > LARGEST_GROUP:
            raise InvalidRequest(f"a group of {len(images)} images cannot be: at most {LARGEST_GROUP}")
        decoded = tuple(_image_from_json(source, image) for image in images)
        group = GroupRecord(source.run, source.snapshot, geometry, source.block_bytes, decoded)
    except _MALFORMED as error:
        raise Corrupt(f"{what}: group record: {_reason(error)}") from error
    if encode_group(group) != data:
        raise Corrupt(f"{what}: group record: not in canonical form")
    return group


def _load(data: bytes, what: str, kind: str) -> dict[str, Any]:
    try:
        body = json.loads(data)
        version = body["format"]
        _check_number("format", version, _U32)
    except _MALFORMED as error:
        raise Corrupt(f"{what}: {kind}: cannot be decoded: {_reason(error)}") from error
    if version > VERSION:
        raise FormatTooNew(
            f"{what}: image format {version} is newer than this ckptd reads ({VERSION})",
            f"use a ckptd that reads image format {version}",
        )
    return dict(body)


def _reason(error: BaseException) -> str:
    return error.message if isinstance(error, InvalidRequest) else f"{type(error).__name__}: {error}"


def _source_from_json(value: Any) -> _Source:
    snapshot = snapshot_from_json(value["snapshot"])
    if snapshot is None:
        raise InvalidRequest("no snapshot is named")
    _check_block_bytes(value["block_bytes"])
    return _Source(value["run"], snapshot, value["block_bytes"])


def _image_from_json(source: _Source | None, shards: Any) -> ImageRecord:
    if not isinstance(shards, list) or len(shards) > MOST_SHARDS or (shards and source is None):
        raise InvalidRequest(f"shards of an image cannot be: at most {MOST_SHARDS}, of a run and snapshot")
    return ImageRecord(tuple(_shard_from_json(source, shard) for shard in shards) if source else ())


def _shard_from_json(source: _Source, value: Any) -> ShardRecord:
    if len(value["segments"]) > len(DTYPE_CODE):
        raise InvalidRequest(f"a shard of {len(value['segments'])} segments cannot be")
    segments = [Segment(dtype, size_bytes) for dtype, size_bytes in value["segments"]]
    layout = SlotLayout.plan(value["index"]["bytes"], segments, source.block_bytes)
    if layout.payload_bytes != value["payload_bytes"]:
        raise InvalidRequest(f"payload of {value['payload_bytes']} bytes does not match its segments")
    header = SlotHeader(
        run=source.run,
        rank=value["rank"],
        world_size=value["world_size"],
        uid=value["uid"],
        snapshot=source.snapshot,
        parent=snapshot_from_json(value["parent"]),
        roster_version=value["roster_version"],
        index_crc=value["index"]["crc32c"],
        is_persisted=value["is_persisted"],
        sealed_at_s=value["sealed_at_s"],
        layout=layout,
    )
    return ShardRecord(header, value["table_digest"])


# --- checks -------------------------------------------------------------------------------------------------------
def _check_number(name: str, value: object, bound: int) -> None:
    # A bool is an int to Python, but is not written as one.
    if type(value) is not int or not 0 <= value < bound:
        raise InvalidRequest(f"{name} {value!r} cannot be")


def _check_block_bytes(block_bytes: int) -> None:
    _check_number("block bytes", block_bytes, MAX_BLOCK_BYTES + 1)
    if block_bytes < BOX_ALIGN_BYTES or block_bytes & (block_bytes - 1):
        raise InvalidRequest(f"blocks of {block_bytes} bytes cannot be: a power of two is wanted")


def _check_snapshot(run: str, snapshot: SnapshotId) -> None:
    check_run_name(run)
    _check_number("ordinal", snapshot.incarnation.ordinal, _U64)
    _check_number("incarnation id", snapshot.incarnation.id, _U64)
    _check_number("step", snapshot.step, _U64)


def _check_alike(shards: Sequence[ShardRecord]) -> None:
    """InvalidRequest unless all are of one run, snapshot, block size and world size."""
    if len({(_Source.of(shard), shard.header.world_size) for shard in shards}) > 1:
        raise InvalidRequest("the shards are not all of one run, snapshot, block size and world size")
