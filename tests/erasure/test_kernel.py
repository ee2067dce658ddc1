"""Kernels: the same bytes from all of them, in place, whatever the length and the alignment; what loads when."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.erasure import kernel as module
from ckptd.erasure.galois import PRODUCTS, invert, multiply
from ckptd.erasure.kernel import IsalKernel, Kernel, NumpyKernel, find_kernel, isal_files, load_isal
from ckptd.memory import Bytes

ISAL = load_isal(isal_files())
GUARD = 0xA5


@pytest.fixture
def isal() -> IsalKernel:
    if ISAL is None:
        pytest.skip("no ISA-L on this machine")
    return ISAL


@pytest.fixture(params=["numpy", "isal"])
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return NumpyKernel() if request.param == "numpy" else request.getfixturevalue("isal")


@pytest.fixture
def forgotten() -> Iterator[None]:
    """find_kernel() searches anew, and again after the test."""
    find_kernel.cache_clear()
    yield
    find_kernel.cache_clear()


def random_bytes(seed: int, *shape: int) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def expected(matrix: Bytes, sources: list[Bytes]) -> list[Bytes]:
    """By the definition, one product table a coefficient."""
    if sources[0].size == 0:
        return [np.empty(0, np.uint8) for _ in matrix]
    return list(multiply(matrix, np.stack(sources)))


def slow_product(a: int, b: int) -> int:
    """Carry-less multiplication, reduced bit by bit."""
    result = 0
    for bit in range(8):
        if b >> bit & 1:
            result ^= a << bit
    for bit in range(14, 7, -1):
        if result >> bit & 1:
            result ^= 0x11D << (bit - 8)
    return result


# --- the field ----------------------------------------------------------------------------------------------------
def test_the_table_of_products_is_that_of_the_polynomial() -> None:
    assert all(PRODUCTS[a, b] == slow_product(a, b) for a in range(256) for b in range(256))


@given(st.integers(1, 12), st.integers(0, 2**32))
@settings(max_examples=50)
def test_an_inverse_is_one_from_both_sides(size: int, seed: int) -> None:
    matrix = random_bytes(seed, size, size)
    try:
        inverse = invert(matrix)
    except ValueError:
        return
    identity = np.eye(size, dtype=np.uint8)
    assert (multiply(matrix, inverse) == identity).all()
    assert (multiply(inverse, matrix) == identity).all()


def test_a_matrix_without_an_inverse_is_refused() -> None:
    with pytest.raises(ValueError, match="singular"):
        invert(np.array([[3, 5], [3, 5]], np.uint8))


# --- bytes --------------------------------------------------------------------------------------------------------
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 20),
    size=st.integers(0, 400),
    shifts=st.lists(st.integers(0, 63), min_size=29, max_size=29),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=150)
def test_kernels_agree_at_any_length_and_alignment_and_write_nothing_else(
    rows: int, columns: int, size: int, shifts: list[int], seed: int
) -> None:
    matrix = random_bytes(seed, rows, columns)
    sources = [random_bytes(seed + 1 + at, size + 64)[shifts[at] :][:size] for at in range(columns)]
    before = [source.copy() for source in sources]
    for kernel in filter(None, (ISAL, NumpyKernel())):
        memory = [np.full(size + 128, GUARD, np.uint8) for _ in range(rows)]
        targets = [whole[shift:][:size] for whole, shift in zip(memory, shifts[columns:], strict=False)]
        kernel.apply(kernel.prepare(matrix), sources, targets)
        for whole, shift, want in zip(memory, shifts[columns:], expected(matrix, sources), strict=False):
            assert (whole[shift : shift + size] == want).all()
            assert (whole[:shift] == GUARD).all()
            assert (whole[shift + size :] == GUARD).all()
        assert all((source == old).all() for source, old in zip(sources, before, strict=True))


def test_every_short_length_is_computed_to_its_last_byte(kernel: Kernel) -> None:
    matrix = random_bytes(1, 3, 5)
    tables = kernel.prepare(matrix)
    for size in [*range(200), 255, 256, 257, 511, 1023, 4095, 65535, 65536, 65537, 131073]:
        sources = list(random_bytes(size, 5, size))
        targets = [np.full(size, GUARD, np.uint8) for _ in matrix]
        kernel.apply(tables, sources, targets)
        assert all((a == b).all() for a, b in zip(targets, expected(matrix, sources), strict=True)), size


@pytest.mark.parametrize(("rows", "columns"), [(1, 254), (254, 1), (127, 128), (5, 250), (1, 1), (7, 33)])
def test_matrices_as_large_as_the_field_are_computed(kernel: Kernel, rows: int, columns: int) -> None:
    matrix, sources = random_bytes(2, rows, columns), list(random_bytes(3, columns, 100))
    targets = [np.zeros(100, np.uint8) for _ in range(rows)]
    kernel.apply(kernel.prepare(matrix), sources, targets)
    assert all((a == b).all() for a, b in zip(targets, expected(matrix, sources), strict=True))


def test_read_only_sources_and_transposed_matrices_are_read(kernel: Kernel) -> None:
    matrix, sources = random_bytes(4, 4, 2).T, list(random_bytes(5, 4, 77))
    for source in sources:
        source.setflags(write=False)
    targets = [np.zeros(77, np.uint8) for _ in range(2)]
    kernel.apply(kernel.prepare(matrix), sources, targets)
    assert all((a == b).all() for a, b in zip(targets, expected(matrix, sources), strict=True))


def test_buffers_longer_than_a_call_takes_are_computed_in_parts(
    isal: IsalKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix, sources = random_bytes(6, 2, 3), list(random_bytes(7, 3, 1000))
    targets = [np.zeros(1000, np.uint8) for _ in matrix]
    lengths, encode = [], isal._encode
    monkeypatch.setattr(module, "_LONGEST_CALL", 300)
    monkeypatch.setattr(isal, "_encode", lambda size, *rest: (lengths.append(size), encode(size, *rest)))
    isal.apply(isal.prepare(matrix), sources, targets)
    assert lengths == [300, 300, 300, 100]
    assert all((a == b).all() for a, b in zip(targets, expected(matrix, sources), strict=True))


READ_ONLY = np.zeros(8, np.uint8)
READ_ONLY.setflags(write=False)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (np.zeros(8, np.uint8), np.zeros(9, np.uint8)),
        (np.zeros(9, np.uint8), np.zeros(8, np.uint8)),
        (np.zeros(8, np.int8), np.zeros(8, np.uint8)),
        (np.zeros(4, np.uint16), np.zeros(8, np.uint8)),
        (np.zeros(16, np.uint8)[::2], np.zeros(8, np.uint8)),
        (np.zeros(8, np.uint8), np.zeros(16, np.uint8)[::2]),
        (np.zeros((2, 4), np.uint8), np.zeros(8, np.uint8)),
        (np.zeros(8, np.uint8), READ_ONLY),
        (None, np.zeros(8, np.uint8)),
        (np.zeros(8, np.uint8), None),
    ],
    ids=[
        "longer",
        "shorter",
        "signed",
        "words",
        "strided",
        "strided-target",
        "square",
        "read-only",
        "few",
        "no-target",
    ],
)
def test_buffers_that_do_not_fit_are_refused_before_anything_is_written(
    kernel: Kernel, source: Bytes | None, target: Bytes | None
) -> None:
    first, sources, targets = np.full(8, GUARD, np.uint8), [np.ones(8, np.uint8)], []
    sources += [source] * (source is not None)
    targets += [first, target] if target is not None else [first]
    with pytest.raises(ValueError):
        kernel.apply(kernel.prepare(random_bytes(8, 2, 2)), sources, targets)
    assert (first == GUARD).all()


@pytest.mark.parametrize("matrix", [np.zeros((0, 3), np.uint8), np.zeros((3, 0), np.uint8), np.zeros((2, 2))])
def test_what_is_no_matrix_of_bytes_is_refused(kernel: Kernel, matrix: Bytes) -> None:
    with pytest.raises(ValueError):
        kernel.prepare(matrix)


# --- which --------------------------------------------------------------------------------------------------------
def test_the_wheel_carries_an_isal_that_loads(forgotten: None) -> None:
    kernel = load_isal(list(isal_files())[:1])
    assert kernel is not None
    assert kernel.is_fast
    assert "pyeclib" in kernel.name
    assert find_kernel().name == kernel.name
    assert find_kernel() is find_kernel()


def test_without_isal_numpy_serves_and_one_warning_says_how_to_get_it(
    forgotten: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "isal_files", lambda: iter(()))
    with structlog.testing.capture_logs() as logs:
        kernels = {find_kernel() for _ in range(3)}
    assert [(kernel.name, kernel.is_fast) for kernel in kernels] == [("numpy", False)]
    (entry,) = logs
    assert entry["log_level"] == "warning"
    assert "slow" in entry["event"]
    assert "pip install pyeclib" in entry["hint"]
    assert "libisal2" in entry["hint"]


def test_without_the_wheel_the_system_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WHEEL", "no-such-distribution")
    assert list(isal_files()) == ["libisal.so.2"]


def test_what_is_no_isal_is_passed_over(tmp_path: Path, isal: IsalKernel) -> None:
    broken = tmp_path / "libisal.so.2"
    broken.write_bytes(b"\x7fELF of another world")
    files = [str(tmp_path / "absent.so"), str(broken), "libc.so.6"]
    assert load_isal(files) is None
    found = load_isal([*files, *isal_files()])
    assert found is not None
    assert found.name == isal.name
