"""One segment of one rank as a one-dimensional Zarr v3 array: how it is cut into chunks, written, and opened.

Layer: tiers. The `zarrs` pipeline does the work in Rust threads; zarr-python alone reads the same files. Invariants:
all-zero chunks are written too, so that planned and written can be compared by name and size; chunks of an array of
several are whole blocks; a segment is never copied as a whole.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import zarr
import zarr.codecs
from zarr.buffer.cpu import NDBuffer

from ckptd.errors import Corrupt, InvalidRequest
from ckptd.format.blocks import align
from ckptd.format.manifest import ArrayRecord
from ckptd.model import DTYPE_CODE, DTYPES, Dtype
from ckptd.tiers import metadata
from ckptd.tiers.failures import file_errors, zarr_errors
from ckptd.tiers.flush import Flusher
from ckptd.tiers.spec import Codec
from ckptd.tiers.tier import Progress

CHUNK_BYTES: Final = 16 * 1024 * 1024
WINDOW_CHUNKS: Final = 2  # per call into zarrs, which holds a copy of each
_ZARRS: Final = "zarrs.ZarrsCodecPipeline"
_PLAIN: Final = "zarr.core.codec_pipeline.BatchedCodecPipeline"
_pipeline_lock = threading.Lock()


@contextmanager
def _pipeline(path: str) -> Iterator[None]:
    """The pipeline is bound when an array is created or opened; zarr's settings are global, hence the lock."""
    with _pipeline_lock, zarr.config.set({"codec_pipeline.path": path, "codec_pipeline.strict": True}):
        yield


def chunk_bytes_for(size_bytes: int, block_bytes: int) -> int:
    """Chunks of one size, whole blocks and at most 16 MiB, since a last chunk is stored in full; one chunk that fits
    when that is enough."""
    count = -(-size_bytes // CHUNK_BYTES)
    return size_bytes if count <= 1 else align(-(-size_bytes // count), block_bytes)


def write_array(
    folder: Path,
    dtype: Dtype,
    data: memoryview,
    block_bytes: int,
    codec: Codec,
    flusher: Flusher,
    on_progress: Progress,
) -> None:
    """Write ``data``, the bytes of a segment, as a new array at ``folder``; on the device once ``flusher`` finished
    and the folders are synced (``sync_folders``)."""
    if len(data) % dtype.size_bytes:
        raise InvalidRequest(f"{folder}: {len(data)} bytes are not whole elements of {dtype.name}")
    chunk_bytes = chunk_bytes_for(len(data), block_bytes)
    values = np.frombuffer(data, dtype=dtype.stored)
    with zarr_errors(folder, "create the array", is_read=False), _pipeline(_PLAIN):
        plain = zarr.create_array(
            str(folder),
            shape=values.shape,
            chunks=(max(1, chunk_bytes // dtype.size_bytes),),
            dtype=dtype.stored,
            compressors=_compressors(codec, dtype),
            fill_value=0,
            config={"write_empty_chunks": True},
        )
    metadata.seal_array(folder, {"dtype": dtype.name, "block_bytes": block_bytes})
    with zarr_errors(folder, "open the array", is_read=False), _pipeline(_ZARRS):
        fast = zarr.open_array(str(folder), mode="r+")
    for start in range(0, len(data), max(1, chunk_bytes * WINDOW_CHUNKS)):
        end = min(start + chunk_bytes * WINDOW_CHUNKS, len(data))
        _write(fast, folder, values, start, end)
        for chunk in range(start // chunk_bytes, -(-end // chunk_bytes)):
            file = folder / "c" / str(chunk)
            if not file.exists():  # zarrs 0.2.3 leaves out chunks of zeros whatever write_empty_chunks says
                _write(plain, folder, values, chunk * chunk_bytes, min((chunk + 1) * chunk_bytes, end))
            flusher.submit(file)
        on_progress(end - start)


def _write(array: zarr.Array[Any], folder: Path, values: npt.NDArray[Any], start: int, end: int) -> None:
    elements = slice(start // values.itemsize, end // values.itemsize)
    with zarr_errors(folder, "write", is_read=False):
        array[elements] = values[elements]


def sync_folders(folder: Path, flusher: Flusher) -> None:
    """fsync the folders of an array, after its chunks."""
    for inner in (folder / "c", folder):
        if inner.exists():
            flusher.submit(inner)


def _compressors(codec: Codec, dtype: Dtype) -> Any:
    if codec == "zstd":
        return [zarr.codecs.ZstdCodec(level=1)]
    if codec == "blosc":
        return [zarr.codecs.BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle", typesize=dtype.size_bytes)]
    return None


@dataclass(frozen=True)
class StoredArray:
    """An array of a checkpoint, opened after its metadata was checked.

    Attributes:
        what: its name in messages.
        size_bytes: bytes of the segment.
        chunk_bytes: bytes of a chunk, uncompressed.
        is_compressed: whether the size of a chunk file is free.
    """

    folder: Path
    what: str
    dtype: Dtype
    size_bytes: int
    chunk_bytes: int
    is_compressed: bool

    @classmethod
    def describe(cls, folder: Path, what: str, record: ArrayRecord, block_bytes: int) -> StoredArray:
        """What the metadata says; Corrupt when it is not what ``record`` asks for."""
        document = metadata.load(folder, what)
        dtype = DTYPES[DTYPE_CODE[record.dtype]]
        attributes = metadata.attributes_of(document)
        shape, stored = document.get("shape"), document.get("data_type")
        if (shape, stored) != ([record.size_bytes // dtype.size_bytes], dtype.stored):
            raise Corrupt(f"{what}: zarr.json says {shape} of {stored}, the manifest {record.size_bytes} bytes")
        if (attributes.get("dtype"), attributes.get("block_bytes")) != (dtype.name, block_bytes):
            raise Corrupt(f"{what}: zarr.json says another dtype or block size than the manifest")
        chunk_bytes = int(document["chunk_grid"]["configuration"]["chunk_shape"][0]) * dtype.size_bytes
        if chunk_bytes < record.size_bytes and chunk_bytes % block_bytes:
            raise Corrupt(f"{what}: chunks of {chunk_bytes} bytes are not whole blocks of {block_bytes}")
        return cls(folder, what, dtype, record.size_bytes, chunk_bytes, len(document["codecs"]) > 1)

    @property
    def chunks(self) -> int:
        return -(-self.size_bytes // self.chunk_bytes)

    def missing(self) -> list[str]:
        """What is not there of the chunk files, or not of the size it must have."""
        sizes: dict[str, int] = {}
        with file_errors(self.folder, "list the chunks"):
            if self.chunks and (self.folder / "c").is_dir():
                with os.scandir(self.folder / "c") as entries:
                    sizes = {entry.name: entry.stat().st_size for entry in entries}
        problems = []
        for chunk in range(self.chunks):
            size = sizes.get(str(chunk))
            if size is None:
                problems.append(f"{self.what}: chunk {chunk} is not there")
            elif self.is_compressed and not size:
                problems.append(f"{self.what}: chunk {chunk} is empty")
            elif not self.is_compressed and size != self.chunk_bytes:
                problems.append(f"{self.what}: chunk {chunk} has {size} bytes, not {self.chunk_bytes}")
        return problems

    def open(self) -> zarr.Array[Any]:
        with zarr_errors(self.folder, "open the array", is_read=True), _pipeline(_ZARRS):
            return zarr.open_array(str(self.folder), mode="r")

    def read(self, array: zarr.Array[Any], start: int, target: memoryview) -> None:
        """Fill ``target`` with the bytes from ``start`` on; Corrupt when they cannot be decoded."""
        first = start // self.dtype.size_bytes
        values: npt.NDArray[Any] = np.frombuffer(target, dtype=self.dtype.stored)
        with zarr_errors(self.folder, "read", is_read=True):
            out = NDBuffer.from_numpy_array(values)
            array.get_basic_selection(slice(first, first + len(values)), out=out)
