"""What an operation is to the program, whichever rank and communicator object it runs on. Pure; below ``reduce``.

Invariant: ranks that run the same program give their operations the same names. A name holds the label (else the size)
of the group, the operation and the power of two of its bytes, never ranks, ids or rows; numbers are a rank's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from ckptd.detect.records import Communicator
from ckptd.format.timings import POINT_TO_POINT, SYNCHRONISING, Op, Rows

Ids = npt.NDArray[np.int64]

# Programs have tens; what comes after so many shares one name, so that memory stays bounded whatever sizes are sent.
MOST_SIGNATURES: Final = 1024
_MOST_CODES: Final = 1 << 14
_OPS: Final = 16
_SIZES: Final = 128


@dataclass(frozen=True, slots=True)
class Signature:
    """``members``: of the group, 0 unknown. ``size_log2``: bytes are below 2**size_log2, and at least half of that."""

    group: str
    members: int
    op: Op
    size_log2: int

    @property
    def name(self) -> str:
        return f"{self.group}:{self.op.label}:<2^{self.size_log2}B" if self.group else "other"

    @property
    def anchor_order(self) -> tuple[bool, bool, int, int, int, str]:
        """The greatest makes the best step boundary: members leave it together, and most ranks share it."""
        is_collective = self.op not in POINT_TO_POINT
        return self.op in SYNCHRONISING, is_collective, self.members, self.size_log2, -int(self.op), self.group


_OTHER: Final = Signature("", 0, Op.OTHER, 0)


class Signatures:
    """The signatures a rank has shown, numbered from 0 by first appearance; 0 is what found no number of its own."""

    def __init__(self) -> None:
        self.known: list[Signature] = [_OTHER]
        self._numbers: dict[Signature, int] = {_OTHER: 0}
        self._by_code: dict[int, int] = {}

    def number(self, operations: Rows, table: Mapping[int, Communicator]) -> Ids:
        """The signature of each of ``operations`` (n,), as an index into ``known``."""
        size_log2 = np.frexp(operations["size_bytes"].astype(np.float64))[1].astype(np.int64)
        codes = (operations["communicator"].astype(np.int64) * _OPS + operations["op"]) * _SIZES + size_log2
        unique, inverse = np.unique(codes, return_inverse=True)
        if len(self._by_code) > _MOST_CODES:
            self._by_code.clear()
        numbers = [self._number_of(code, table) for code in unique.tolist()]
        return np.asarray(numbers, np.int64)[inverse]

    def _number_of(self, code: int, table: Mapping[int, Communicator]) -> int:
        found = self._by_code.get(code)
        if found is not None:
            return found
        rest, size_log2 = divmod(code, _SIZES)
        communicator = table.get(rest // _OPS)
        if communicator is None:
            # The table may still arrive: nothing is remembered.
            return 0
        members = len(communicator.members)
        op = Op(rest % _OPS) if rest % _OPS < len(Op) else Op.OTHER
        signature = Signature(communicator.label or f"{members} ranks", members, op, size_log2)
        number = self._numbers.get(signature)
        if number is None:
            number = len(self.known) if len(self.known) < MOST_SIGNATURES else 0
            if number:
                self.known.append(signature)
                self._numbers[signature] = number
        self._by_code[code] = number
        return number
