"""Reading a durable checkpoint as named arrays, without a daemon and without torch.

Layer: client, beside the state walk; needs zarr-python (imported when first used) and only its public interface.
Invariants: nothing is written; only boxes that overlap a request are read, and every block read is checked against its
CRC-32C. NumPy has no bfloat16 and no float8: these come as their bit patterns (``stored_dtype`` tells).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from ckptd.errors import Corrupt, InvalidRequest, UnknownRun, UnknownStep
from ckptd.format.blocks import CRC_BYTES, SlotLayout, check_blocks, digest
from ckptd.format.index import decode_index
from ckptd.format.manifest import (
    INDEX_NAME,
    MANIFEST_NAME,
    Manifest,
    RankRecord,
    decode_manifest,
    folder_name,
    parse_folder_name,
    rank_folder,
)
from ckptd.model import DTYPE_CODE, DTYPES, Box, Segment, SnapshotId, check_run_name

_INSTALL: Final = "pip install 'zarr>=3.1.6,<3.2'"


def open_zarr(url: str, step: int | None = None, run: str | None = None) -> ZarrCheckpoint:
    """A durable checkpoint as a read-only mapping of tensor name -> lazy array.

    Args:
        url: ``file:///tier`` or a path; that of a tier, or of one run in it.
        step: the step; None for the newest that is committed.
        run: the run, when ``url`` is of a tier that holds several.

    Raises:
        UnknownRun: no such run, or several and none was named.
        UnknownStep: the step has no committed checkpoint.
        Corrupt: the manifest or an index does not match its checksum.
    """
    folder = _run_folder(_local_path(url), run)
    committed = sorted(
        snapshot
        for path in folder.iterdir()
        if (snapshot := parse_folder_name(path.name)) is not None and (path / MANIFEST_NAME).is_file()
    )
    chosen = [snapshot for snapshot in committed if step is None or snapshot.step == step]
    if not chosen:
        steps = ", ".join(str(step) for step in sorted({snapshot.step for snapshot in committed})) or "none"
        what = "no committed checkpoint" if step is None else f"no committed checkpoint of step {step}"
        raise UnknownStep(f"{folder}: {what}", f"committed steps: {steps}")
    return ZarrCheckpoint(folder, chosen[-1])


def _local_path(url: str) -> Path:
    parts = urlsplit(url)
    if parts.scheme not in ("", "file") or parts.netloc not in ("", "localhost"):
        raise InvalidRequest(f"{url!r} is not a path on this machine", "use file:///path/to/tier, or a path")
    return Path(unquote(parts.path) if parts.scheme else url)


def _run_folder(root: Path, run: str | None) -> Path:
    if not root.is_dir():
        raise UnknownRun(f"{root} is not a folder", "give the tier's URL as it was given to `ckptd serve --tier`")
    if run is not None:
        if not (root / check_run_name(run)).is_dir():
            raise UnknownRun(f"{root} holds no run {run!r}", f"it holds {_runs(root)}")
        return root / run
    if any(parse_folder_name(path.name) for path in root.iterdir()):
        return root
    runs = _runs(root)
    if len(runs) != 1:
        raise UnknownRun(f"{root} holds {len(runs)} runs", f"name one with run=...: {runs}")
    return root / runs[0]


def _runs(root: Path) -> list[str]:
    folders = (path for path in root.iterdir() if path.is_dir())
    return sorted(folder.name for folder in folders if any(parse_folder_name(path.name) for path in folder.iterdir()))


class ZarrCheckpoint(Mapping[str, "ZarrTensor"]):
    """Tensor name -> ``ZarrTensor``.

    Attributes:
        folder: of the checkpoint.
        manifest: what it lists.
    """

    def __init__(self, run_folder: Path, snapshot: SnapshotId) -> None:
        self.folder = run_folder / folder_name(snapshot)
        self.manifest: Manifest = decode_manifest((self.folder / MANIFEST_NAME).read_bytes(), str(self.folder))
        if self.manifest.snapshot != snapshot:
            raise Corrupt(f"{self.folder}: the manifest is of {self.manifest.snapshot}")
        self._tensors: dict[str, ZarrTensor] = {}
        for record in self.manifest.ranks:
            shard = _Shard.open(self.folder, self.manifest, record)
            for box in shard.boxes:
                self._tensors.setdefault(box.name, ZarrTensor(box)).add(box, shard)

    def __getitem__(self, name: str) -> ZarrTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"<ZarrCheckpoint {self.manifest.run} {self.manifest.snapshot}: {len(self)} tensors>"


class ZarrTensor:
    """One named global tensor, read when indexed.

    Attributes:
        name: fully qualified name.
        shape: of the whole tensor, in elements.
        stored_dtype: the dtype the tensor had, as torch names it.
        dtype: the NumPy dtype of what indexing gives; unsigned integers for dtypes that NumPy lacks.
        boxes: the parts, as ranks saved them; replicas of one part appear once.
    """

    def __init__(self, box: Box) -> None:
        self.name, self.shape, self.stored_dtype = box.name, box.global_shape, box.dtype
        self.dtype = np.dtype(DTYPES[DTYPE_CODE[box.dtype]].stored)
        self._parts: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[Box, _Shard]] = {}

    def add(self, box: Box, shard: _Shard) -> None:
        """One more part; Corrupt when it is of another tensor than the parts before."""
        if (box.global_shape, box.dtype) != (self.shape, self.stored_dtype):
            raise Corrupt(f"{shard.what}: {box.name} is {box.global_shape} {box.dtype}, elsewhere {self!r}")
        self._parts.setdefault((box.offset, box.shape), (box, shard))

    @property
    def boxes(self) -> tuple[Box, ...]:
        return tuple(box for box, _ in self._parts.values())

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a 0-d tensor")
        return self.shape[0]

    def __repr__(self) -> str:
        return f"<ZarrTensor {self.name} {self.shape} {self.stored_dtype}>"

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        if copy is False:
            raise ValueError("a stored tensor cannot be viewed without a copy")
        return np.asarray(self[...], dtype=dtype)

    def __getitem__(self, key: Any) -> Any:
        """NumPy's basic indexing: integers, slices, ``...`` and None. Gives an array, or a scalar as NumPy does."""
        region, rest = _split_key(key, self.shape)
        return self._read(region)[rest]

    def _read(self, region: tuple[slice, ...]) -> npt.NDArray[Any]:
        out = np.empty([part.stop - part.start for part in region], self.dtype)
        found, targets = 0, []
        for box, shard in self._parts.values():
            overlap = _overlap(region, box)
            if overlap is not None and out.size:
                target = tuple(slice(o.start - r.start, o.stop - r.start) for o, r in zip(overlap, region, strict=True))
                out[target] = shard.read(box, overlap)
                found += math.prod(part.stop - part.start for part in overlap)
                targets.append(target)
        if found != out.size:  # parts are missing, or overlap: only a look at every element tells
            is_read = np.zeros(out.shape, bool)
            for target in targets:
                is_read[target] = True
            if not is_read.all():
                raise Corrupt(f"{self.name}: no rank of the checkpoint holds all of {region}")
        return out


def _split_key(key: Any, shape: tuple[int, ...]) -> tuple[tuple[slice, ...], tuple[Any, ...]]:
    """The smallest region that holds what ``key`` asks for, and the key to apply to that region."""
    keys = list(key) if isinstance(key, tuple) else [key]
    named = sum(part is not None and part is not Ellipsis for part in keys)
    if named > len(shape):
        raise IndexError(f"too many indices: {named} for {len(shape)} dimensions")
    dots = [position for position, part in enumerate(keys) if part is Ellipsis]
    if len(dots) > 1:
        raise IndexError("an index can only have a single ellipsis ('...')")
    at = dots[0] if dots else len(keys)
    keys[at : at + 1] = [slice(None)] * (len(shape) - named)
    region: list[slice] = []
    rest: list[Any] = []
    for part in keys:
        if part is None:
            rest.append(None)
            continue
        size = shape[len(region)]
        if isinstance(part, slice):
            indices = range(*part.indices(size))
            low, high = (min(indices), max(indices) + 1) if indices else (0, 0)
            region.append(slice(low, high))
            rest.append(slice(None, None, indices.step))
            continue
        if isinstance(part, (bool, np.bool_, np.ndarray)) or not hasattr(part, "__index__"):
            raise IndexError(f"only integers, slices, ... and None are valid indices, not {part!r}")
        index = operator.index(part)
        if not -size <= index < size:
            raise IndexError(f"index {index} is out of bounds for dimension {len(region)} with size {size}")
        region.append(slice(index % size, index % size + 1))
        rest.append(0)
    # With "..." NumPy gives an array even where nothing is left to select, else a scalar: so does this.
    return tuple(region), (*rest, ...) if dots else tuple(rest)


def _overlap(region: tuple[slice, ...], box: Box) -> tuple[slice, ...] | None:
    overlap = tuple(
        slice(max(part.start, offset), min(part.stop, offset + extent))
        for part, offset, extent in zip(region, box.offset, box.shape, strict=True)
    )
    return overlap if all(part.start < part.stop for part in overlap) else None


@dataclass(frozen=True)
class _Shard:
    """The part of a checkpoint that one rank saved."""

    what: str
    folder: Path
    layout: SlotLayout
    table: npt.NDArray[np.uint32]
    boxes: tuple[Box, ...]
    arrays: dict[str, Any]  # dtype -> open Zarr array

    @classmethod
    def open(cls, checkpoint: Path, manifest: Manifest, record: RankRecord) -> _Shard:
        folder = checkpoint / rank_folder(record.rank)
        what = f"{folder}/{INDEX_NAME}"
        try:
            data = (folder / INDEX_NAME).read_bytes()
        except OSError as error:
            raise Corrupt(f"{what}: cannot be read: {error}") from error
        segments = [Segment(array.dtype, array.size_bytes) for array in record.arrays]
        layout = SlotLayout.plan(record.index_bytes, segments, manifest.block_bytes)
        if len(data) != record.index_bytes + layout.blocks * CRC_BYTES:
            raise Corrupt(f"{what}: has {len(data)} bytes, not what the manifest says")
        index = data[: record.index_bytes]
        table = np.frombuffer(data, "<u4", offset=record.index_bytes).astype(np.uint32)
        if crc32c(index) != record.index_crc:
            raise Corrupt(f"{what}: does not match its CRC-32C in the manifest")
        for array, offset in zip(record.arrays, layout.segment_offsets, strict=True):
            if digest(table[layout.blocks_of(offset, array.size_bytes)]) != array.digest:
                raise Corrupt(f"{what}: block CRCs of {array.dtype} do not match the manifest")
        return cls(str(folder), folder, layout, table, decode_index(index, what).boxes, {})

    def read(self, box: Box, overlap: tuple[slice, ...]) -> npt.NDArray[Any]:
        """The elements of ``box`` in ``overlap`` (global indices), from whole blocks that match their CRC."""
        dtype = DTYPES[DTYPE_CODE[box.dtype]]
        inner = tuple(slice(o.start - at, o.stop - at) for o, at in zip(overlap, box.offset, strict=True))
        if not inner:
            return self._elements(box.dtype, box.position, dtype.size_bytes).reshape(())
        row_bytes = math.prod(box.shape[1:]) * dtype.size_bytes
        rows = inner[0]
        start = box.position + rows.start * row_bytes
        flat = self._elements(box.dtype, start, (rows.stop - rows.start) * row_bytes)
        return flat.reshape(rows.stop - rows.start, *box.shape[1:])[(slice(None), *inner[1:])]

    def _elements(self, dtype: str, start: int, size_bytes: int) -> npt.NDArray[Any]:
        """``size_bytes`` of a segment from byte ``start`` on."""
        position = next(i for i, segment in enumerate(self.layout.segments) if segment.dtype == dtype)
        block, item = self.layout.block_bytes, DTYPES[DTYPE_CODE[dtype]].size_bytes
        first = start // block * block
        end = min(-(-(start + size_bytes) // block) * block, self.layout.segments[position].size_bytes)
        values = np.ascontiguousarray(self._array(dtype)[first // item : end // item])
        of_first = (self.layout.segment_offsets[position] + first) // block
        table = self.table[of_first : of_first + -(-(end - first) // block)]
        check_blocks(values.view(np.uint8).data, block, table, f"{self.what}/{dtype} from byte {first}")
        return values[(start - first) // item : (start - first + size_bytes) // item]

    def _array(self, dtype: str) -> Any:
        if dtype not in self.arrays:
            try:
                import zarr
            except ImportError as error:
                raise InvalidRequest("open_zarr needs zarr-python, which is not installed", _INSTALL) from error
            self.arrays[dtype] = zarr.open_array(str(self.folder / dtype), mode="r")
        return self.arrays[dtype]
