"""Files mapped so that the processor finds them fast: aligned to huge pages, in huge pages where the kernel agrees.

Layer: the bottom; used by the daemon and the client. Standard library and NumPy. Invariants: a mapping lives as long as
any view of it; advice that a kernel refuses costs only time. Every new mapping of a slot in pages of 4 KiB costs a page
fault for 64 KiB at the first touch; in huge pages it costs one for 2 MiB.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

HUGE_BYTES: Final = 2 * 1024 * 1024
_MADV_POPULATE_READ: Final = 22
_MADV_COLLAPSE: Final = 25  # Linux 6.1
_MAP_FIXED: Final = 0x10
_MAP_NORESERVE: Final = 0x4000
_FAILED: Final = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def map_file(fd: int, size_bytes: int, *, is_private: bool = False) -> Bytes:
    """``size_bytes`` of a file, readable and writable, at an address aligned to huge pages; the caller keeps ``fd``.

    Args:
        is_private: writes stay in this process (copy on write) and never reach the file.

    Raises:
        OSError: the memory cannot be mapped.
    """
    # Python's mmap leaves the address to the kernel, which aligns it to 4 KiB. So reserve more, and map over a part.
    reserved_bytes = size_bytes + HUGE_BYTES
    reserved = _mmap(0, reserved_bytes, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1)
    address = -(-reserved // HUGE_BYTES) * HUGE_BYTES
    sharing = mmap.MAP_PRIVATE if is_private else mmap.MAP_SHARED
    try:
        _mmap(address, size_bytes, mmap.PROT_READ | mmap.PROT_WRITE, sharing | _MAP_FIXED, fd)
    except OSError:
        _libc.munmap(reserved, reserved_bytes)
        raise
    memory = (ctypes.c_ubyte * size_bytes).from_address(address)
    # The whole reservation goes when the last view of the memory does.
    weakref.finalize(memory, _libc.munmap, reserved, reserved_bytes).atexit = False
    buffer: Any = memory
    view: Bytes = np.frombuffer(buffer, np.uint8)
    return view


def populate(view: Bytes) -> None:
    """Fault every page in, with one call that does not hold the GIL."""
    _advise(view, _MADV_POPULATE_READ)


def collapse(view: Bytes) -> None:
    """Put the memory into huge pages. Takes about 0.4 s a GiB (run): in the background, before anybody uses it."""
    _advise(view, _MADV_COLLAPSE)


def keep_from_forks(view: Bytes) -> None:
    """Forked children (a DataLoader's workers) do not inherit the mapping."""
    _advise(view, mmap.MADV_DONTFORK)


def _advise(view: Bytes, advice: int) -> None:
    arguments: tuple[Any, ...] = (view.ctypes.data, view.nbytes, advice)
    _libc.madvise(*arguments)


def _mmap(address: int, size_bytes: int, protection: int, flags: int, fd: int) -> int:
    result = _libc.mmap(address, size_bytes, protection, flags, fd, 0)
    if result is None or result == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot map {size_bytes} bytes: {os.strerror(number)}")
    return int(result)
