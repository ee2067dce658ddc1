"""The code: any m erasures of every geometry, byte for byte that of ``reedsolo``, zeros for free."""

from __future__ import annotations

import itertools
import json
import random
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reedsolo
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.erasure import Code, Kernel
from ckptd.erasure.code import generator_rows
from ckptd.erasure.kernel import NumpyKernel, isal_files, load_isal
from ckptd.errors import RestoreFailed
from ckptd.memory import Bytes
from ckptd.model import Geometry

ISAL = load_isal(isal_files())
KERNELS: list[Kernel] = [NumpyKernel(), *([] if ISAL is None else [ISAL])]
SMALL = [Geometry(k, n - k) for n in range(2, 25) for k in range(1, n)]
LARGE = [
    Geometry(*pair)
    for pair in [(1, 254), (254, 1), (250, 5), (251, 4), (128, 127), (100, 30), (30, 2), (64, 64), (199, 56), (3, 100)]
]
GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())
geometries = st.integers(2, 255).flatmap(lambda n: st.integers(1, n - 1).map(lambda k: Geometry(k, n - k)))


def random_fragments(seed: int, count: int, size: int) -> list[Bytes]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, size), dtype=np.uint8))


def blank(count: int, size: int) -> list[Bytes]:
    return [np.full(size, 0xA5, np.uint8) for _ in range(count)]


def encoded(code: Code, data: Sequence[Bytes | None], size: int) -> list[Bytes]:
    parity = blank(code.geometry.m, size)
    code.encode(data, parity)
    return parity


def recovered(code: Code, fragments: Sequence[Bytes | None], lost: Iterable[int], size: int) -> dict[int, Bytes]:
    wanted = dict(zip(lost, blank(sum(code.geometry), size), strict=False))
    code.reconstruct({at: part for at, part in enumerate(fragments) if at not in wanted}, wanted)
    return wanted


def oracle(geometry: Geometry) -> reedsolo.RSCodec:
    return reedsolo.RSCodec(geometry.m, nsize=sum(geometry), fcr=0, prim=0x11D, generator=2, c_exp=8)


def encoded_by_reedsolo(geometry: Geometry, data: Sequence[Bytes]) -> list[Bytes]:
    codec = oracle(geometry)
    words = [list(codec.encode(bytes(column))) for column in np.stack(data).T]
    return list(np.array(words, np.uint8).T.copy())[geometry.k :]


def of_hex(text: str) -> Bytes:
    return np.frombuffer(bytes.fromhex(text), np.uint8)


def same(one: Iterable[Bytes], other: Iterable[Bytes]) -> bool:
    return all((a == b).all() for a, b in zip(one, other, strict=True))


# --- against the oracle -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("geometry", [(4, 2), (1, 1), (10, 5), (1, 30), (40, 1), (100, 20)], ids=str)
def test_generator_rows_are_what_reedsolo_makes_of_unit_vectors(geometry: tuple[int, int]) -> None:
    k, m = geometry
    codec = oracle(Geometry(k, m))
    columns = [list(codec.encode(bytes(at == one for at in range(k))))[k:] for one in range(k)]
    assert generator_rows(k, m).T.tolist() == columns


@pytest.mark.parametrize("geometry", [(0, 1), (1, 0), (200, 56), (-1, 3)], ids=str)
def test_a_geometry_beyond_the_field_is_refused(geometry: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at most 255"):
        Code(Geometry(*geometry))


def test_every_geometry_up_to_24_nodes_encodes_as_reedsolo_and_recovers_from_any_m_losses() -> None:
    choose = random.Random(5)
    for geometry in SMALL:
        n = sum(geometry)
        data = random_fragments(n * 100 + geometry.k, geometry.k, 3)
        parity = encoded_by_reedsolo(geometry, data)
        for kernel in KERNELS:
            code = Code(geometry, kernel)
            assert same(encoded(code, data, 3), parity), geometry
            for _ in range(3):
                lost = choose.sample(range(n), geometry.m)
                found = recovered(code, [*data, *parity], lost, 3)
                assert same(found.values(), [[*data, *parity][at] for at in lost]), (geometry, lost)


@pytest.mark.parametrize("geometry", LARGE, ids=str)
def test_large_geometries_encode_as_reedsolo_and_recover(geometry: Geometry) -> None:
    choose = random.Random(6)
    data = random_fragments(geometry.k, geometry.k, 2)
    parity = encoded_by_reedsolo(geometry, data)
    for kernel in KERNELS:
        code = Code(geometry, kernel)
        assert same(encoded(code, data, 2), parity)
        lost = choose.sample(range(sum(geometry)), geometry.m)
        assert same(recovered(code, [*data, *parity], lost, 2).values(), [[*data, *parity][at] for at in lost])


@pytest.mark.parametrize("geometry", [Geometry(4, 2), Geometry(3, 3), Geometry(2, 4), Geometry(6, 2)], ids=str)
def test_every_pattern_of_losses_is_recovered(geometry: Geometry) -> None:
    code, size = Code(geometry), 100
    fragments = random_fragments(1, geometry.k, size)
    fragments += encoded(code, fragments, size)
    for count in range(1, geometry.m + 1):
        for lost in itertools.combinations(range(sum(geometry)), count):
            found = recovered(code, fragments, lost, size)
            assert same(found.values(), [fragments[at] for at in lost]), lost


@given(geometries, st.integers(1, 200), st.integers(0, 2**32), st.data())
@settings(max_examples=60)
def test_any_fragments_are_recovered_from_any_k_others(
    geometry: Geometry, size: int, seed: int, draw: st.DataObject
) -> None:
    code = Code(geometry)
    fragments = random_fragments(seed, geometry.k, size)
    fragments += encoded(code, fragments, size)
    order = list(range(sum(geometry)))
    random.Random(seed).shuffle(order)
    lost = order[: draw.draw(st.integers(1, geometry.m))]
    wanted = lost[: draw.draw(st.integers(1, len(lost)))]
    targets = dict(zip(wanted, blank(len(wanted), size), strict=True))
    code.reconstruct({at: fragments[at] for at in order if at not in lost}, targets)
    assert same(targets.values(), [fragments[at] for at in wanted])


@given(st.integers(2, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1))), st.integers(0, 2**32))
@settings(max_examples=40)
def test_reedsolo_decodes_what_we_encode(size: tuple[int, int], seed: int) -> None:
    geometry = Geometry(size[1], size[0] - size[1])
    data = random_fragments(seed, geometry.k, 2)
    words = np.stack([*data, *encoded(Code(geometry), data, 2)]).T.copy()
    lost = random.Random(seed).sample(range(sum(geometry)), geometry.m)
    for word, column in zip(words, np.stack(data).T, strict=True):
        word[lost] = 0
        decoded = oracle(geometry).decode(bytearray(word), erase_pos=lost, only_erasures=True)
        assert bytes(decoded[0]) == bytes(column)


@pytest.mark.parametrize("vector", GOLDEN, ids=lambda vector: vector["geometry"])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name.split()[0])
def test_golden_vectors_are_what_they_were(vector: dict[str, Any], kernel: Kernel) -> None:
    code = Code(Geometry.parse(vector["geometry"]), kernel)
    data, parity = (
        [np.array(list(bytes.fromhex(text)), np.uint8) for text in vector[key]] for key in ("data", "parity")
    )
    size = data[0].size
    assert [row.tobytes().hex() for row in encoded(code, data, size)] == vector["parity"]
    lost = range(min(code.geometry))
    assert same(recovered(code, [*data, *parity], lost, size).values(), data[: len(lost)])


# --- rows, views, zeros -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name.split()[0])
def test_a_row_alone_is_that_row_of_all(kernel: Kernel) -> None:
    code, data = Code(Geometry(5, 3), kernel), random_fragments(2, 5, 1001)
    parity = encoded(code, data, 1001)
    for row in range(3):
        (alone,) = blank(1, 1001)
        code.encode_row(row, data, alone)
        assert (alone == parity[row]).all()


@given(size=st.integers(0, 300), shift=st.integers(0, 70), seed=st.integers(0, 2**32))
@settings(max_examples=60)
def test_views_at_any_alignment_are_encoded_in_place(size: int, shift: int, seed: int) -> None:
    geometry, stride = Geometry(4, 2), 400
    memory = random_fragments(seed, 1, stride * 6)[0]
    views = [memory[stride * at + shift * (at + 1) % 71 :][:size] for at in range(6)]
    for kernel in KERNELS:
        Code(geometry, kernel).encode(views[:4], views[4:])
        assert size == 0 or same(views[4:], encoded_by_reedsolo(geometry, views[:4]))


@given(st.sets(st.integers(0, 5)), st.sets(st.integers(0, 8), max_size=3), st.booleans(), st.integers(0, 2**32))
@settings(max_examples=100)
def test_none_stands_for_a_fragment_of_zeros(empty: set[int], lost: set[int], is_zero_parity: bool, seed: int) -> None:
    code, size = Code(Geometry(6, 3)), 129
    data = [
        np.zeros(size, np.uint8) if at in empty else part for at, part in enumerate(random_fragments(seed, 6, size))
    ]
    sparse = [None if at in empty else part for at, part in enumerate(data)]
    parity = encoded(code, data, size)
    assert same(encoded(code, sparse, size), parity)
    for row in range(3):
        (alone,) = blank(1, size)
        code.encode_row(row, sparse, alone)
        assert (alone == parity[row]).all()
    shown = [None if is_zero_parity and not part.any() else part for part in parity]
    assert same(recovered(code, [*sparse, *shown], lost, size).values(), [[*data, *parity][at] for at in lost])


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name.split()[0])
def test_nothing_but_zeros_gives_zeros(kernel: Kernel) -> None:
    code = Code(Geometry(3, 2), kernel)
    assert not any(row.any() for row in encoded(code, [None] * 3, 50))
    assert not any(part.any() for part in recovered(code, [None] * 5, (0, 4), 50).values())


def test_fragments_of_zeros_are_used_first_then_the_others_in_their_order() -> None:
    code, garbage = Code(Geometry(3, 2)), random_fragments(9, 1, 64)[0]
    data: list[Bytes | None] = [*random_fragments(3, 2, 64), None]
    parity = encoded(code, data, 64)
    wanted = dict(enumerate(blank(1, 64)))
    code.reconstruct({4: parity[1], 1: data[1], 3: garbage, 2: None}, wanted)
    assert (wanted[0] == data[0]).all()


def test_nothing_wanted_is_nothing_done() -> None:
    Code(Geometry(2, 1)).reconstruct(dict(enumerate(random_fragments(1, 2, 8))), {})


# --- what is refused ----------------------------------------------------------------------------------------------
def test_too_few_fragments_fail_with_their_number() -> None:
    present = dict(enumerate(random_fragments(1, 3, 8)))
    with pytest.raises(RestoreFailed, match=r"3 of 6 fragments are there, 4 are needed"):
        Code(Geometry(4, 2)).reconstruct(present, dict(enumerate(blank(1, 8))))


def test_arguments_that_do_not_fit_the_geometry_are_refused() -> None:
    code, parts = Code(Geometry(2, 1)), random_fragments(1, 4, 8)
    for wrong in (
        lambda: code.encode(parts[:1], parts[3:]),
        lambda: code.encode(parts[:3], parts[3:]),
        lambda: code.encode(parts[:2], []),
        lambda: code.encode(parts[:2], parts[2:]),
        lambda: code.encode([parts[0], parts[1][:7]], parts[3:]),
        lambda: code.encode_row(1, parts[:2], parts[3]),
        lambda: code.encode_row(-1, parts[:2], parts[3]),
        lambda: code.reconstruct({0: parts[0], 3: parts[1]}, {1: parts[2]}),
        lambda: code.reconstruct({0: parts[0], 1: parts[1]}, {-1: parts[2]}),
    ):
        with pytest.raises(ValueError):
            wrong()


# --- tables -------------------------------------------------------------------------------------------------------
def test_the_tables_kept_are_bounded() -> None:
    code, size = Code(Geometry(6, 4)), 4
    fragments = random_fragments(1, 6, size)
    fragments += encoded(code, fragments, size)
    for lost in itertools.combinations(range(10), 4):
        recovered(code, fragments, lost, size)
    assert code._tables.cache_info().currsize <= 64


def test_threads_share_a_code() -> None:
    code, size = Code(Geometry(5, 3)), 5000
    fragments = random_fragments(1, 5, size)
    fragments += encoded(code, fragments, size)
    wrong: list[tuple[int, ...]] = []

    def work(patterns: list[tuple[int, ...]]) -> None:
        wrong.extend(
            lost
            for lost in patterns
            if not same(recovered(code, fragments, lost, size).values(), [fragments[at] for at in lost])
        )

    patterns = list(itertools.combinations(range(8), 3))
    threads = [threading.Thread(target=work, args=(patterns[at:] + patterns[:at],)) for at in (0, 14, 28, 42)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
