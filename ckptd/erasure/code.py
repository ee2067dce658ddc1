"""The Reed-Solomon code of a stripe: k data fragments, m parity fragments, any k of the k + m give all.

Layer: inside ``erasure``, above ``kernel``. Invariants: a codeword, one byte of each fragment in fragment order, is one
of ``reedsolo.RSCodec(m, fcr=0, prim=0x11d, generator=2)``: data first, then parity, shortened to k + m symbols. A
fragment given as None is all zeros and costs nothing. See Reed and Solomon, "Polynomial codes over certain finite
fields" (1960).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, Final

import numpy as np
import reedsolo

from ckptd.erasure.galois import PRODUCTS, Matrix, invert, multiply
from ckptd.erasure.kernel import Kernel, find_kernel
from ckptd.errors import RestoreFailed
from ckptd.memory import Bytes
from ckptd.model import LARGEST_GROUP, Geometry

_TABLES_KEPT: Final = 64  # combinations of lost, used and empty fragments; each takes 32 bytes an element of its matrix
_reedsolo_lock = threading.Lock()  # its tables are globals that every RSCodec() writes anew


@cache
def generator_rows(k: int, m: int) -> Matrix:
    """The m x k matrix whose product with the k data bytes of a codeword is its m parity bytes. Read-only.

    Column j is the remainder of x^(k + m - 1 - j) divided by the generator polynomial of ``reedsolo``.

    Raises:
        ValueError: not 1 <= k, 1 <= m, k + m <= 255.
    """
    if k < 1 or m < 1 or k + m > LARGEST_GROUP:
        raise ValueError(f"{k}+{m}: k and m from 1, their sum at most {LARGEST_GROUP}")
    with _reedsolo_lock:
        polynomial = reedsolo.RSCodec(m, fcr=0, prim=0x11D, generator=2, c_exp=8).gen[m]
    tail = np.array(list(polynomial[1:]), np.uint8)  # without the leading 1
    rows = np.zeros((m, k), np.uint8)
    remainder = tail
    for column in range(k - 1, -1, -1):
        rows[:, column] = remainder
        shifted = np.append(remainder[1:], np.uint8(0))
        remainder = shifted ^ PRODUCTS[remainder[0], tail]
    rows.setflags(write=False)
    return rows


class Code:
    """Encodes and reconstructs the fragments of a stripe. Fragments 0..k-1 are data, k..k+m-1 parity.

    Buffers are contiguous uint8 arrays of one length, any alignment; targets share no memory with anything else.
    Threads may share an instance: nothing but a bounded cache of tables changes.
    """

    def __init__(self, geometry: Geometry, kernel: Kernel | None = None) -> None:
        """``kernel`` None: the fastest of this machine. ValueError when the geometry is none."""
        self.geometry = geometry
        self._kernel = find_kernel() if kernel is None else kernel
        self._parity_rows = generator_rows(*geometry)
        self._data = tuple(range(geometry.k))
        self._parity = tuple(range(geometry.k, sum(geometry)))
        self._tables = lru_cache(_TABLES_KEPT)(self._prepare)

    def encode(self, data: Sequence[Bytes | None], parity: Sequence[Bytes]) -> None:
        """Writes all m parity fragments of the k ``data`` fragments. ValueError on a wrong number or length."""
        if len(parity) != self.geometry.m:
            raise ValueError(f"{len(parity)} parity fragments for {self.geometry}")
        self._encode(self._parity, data, parity)

    def encode_row(self, row: int, data: Sequence[Bytes | None], parity: Bytes) -> None:
        """Writes parity fragment k + ``row``, the one that a holder keeps."""
        if not 0 <= row < self.geometry.m:
            raise ValueError(f"no row {row} in {self.geometry}")
        self._encode((self.geometry.k + row,), data, (parity,))

    def reconstruct(self, present: Mapping[int, Bytes | None], wanted: Mapping[int, Bytes]) -> None:
        """Writes the ``wanted`` fragments from k of the ``present`` ones: those of zeros first, then in their order.

        Raises:
            RestoreFailed: fewer than k are present.
            ValueError: a fragment that the geometry does not have, or buffers of different lengths.
        """
        k, n = self.geometry.k, sum(self.geometry)
        if strange := [fragment for fragment in (*present, *wanted) if not 0 <= fragment < n]:
            raise ValueError(f"no fragment {strange[0]} in {self.geometry}")
        if len(present) < k:
            raise RestoreFailed(f"{len(present)} of {n} fragments are there, {k} are needed")
        by_cost = sorted(present, key=lambda fragment: present[fragment] is not None)  # stable: else as given
        used = tuple(sorted(by_cost[:k]))
        self._apply(tuple(wanted), used, [present[fragment] for fragment in used], tuple(wanted.values()))

    def _encode(self, wanted: tuple[int, ...], data: Sequence[Bytes | None], parity: Sequence[Bytes]) -> None:
        if len(data) != self.geometry.k:
            raise ValueError(f"{len(data)} data fragments for {self.geometry}")
        self._apply(wanted, self._data, data, parity)

    def _apply(
        self,
        wanted: tuple[int, ...],
        used: tuple[int, ...],
        buffers: Sequence[Bytes | None],
        targets: Sequence[Bytes],
    ) -> None:
        sources = [buffer for buffer in buffers if buffer is not None]
        if not sources:
            for target in targets:
                target[...] = 0
        elif targets:
            kept = self._data  # all k: what is computed a block at a time has to be quick in Python too
            if len(sources) < len(buffers):
                kept = tuple(at for at, buffer in enumerate(buffers) if buffer is not None)
            self._kernel.apply(self._tables(wanted, used, kept), sources, targets)

    def _prepare(self, wanted: tuple[int, ...], used: tuple[int, ...], kept: tuple[int, ...]) -> Any:
        """The kernel's tables for ``wanted`` from ``used``, of which those at ``kept`` are not zeros."""
        data = self._data_from(used)[:, list(kept)]
        parity = [fragment - self.geometry.k for fragment in wanted if fragment >= self.geometry.k]
        rows = np.concatenate([data, multiply(self._parity_rows[parity], data)])
        order = {self.geometry.k + row: self.geometry.k + at for at, row in enumerate(parity)}
        return self._kernel.prepare(rows[[order.get(fragment, fragment) for fragment in wanted]])

    def _data_from(self, used: tuple[int, ...]) -> Matrix:
        """The k x k matrix that gives the data fragments from the ``used`` ones, k in ascending order.

        With d the data, L the lost ones among it and P the rows of the parity used, p = P d. So P[L] d[L] is p plus the
        rest of P times the data that is there, and only P[L] has to be inverted: at most m x m.
        """
        k = self.geometry.k
        there = [fragment for fragment in used if fragment < k]
        lost = sorted(set(self._data).difference(there))
        result = np.zeros((k, k), np.uint8)
        result[there, range(len(there))] = 1
        if lost:
            rows = self._parity_rows[[fragment - k for fragment in used if fragment >= k]]
            known = np.concatenate([rows[:, there], np.eye(len(lost), dtype=np.uint8)], axis=1)
            result[lost] = multiply(invert(rows[:, lost]), known)
        return result
