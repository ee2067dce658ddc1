"""Copying loaded tensors into live ones at the speed of memory: byte views, a few threads, nothing allocated twice.

Layer: inside ``ckptd_client.state``. Large contiguous CPU tensors are copied as bytes by NumPy (13 GB/s a core where
``copy_`` makes 10), in pieces over a thread pool, which also spreads the page faults of fresh memory; everything else
goes through ``copy_``. Invariants: sources are only read; destinations keep storage and strides; on return every copy
has ended, on devices too.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from ckptd.errors import StateMismatch

PIECE_BYTES: Final = 32 * 1024 * 1024
SMALL_BYTES: Final = 64 * 1024
MAX_THREADS: Final = 8
HUGE_BYTES: Final = 4 * 1024 * 1024

_LIBC: Final = ctypes.CDLL(None)
Bytes = npt.NDArray[np.uint8]


def fill_all(copies: Iterable[tuple[str, torch.Tensor]], load: Callable[[str], torch.Tensor]) -> None:
    """Copy ``load(name)`` into each destination.

    Args:
        copies: (name, plain destination tensor of the loaded shape and dtype). ``load`` is called once for each, on
            the caller's thread, in order.
        load: may answer a view of read-only memory; it must stay valid until this returns.

    Raises:
        StateMismatch: ``load`` answered another shape or dtype than the destination has.
    """
    devices: set[torch.device] = set()
    threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads, thread_name_prefix="ckptd-fill") as pool, torch.no_grad():
        jobs: list[Future[None]] = []
        for name, destination in copies:
            source = load(name)
            if source.shape != destination.shape or source.dtype != destination.dtype:
                raise StateMismatch(
                    f"{name}: {tuple(source.shape)} {source.dtype} was loaded for {tuple(destination.shape)} "
                    f"{destination.dtype}"
                )
            if destination.is_cuda:
                devices.add(destination.device)
            if is_bytes_copy(destination) and is_bytes_copy(source):
                to, of = byte_view(destination), byte_view(source)
                for start in range(0, len(to), PIECE_BYTES):
                    end = start + PIECE_BYTES
                    jobs.append(pool.submit(np.copyto, to[start:end], of[start:end]))
            elif destination.numel():
                without_overlap(destination).copy_(without_overlap(source, destination), non_blocking=True)
        for job in jobs:
            job.result()
    for device in devices:
        torch.cuda.synchronize(device)


def empty_like(like: torch.Tensor, dtype: torch.dtype, device: torch.device | None) -> torch.Tensor:
    """Fresh memory with the shape and strides of ``like``, in huge pages where the system grants them."""
    made = torch.empty_like(like, dtype=dtype, device=device)
    if made.is_cpu and made.numel() * made.element_size() >= HUGE_BYTES and sys.platform == "linux":
        # Touching fresh memory runs at 3 GB/s in pages of 4 KiB and at 15 in huge ones (run). Refusal costs only speed.
        start = -(-made.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size_bytes = made.data_ptr() + made.numel() * made.element_size() - start
        _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size_bytes), mmap.MADV_HUGEPAGE)
    return made


def is_bytes_copy(tensor: torch.Tensor) -> bool:
    """Whether the tensor's elements are one run of host memory, long enough that a thread is worth its start."""
    return (
        tensor.is_cpu
        and tensor.numel() * tensor.element_size() >= SMALL_BYTES
        and tensor.is_contiguous()
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


def byte_view(tensor: torch.Tensor) -> Bytes:
    view: Bytes = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return view


def without_overlap(tensor: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
    """``tensor`` less the repetitions of expanded dimensions (of ``like``, or its own): ``copy_`` refuses to write
    one element several times."""
    expanded = tensor if like is None else like
    for dim, (size, stride) in enumerate(zip(expanded.shape, expanded.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor
