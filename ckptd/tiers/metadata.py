"""``zarr.json`` with a checksum of its own: what is written beside the arrays and checked before they are opened.

Layer: tiers. Any Zarr v3 reader can open what lies here; ``attributes.ckptd`` carries the real dtype, the block size
and ``crc32c``, the CRC-32C of the document as canonical JSON without that one entry. Invariants: a document is read
through ``load`` only, so a flipped bit in it is found before it is believed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from crc32c import crc32c

from ckptd import files
from ckptd.errors import CommitConflict, Corrupt
from ckptd.tiers.failures import file_errors

DOCUMENT: Final = "zarr.json"
_KEY: Final = "ckptd"


def put_group(folder: Path, attributes: dict[str, Any]) -> None:
    """Make ``folder`` a Zarr group, durably. Every writer puts the same bytes, so it does not matter who is first."""
    path = folder / DOCUMENT
    document = {"zarr_format": 3, "node_type": "group", "attributes": {_KEY: attributes}}
    with file_errors(path, "write"):
        if path.exists():
            return
        try:
            files.write_new(path, _sealed(document))
        except CommitConflict:
            return


def seal_array(folder: Path, attributes: dict[str, Any]) -> None:
    """Put attributes and checksum into the ``zarr.json`` that zarr wrote, durably."""
    path = folder / DOCUMENT
    with file_errors(path, "write"):
        document = json.loads(path.read_bytes())
        files.write_atomic(path, _sealed({**document, "attributes": {_KEY: attributes}}))


def load(folder: Path, what: str) -> dict[str, Any]:
    """The document of ``folder``; Corrupt, naming ``what``, when it is not there or does not match its checksum."""
    path = folder / DOCUMENT
    with file_errors(path, "read"):
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise Corrupt(f"{what}: {DOCUMENT} is not there") from error
    try:
        document: dict[str, Any] = json.loads(data)
        crc = document["attributes"][_KEY].pop("crc32c")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Corrupt(f"{what}: {DOCUMENT} cannot be decoded: {error}") from error
    if _crc(document) != crc:
        raise Corrupt(f"{what}: {DOCUMENT} does not match its CRC-32C")
    return document


def attributes_of(document: dict[str, Any]) -> dict[str, Any]:
    """What ckptd put into the attributes."""
    attributes: dict[str, Any] = document["attributes"][_KEY]
    return attributes


def _sealed(document: dict[str, Any]) -> bytes:
    crc = _crc(document)
    attributes = {**document["attributes"], _KEY: {**document["attributes"][_KEY], "crc32c": crc}}
    return json.dumps({**document, "attributes": attributes}, indent=2).encode()


def _crc(document: dict[str, Any]) -> int:
    return int(crc32c(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()))
