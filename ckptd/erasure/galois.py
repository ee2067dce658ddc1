"""The field GF(2^8) of ``reedsolo`` and ISA-L (polynomial 0x11d, generator 2): products and inverses of matrices.

Layer: inside ``erasure``, below ``kernel`` and ``code``; NumPy only. Invariants: addition is XOR; the tables are
read-only. For matrices of a few hundred rows; buffers are the business of ``kernel``.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.uint8]

_POLYNOMIAL: Final = 0x11D
_ORDER: Final = 255  # of the multiplicative group: generator ** 255 == 1


def _tables() -> tuple[Matrix, Matrix]:
    """The table of products, 256 x 256, and that of inverses (that of 0 is 0 and means nothing)."""
    powers = np.zeros(2 * _ORDER, np.uint8)
    logarithms = np.zeros(256, np.int64)
    value = 1
    for exponent in range(_ORDER):
        powers[exponent] = powers[exponent + _ORDER] = value
        logarithms[value] = exponent
        value <<= 1
        if value > 255:
            value ^= _POLYNOMIAL
    products = powers[logarithms[:, None] + logarithms[None, :]]
    products[0, :] = products[:, 0] = 0
    inverses = powers[(_ORDER - logarithms) % _ORDER]
    inverses[0] = 0
    products.setflags(write=False)
    inverses.setflags(write=False)
    return products, inverses


PRODUCTS, _INVERSES = _tables()


def multiply(left: Matrix, right: Matrix) -> Matrix:
    """The product of an a x b and a b x c matrix."""
    result = np.zeros((left.shape[0], right.shape[1]), np.uint8)
    for column, row in zip(left.T, right, strict=True):
        result ^= PRODUCTS[column[:, None], row[None, :]]
    return result


def invert(matrix: Matrix) -> Matrix:
    """The inverse of a square matrix, by Gauss and Jordan.

    Raises:
        ValueError: it has none.
    """
    size = len(matrix)
    work = np.concatenate([matrix, np.eye(size, dtype=np.uint8)], axis=1)
    for pivot in range(size):
        candidates = np.flatnonzero(work[pivot:, pivot])
        if not candidates.size:
            raise ValueError("the matrix is singular")
        swapped = pivot + int(candidates[0])
        work[[pivot, swapped]] = work[[swapped, pivot]]
        work[pivot] = PRODUCTS[_INVERSES[work[pivot, pivot]], work[pivot]]
        factors = work[:, pivot].copy()
        factors[pivot] = 0
        work ^= PRODUCTS[factors[:, None], work[pivot][None, :]]
    return work[:, size:].copy()
