"""ckptd's own recordings of timings: ``NAME.ckptd-timings``. Layer: ``replay``.

A zip: ``head.json`` (format, version, run, world, layout, communicators, what each rank was in the middle of),
``steps.bin`` and ``samples.bin`` (SELF and SAMPLE rows of the ranks end to end, in the order of the head). Nothing in
it is code. Invariants: what is read is what was written, or an error names the file; it appears whole or not at all.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ckptd.detect.layout import Layout
from ckptd.detect.records import Communicator, Count, Pending, RankState, Timings
from ckptd.errors import Corrupt, FormatTooNew, InvalidRequest
from ckptd.files import write_atomic
from ckptd.format.timings import SAMPLE, SELF, Op, Rows, pack

SUFFIX: Final = ".ckptd-timings"
FORMAT: Final = "ckptd-timings"
VERSION: Final = 1

_HEAD: Final = "head.json"
_PARTS: Final = (("steps", SELF), ("samples", SAMPLE))
_LAYOUT_IDS: Final = ("program", "data", "stage", "replica")
_STATE_TABLES: Final = ("counts", "pending", "signatures")
# What a file may ask for: it need not hold what it unpacks to.
_MOST_HEAD_BYTES: Final = 64 << 20
_MOST_RANKS: Final = 1 << 20
_MOST_ROWS: Final = {"steps": 4096, "samples": 1 << 16}  # of a rank
_MOST_PART_BYTES: Final = 1 << 31
_FIELD_TYPES: Final[Mapping[str, type | tuple[type, ...]]] = {
    "int": int,
    "str": str,
    "bool": bool,
    "float": (int, float),
    "float | None": (int, float, type(None)),
}
_PLAIN_FIELDS: Final = {f.name: _FIELD_TYPES[str(f.type)] for f in fields(RankState) if f.name not in _STATE_TABLES}
_HINT: Final = "copy it again from where it was made"


@dataclass(frozen=True, slots=True)
class Recording:
    """``states``: what ranks were in the middle of when the recording was made; ``communicators``: by id.
    ``incarnation``: as ckptd writes it, "" unknown."""

    timings: Timings
    layout: Layout | None = None
    states: tuple[RankState, ...] = ()
    communicators: dict[str, Communicator] = field(default_factory=dict)
    run: str = ""
    incarnation: str = ""


def write_recording(path: Path, recording: Recording) -> None:
    """Put ``recording`` at ``path``, replacing what is there."""
    write_atomic(path, encode_recording(recording))


def encode_recording(recording: Recording) -> bytes:
    """The bytes of the file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        file.writestr(_HEAD, json.dumps(_head(recording), separators=(",", ":")))
        for name, dtype in _PARTS:
            rows = getattr(recording.timings, name)
            file.writestr(f"{name}.bin", b"".join(pack(rows[rank].astype(dtype, copy=False)) for rank in sorted(rows)))
    return buffer.getvalue()


def read_recording(path: Path) -> Recording:
    """The inverse of ``write_recording``.

    Raises:
        InvalidRequest: there is no such file.
        FormatTooNew: a later ckptd wrote it.
        Corrupt: it is damaged, or not a recording.
    """
    if not path.is_file():
        raise InvalidRequest(f"recording {path} is not a file")
    try:
        with zipfile.ZipFile(path) as file:
            head = _read_head(file, path)
            rows = {name: _read_rows(file, name, dtype, head[name]) for name, dtype in _PARTS}
        return _recording(head, rows["steps"], rows["samples"])
    except FormatTooNew:
        raise
    except _DAMAGE as error:
        raise Corrupt(f"recording {path} cannot be decoded: {error}", _HINT) from error


# What zipfile, zlib, json and the conversions below raise on bytes that are not what they should be; zipfile takes
# damaged flags for encryption and damaged methods for compression it does not know.
_DAMAGE: Final = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    OSError,
    ValueError,
    KeyError,
    TypeError,
    IndexError,
    AttributeError,
    RuntimeError,
    MemoryError,
    OverflowError,
)


def _read_part(file: zipfile.ZipFile, name: str, size_bytes: int) -> bytes:
    """The member ``name``, of which no more is unpacked than its ``size_bytes``; with its checksum."""
    info = file.getinfo(name)
    if info.file_size != size_bytes or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} has {info.file_size} bytes in place of {size_bytes}, or is packed otherwise")
    with file.open(info) as part:
        data = part.read(size_bytes)
        if len(data) != size_bytes or part.read(1):
            raise ValueError(f"{name} does not unpack to {size_bytes} bytes")
    return data


def _read_head(file: zipfile.ZipFile, path: Path) -> dict[str, Any]:
    size_bytes = file.getinfo(_HEAD).file_size
    if size_bytes > _MOST_HEAD_BYTES:
        raise ValueError(f"its head has {size_bytes} bytes, more than {_MOST_HEAD_BYTES}")
    head = json.loads(_read_part(file, _HEAD, size_bytes))
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise ValueError("it is not a recording of timings")
    if head["version"] > VERSION:
        raise FormatTooNew(
            f"{path}: recording format {head['version']} is newer than this ckptd reads ({VERSION})",
            f"use a ckptd that reads recording format {head['version']}",
        )
    return head


def _read_rows(file: zipfile.ZipFile, name: str, dtype: np.dtype[Any], counts: list[list[int]]) -> dict[int, Rows]:
    """``counts``: rank and rows, each."""
    ranks, sizes = [_whole(rank) for rank, _ in counts], [_whole(size) for _, size in counts]
    if len(set(ranks)) != len(ranks) or len(ranks) > _MOST_RANKS:
        raise ValueError(f"{name} of {len(ranks)} ranks, or of one twice")
    if min(sizes, default=0) < 0 or max(sizes, default=0) > _MOST_ROWS[name]:
        raise ValueError(f"{name} of a rank are {max(sizes)}, not up to {_MOST_ROWS[name]}")
    size_bytes = sum(sizes) * dtype.itemsize
    if size_bytes > _MOST_PART_BYTES:
        raise ValueError(f"{name} have {size_bytes} bytes, more than {_MOST_PART_BYTES}")
    rows = np.frombuffer(_read_part(file, f"{name}.bin", size_bytes), dtype)
    return dict(zip(ranks, np.split(rows, np.cumsum(sizes)[:-1]) if sizes else [], strict=True))


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"a {type(value).__name__} in place of a whole number")
    return value


# --- the head -----------------------------------------------------------------------------------------------------
def _head(recording: Recording) -> dict[str, Any]:
    timings = recording.timings
    pool: dict[Communicator, int] = {}

    def pooled(table: Mapping[Any, Communicator]) -> list[tuple[Any, int]]:
        """Many ranks share a communicator: it is written once."""
        return [(key, pool.setdefault(communicator, len(pool))) for key, communicator in table.items()]

    return {
        "format": FORMAT,
        "version": VERSION,
        "run": recording.run,
        "incarnation": recording.incarnation,
        "world_size": timings.world_size,
        "nodes": timings.nodes,
        "layout": None if recording.layout is None else _encode_layout(recording.layout),
        "steps": [(rank, len(timings.steps[rank])) for rank in sorted(timings.steps)],
        "samples": [(rank, len(timings.samples[rank])) for rank in sorted(timings.samples)],
        "tables": [(rank, pooled(table)) for rank, table in timings.tables.items()],
        "by_id": pooled(recording.communicators),
        "communicators": [(known.id, known.members, known.label) for known in pool],
        "states": [_encode_state(state) for state in recording.states],
    }


def _recording(head: dict[str, Any], steps: dict[int, Rows], samples: dict[int, Rows]) -> Recording:
    world_size = _whole(head["world_size"])
    if not 0 <= world_size <= _MOST_RANKS:
        raise ValueError(f"a world of {world_size} ranks is not one of up to {_MOST_RANKS}")
    pool = [
        Communicator(str(id_), tuple(map(int, members)), str(label)) for id_, members, label in head["communicators"]
    ]
    tables = {int(rank): {int(row): pool[at] for row, at in table} for rank, table in head["tables"]}
    nodes = tuple(map(str, head["nodes"]))
    named = [*steps, *samples, *tables]
    if len(nodes) != world_size or not all(0 <= rank < world_size for rank in named):
        raise ValueError(f"its ranks do not fit a world of {world_size}")
    return Recording(
        Timings(world_size, nodes, steps, samples, tables),
        None if head["layout"] is None else _decode_layout(head["layout"], world_size),
        tuple(_decode_state(state, world_size) for state in head["states"]),
        {str(key): pool[at] for key, at in head["by_id"]},
        str(head["run"]),
        str(head["incarnation"]),
    )


def _encode_layout(layout: Layout) -> dict[str, Any]:
    ids = {name: getattr(layout, name) for name in _LAYOUT_IDS}
    return {
        "dims": layout.dims,
        "is_inferred": layout.is_inferred,
        **{name: None if values is None else values.tolist() for name, values in ids.items()},
    }


def _decode_layout(found: dict[str, Any], world_size: int) -> Layout:
    ids: dict[str, npt.NDArray[np.int64] | None] = {}
    for name in _LAYOUT_IDS:
        values = None if found[name] is None else np.array(found[name], np.int64)
        if values is not None and values.shape != (world_size,):
            raise ValueError(f"its layout has {values.shape} ids for a world of {world_size}")
        ids[name] = values
    program, data, stage = ids["program"], ids["data"], ids["stage"]
    if program is None or data is None or stage is None:
        raise ValueError("its layout lacks ids")
    dims = tuple((str(name), int(size)) for name, size in found["dims"])
    return Layout(program, data, stage, dims, bool(found["is_inferred"]), ids["replica"])


def _encode_state(state: RankState) -> dict[str, Any]:
    plain = {f.name: getattr(state, f.name) for f in fields(RankState) if f.name not in _STATE_TABLES}
    return {
        **plain,
        "counts": [(name, count.enqueued, count.completed) for name, count in state.counts.items()],
        "pending": [[getattr(item, f.name) for f in fields(Pending)] for item in state.pending],
        "signatures": [(*key, int(op), size_bytes) for key, (op, size_bytes) in state.signatures.items()],
    }


def _decode_state(found: dict[str, Any], world_size: int) -> RankState:
    plain = {name: found[name] for name in _PLAIN_FIELDS if name in found}
    for name, value in plain.items():
        if not isinstance(value, _PLAIN_FIELDS[name]):
            raise TypeError(f"{name} of a rank is a {type(value).__name__}")
    if not 0 <= plain["rank"] < world_size:
        raise ValueError(f"a state of rank {plain['rank']}, which is not one of {world_size}")
    return RankState(
        **plain,
        counts={str(name): Count(_whole(enqueued), _whole(completed)) for name, enqueued, completed in found["counts"]},
        pending=tuple(_decode_pending(*item) for item in found["pending"]),
        signatures={
            (str(name), _whole(seq)): (Op(op), _whole(size_bytes)) for name, seq, op, size_bytes in found["signatures"]
        },
    )


def _decode_pending(
    name: Any, seq: Any, op: Any, size_bytes: Any, peer: Any = -1, for_s: Any = 0.0, where: Any = ""
) -> Pending:
    return Pending(str(name), _whole(seq), Op(op), _whole(size_bytes), _whole(peer), float(for_s), str(where))
