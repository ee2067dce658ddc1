"""Parity against bare ISA-L calls on the same buffers with pointers and tables made before; one core, interleaved."""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from bench.rig import MIB, report
from ckptd.erasure import Code
from ckptd.erasure.kernel import IsalKernel, isal_files, load_isal
from ckptd.memory import Bytes
from ckptd.model import Geometry

BLOCK_BYTES = MIB
GEOMETRIES = (Geometry(4, 1), Geometry(4, 2), Geometry(8, 2), Geometry(8, 4))


class Stripe:
    """Images and their parity as they lie in slots: each fragment is one piece of memory, taken block by block."""

    def __init__(self, geometry: Geometry, data_bytes: int) -> None:
        piece_bytes = -(-data_bytes // geometry.k // BLOCK_BYTES) * BLOCK_BYTES
        random = np.random.default_rng(7)
        self.geometry = geometry
        self.data = [random.integers(0, 256, piece_bytes, dtype=np.uint8) for _ in range(geometry.k)]
        self.parity = [np.zeros(piece_bytes, np.uint8) for _ in range(geometry.m)]
        self.spare = [np.zeros(piece_bytes, np.uint8) for _ in range(geometry.m)]
        self.data_bytes = piece_bytes * geometry.k

    def blocks(self, fragments: Sequence[Bytes]) -> list[list[Bytes]]:
        """The same block of every fragment, for each block."""
        starts = range(0, fragments[0].nbytes, BLOCK_BYTES)
        return [[fragment[start : start + BLOCK_BYTES] for fragment in fragments] for start in starts]


def bare(kernel: IsalKernel, matrix: np.ndarray, sources: list[list[Bytes]], targets: list[list[Bytes]]) -> Callable:
    """What calls ``ec_encode_data`` for every block and does nothing else."""
    tables, call = kernel.prepare(matrix).memory, kernel._encode
    rows, columns = matrix.shape
    pointers = [
        tuple((ctypes.c_void_p * len(side))(*(buffer.ctypes.data for buffer in side)) for side in block)
        for block in zip(sources, targets, strict=True)
    ]

    def run() -> None:
        for inputs, outputs in pointers:
            call(BLOCK_BYTES, columns, rows, tables, inputs, outputs)

    return run


def encode(kernel: IsalKernel, stripe: Stripe) -> tuple[Callable, Callable]:
    """(ours, bare): all parity of a stripe."""
    code, data, parity = Code(stripe.geometry, kernel), stripe.blocks(stripe.data), stripe.blocks(stripe.parity)

    def ours() -> None:
        for sources, targets in zip(data, parity, strict=True):
            code.encode(sources, targets)

    k, m = stripe.geometry
    return ours, bare(kernel, matrix_of(code, range(k, k + m), tuple(range(k))), data, parity)


def reconstruct(kernel: IsalKernel, stripe: Stripe, lost: int) -> tuple[Callable, Callable]:
    """(ours, bare): the first ``lost`` data fragments from the rest."""
    code, (k, _) = Code(stripe.geometry, kernel), stripe.geometry
    fragments, wanted = stripe.blocks([*stripe.data, *stripe.parity]), stripe.blocks(stripe.spare[:lost])
    used = tuple(range(lost, k + lost))

    def ours() -> None:
        for there, targets in zip(fragments, wanted, strict=True):
            code.reconstruct({at: there[at] for at in used}, dict(enumerate(targets)))

    sources = [[there[at] for at in used] for there in fragments]
    return ours, bare(kernel, matrix_of(code, range(lost), used), sources, wanted)


def matrix_of(code: Code, wanted: Sequence[int], used: tuple[int, ...]) -> np.ndarray:
    """The matrix that a kernel gets for it, read off unit vectors."""
    units = np.eye(len(used), dtype=np.uint8)
    rows = {fragment: np.zeros(len(used), np.uint8) for fragment in wanted}
    code.reconstruct(dict(zip(used, units, strict=True)), rows)
    return np.stack(list(rows.values()))


def compare(ours: Callable, bare: Callable, rounds: int) -> tuple[float, float]:
    """Median ratio of neighbouring runs, and median seconds of ours."""
    ours(), bare()
    ratios, seconds = [], []
    for number in range(rounds):
        taken = {}
        for action in (ours, bare) if number % 2 else (bare, ours):
            started = time.perf_counter()
            action()
            taken[action] = time.perf_counter() - started
        ratios.append(taken[bare] / taken[ours])
        seconds.append(taken[ours])
    return statistics.median(ratios), statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size-mib", type=int, default=64, help="data a round")
    parser.add_argument("--rounds", type=int, default=31)
    arguments = parser.parse_args()
    kernel = load_isal(isal_files())
    if kernel is None:
        raise SystemExit("no ISA-L: pip install pyeclib")
    figures: dict[str, float | int | str] = {"bytes": arguments.size_mib * MIB, "block_bytes": BLOCK_BYTES}
    for geometry in GEOMETRIES:
        stripe = Stripe(geometry, arguments.size_mib * MIB)
        cases = {f"encode_{geometry.k}_{geometry.m}": encode(kernel, stripe)}
        if geometry == Geometry(4, 2):
            cases |= {f"reconstruct_{lost}": reconstruct(kernel, stripe, lost) for lost in (1, 2)}
        for name, (ours, limit) in cases.items():
            ratio, seconds = compare(ours, limit, arguments.rounds)
            figures |= {name: ratio, f"{name}_gb_s": stripe.data_bytes / seconds / 1e9}
    report("erasure", figures)


if __name__ == "__main__":
    main()
