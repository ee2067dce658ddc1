"""Applies a matrix over GF(2^8) to buffers: ISA-L where it is found, NumPy where it is not.

Layer: inside ``erasure``, below ``code``. Invariants: kernels give the same bytes; they read and write the memory they
are given and nothing else, copy no buffer and keep no reference to one. ISA-L (https://github.com/intel/isa-l) is
called by ctypes, so the GIL is free while it computes.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Protocol

import numpy as np
import structlog

from ckptd.erasure.galois import PRODUCTS, Matrix
from ckptd.memory import Bytes

_SYSTEM_ISAL: Final = "libisal.so.2"  # Debian: libisal2; the 2 is the version of the binary interface
_WHEEL: Final = "pyeclib"  # carries an ISA-L of its own
_TABLE_BYTES: Final = 32  # of ISA-L's tables, for one element of the matrix
_LONGEST_CALL: Final = 1 << 30  # ISA-L counts bytes in an int
_PART_BYTES: Final = 1 << 16  # what NumPy's temporaries are kept to: they stay in the cache

_Byte: Any = ctypes.c_ubyte  # typed for bytearrays and the like only

log = structlog.get_logger()


class Kernel(Protocol):
    """What multiplies. Instances are shared by threads."""

    name: str
    is_fast: bool

    def prepare(self, matrix: Matrix) -> Any:
        """Tables for a matrix of at least one row and one column; they may be used often, and by several threads."""
        ...

    def apply(self, tables: Any, sources: Sequence[Bytes], targets: Sequence[Bytes]) -> None:
        """``targets[i] = sum over j of matrix[i][j] * sources[j]``, byte by byte, in place.

        Args:
            tables: what ``prepare`` gave.
            sources: one buffer a column: contiguous, of one length; any alignment. Read only.
            targets: one buffer a row, likewise, writable. None may share memory with another or with a source.

        Raises:
            ValueError: buffers that do not fit; nothing is written then.
        """
        ...


def _check(shape: tuple[int, int], sources: Sequence[Bytes], targets: Sequence[Bytes]) -> int:
    """The length of the buffers in bytes; ValueError when they are not what ``Kernel.apply`` asks for."""
    if (len(targets), len(sources)) != shape:
        raise ValueError(f"{len(sources)} sources and {len(targets)} targets for a matrix of {shape[0]} x {shape[1]}")
    size_bytes = sources[0].size
    expected = (size_bytes,)
    for buffer in (*sources, *targets):
        if buffer.shape != expected or buffer.dtype != np.uint8 or not buffer.flags.c_contiguous:
            raise ValueError(f"a buffer of {buffer.shape} {buffer.dtype} where contiguous {expected} uint8 is needed")
    for target in targets:
        if not target.flags.writeable:
            raise ValueError("a target cannot be written")
    return size_bytes


def _check_matrix(matrix: Matrix) -> tuple[int, int]:
    """Rows and columns; ValueError when ``matrix`` is none of bytes or empty."""
    if matrix.ndim != 2 or matrix.size == 0 or matrix.dtype != np.uint8:
        raise ValueError(f"a matrix of shape {matrix.shape} and {matrix.dtype} where rows x columns of uint8 is needed")
    return matrix.shape[0], matrix.shape[1]


# --- ISA-L --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class _IsalTables:
    shape: tuple[int, int]
    memory: Any  # ctypes array


class IsalKernel:
    """ISA-L's ``ec_encode_data``: 10 to 20 GB/s of sources a core, whatever the alignment and the length."""

    is_fast = True

    def __init__(self, library: ctypes.CDLL) -> None:
        """``library`` is a loaded libisal; AttributeError when it is not."""
        self.name = f"isa-l ({library._name})"
        self._init_tables, self._encode = library.ec_init_tables, library.ec_encode_data
        self._init_tables.restype = self._encode.restype = None
        integer, pointer = ctypes.c_int, ctypes.c_void_p
        self._init_tables.argtypes = (integer, integer, pointer, pointer)
        self._encode.argtypes = (integer, integer, integer, pointer, pointer, pointer)

    def prepare(self, matrix: Matrix) -> _IsalTables:
        rows, columns = _check_matrix(matrix)
        matrix = np.ascontiguousarray(matrix)
        memory = (ctypes.c_ubyte * (_TABLE_BYTES * rows * columns))()
        self._init_tables(columns, rows, matrix.ctypes.data, memory)
        return _IsalTables((rows, columns), memory)

    def apply(self, tables: _IsalTables, sources: Sequence[Bytes], targets: Sequence[Bytes]) -> None:
        size_bytes = _check(tables.shape, sources, targets)
        rows, columns = tables.shape
        if size_bytes == 0:
            return
        if size_bytes > _LONGEST_CALL:
            for part in (slice(None, _LONGEST_CALL), slice(_LONGEST_CALL, None)):
                self.apply(tables, [source[part] for source in sources], [target[part] for target in targets])
            return
        inputs = (ctypes.c_void_p * columns)(*map(_address, sources))
        outputs = (ctypes.c_void_p * rows)(*map(_address, targets))
        self._encode(size_bytes, columns, rows, tables.memory, inputs, outputs)


def _address(buffer: Bytes) -> int:
    try:
        return ctypes.addressof(_Byte.from_buffer(buffer))  # a third of the time that ndarray.ctypes takes
    except TypeError:  # read-only
        return buffer.ctypes.data


# --- NumPy --------------------------------------------------------------------------------------------------------
class NumpyKernel:
    """Table look-ups: runs everywhere, a few hundredths of ISA-L's speed. The reference that ISA-L is held against."""

    name = "numpy"
    is_fast = False

    def prepare(self, matrix: Matrix) -> Matrix:
        _check_matrix(matrix)
        return matrix.copy()

    def apply(self, tables: Matrix, sources: Sequence[Bytes], targets: Sequence[Bytes]) -> None:
        size_bytes = _check((tables.shape[0], tables.shape[1]), sources, targets)
        products = np.empty(min(_PART_BYTES, size_bytes), np.uint8)
        for start in range(0, size_bytes, _PART_BYTES):
            part = slice(start, min(start + _PART_BYTES, size_bytes))
            for row, target in zip(tables, targets, strict=True):
                target[part] = 0
                for factor, source in zip(row.tolist(), sources, strict=True):
                    product = products[: part.stop - start]
                    # Every index is in range; "clip" lets take write to out without a buffer between.
                    np.take(PRODUCTS[factor], source[part], out=product, mode="clip")
                    target[part] ^= product


# --- which --------------------------------------------------------------------------------------------------------
def isal_files() -> Iterator[str]:
    """What an ISA-L may be loaded from, best first: the one in the pyeclib wheel, then the system's.

    The wheel's is the one tests run with, and newer than that of most systems. Neither pyeclib nor liberasurecode is
    loaded for it: libisal needs nothing but the C library.
    """
    try:
        files = importlib.metadata.files(_WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    yield from (str(file.locate()) for file in files if file.name.startswith("libisal") and ".so" in file.name)
    yield _SYSTEM_ISAL


def load_isal(files: Iterable[str]) -> IsalKernel | None:
    """The first ISA-L of ``files`` that loads; None without any."""
    for file in files:
        try:
            return IsalKernel(ctypes.CDLL(file))
        except (OSError, AttributeError):
            continue  # not there, for another processor, or something else of that name: the next one
    return None


@cache
def find_kernel() -> Kernel:
    """The fastest kernel of this machine; the first call without ISA-L logs a warning."""
    kernel = load_isal(isal_files())
    if kernel is None:
        log.warning(
            "ISA-L is not found: protection will be slow",
            kernel=NumpyKernel.name,
            hint="pip install pyeclib (it carries ISA-L), or install the system's ISA-L (Debian: libisal2)",
        )
        return NumpyKernel()
    return kernel
