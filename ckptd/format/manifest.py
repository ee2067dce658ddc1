"""The manifest: the JSON that makes a checkpoint exist in a tier, and the names of what it lists.

A checkpoint is the folder ``RUN/step-000000001200.<ordinal>-<id>/``; in it, per rank, ``rank-00003/index`` and one Zarr
array ``rank-00003/<dtype>`` per segment. The manifest carries a CRC over its own content, the checksum of every index
and the digest of every array's block CRCs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from crc32c import crc32c

from ckptd.errors import Corrupt, FormatTooNew
from ckptd.model import Incarnation, SnapshotId

VERSION: Final = 1
MANIFEST_NAME: Final = "manifest.json"
INDEX_NAME: Final = "index"
_FOLDER = re.compile(r"step-(\d{12})\.(\d+-[0-9a-f]{16})")


def folder_name(snapshot: SnapshotId) -> str:
    return f"step-{snapshot.step:012d}.{snapshot.incarnation}"


def parse_folder_name(name: str) -> SnapshotId | None:
    """The snapshot a folder holds, or None when the name is not of a checkpoint."""
    match = _FOLDER.fullmatch(name)
    return SnapshotId(Incarnation.parse(match[2]), int(match[1])) if match else None


def rank_folder(rank: int) -> str:
    return f"rank-{rank:05d}"


@dataclass(frozen=True, slots=True)
class ArrayRecord:
    """One segment of one rank as a Zarr array: ``digest`` is of the CRCs of its blocks."""

    dtype: str
    size_bytes: int
    digest: int


@dataclass(frozen=True, slots=True)
class RankRecord:
    """What one rank has in the checkpoint: its index (bytes and CRC-32C) and its arrays."""

    rank: int
    index_bytes: int
    index_crc: int
    arrays: tuple[ArrayRecord, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """A committed checkpoint. ``parent`` is what its incarnation was restored from; ``created_at_s`` is Unix time."""

    run: str
    snapshot: SnapshotId
    parent: SnapshotId | None
    world_size: int
    roster_version: int
    block_bytes: int
    created_at_s: float
    ranks: tuple[RankRecord, ...]

    @property
    def size_bytes(self) -> int:
        return sum(array.size_bytes for rank in self.ranks for array in rank.arrays)


def snapshot_to_json(snapshot: SnapshotId | None) -> dict[str, Any] | None:
    return None if snapshot is None else {"incarnation": str(snapshot.incarnation), "step": snapshot.step}


def snapshot_from_json(value: Mapping[str, Any] | None) -> SnapshotId | None:
    return None if value is None else SnapshotId(Incarnation.parse(value["incarnation"]), int(value["step"]))


def encode_manifest(manifest: Manifest) -> bytes:
    body: dict[str, Any] = {
        "format": VERSION,
        "run": manifest.run,
        "snapshot": snapshot_to_json(manifest.snapshot),
        "parent": snapshot_to_json(manifest.parent),
        "world_size": manifest.world_size,
        "roster_version": manifest.roster_version,
        "block_bytes": manifest.block_bytes,
        "created_at_s": manifest.created_at_s,
        "ranks": [
            {
                "rank": rank.rank,
                "index": {"bytes": rank.index_bytes, "crc32c": rank.index_crc},
                "arrays": [{"dtype": a.dtype, "bytes": a.size_bytes, "digest": a.digest} for a in rank.arrays],
            }
            for rank in manifest.ranks
        ],
    }
    return json.dumps({**body, "crc32c": crc32c(_canonical(body))}, indent=1).encode()


def decode_manifest(data: bytes, what: str) -> Manifest:
    """The inverse of ``encode_manifest``; Corrupt or FormatTooNew, naming ``what``."""
    try:
        body = json.loads(data)
        version, crc = int(body["format"]), body.pop("crc32c")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Corrupt(f"{what}: manifest cannot be decoded: {error}") from error
    if version > VERSION:
        raise FormatTooNew(
            f"{what}: manifest format {version} is newer than this ckptd reads ({VERSION})",
            f"use a ckptd that reads manifest format {version}",
        )
    if crc32c(_canonical(body)) != crc:
        raise Corrupt(f"{what}: manifest does not match its CRC-32C")
    snapshot = snapshot_from_json(body["snapshot"])
    if snapshot is None:
        raise Corrupt(f"{what}: manifest names no snapshot")
    return Manifest(
        run=body["run"],
        snapshot=snapshot,
        parent=snapshot_from_json(body["parent"]),
        world_size=body["world_size"],
        roster_version=body["roster_version"],
        block_bytes=body["block_bytes"],
        created_at_s=body["created_at_s"],
        ranks=tuple(
            RankRecord(
                rank["rank"],
                rank["index"]["bytes"],
                rank["index"]["crc32c"],
                tuple(ArrayRecord(a["dtype"], a["bytes"], a["digest"]) for a in rank["arrays"]),
            )
            for rank in body["ranks"]
        ),
    )


def _canonical(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
