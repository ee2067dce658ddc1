"""Stripes: every view of the arithmetic agrees, and any m positions may be lost."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.erasure import Code, Stripes
from ckptd.model import Geometry

SMALL = [Geometry(k, n - k) for n in range(2, 13) for k in range(1, n)]
LARGE = [Geometry(250, 5), Geometry(1, 254), Geometry(254, 1), Geometry(128, 127), Geometry(30, 3)]
geometries = st.integers(2, 40).flatmap(lambda n: st.integers(1, n - 1).map(lambda k: Geometry(k, n - k)))


@pytest.mark.parametrize("geometry", [*SMALL, *LARGE], ids=str)
def test_every_view_of_the_stripes_agrees(geometry: Geometry) -> None:
    stripes, (k, m) = Stripes(geometry, 3), geometry
    n = stripes.n
    assert n == k + m
    for stripe in range(n):
        parity, data = stripes.parity_positions(stripe), stripes.data_of(stripe)
        assert sorted([*parity, *(position for position, _ in data)]) == list(range(n))
        assert parity == tuple((stripe + row) % n for row in range(m))
        for column, (position, piece) in enumerate(data):
            assert position == (stripe + m + column) % n
            assert stripes.column_of(stripe, position) == column
            assert stripes.stripe_of(position, piece) == stripe
        for row, position in enumerate(parity):
            assert stripes.column_of(stripe, position) == k + row
            assert (stripe, row) in stripes.parity_of(position)
    for position in range(n):
        held = stripes.parity_of(position)
        assert [row for _, row in held] == list(range(m))
        given_to = [stripes.stripe_of(position, piece) for piece in range(k)]
        assert given_to == [(position + 1 + piece) % n for piece in range(k)]
        assert sorted([*given_to, *(stripe for stripe, _ in held)]) == list(range(n))


@pytest.mark.parametrize("geometry", [Geometry(1, 1), Geometry(2, 1), Geometry(2, 2), Geometry(4, 2)], ids=str)
def test_what_is_recoverable_is_what_leaves_k_fragments_of_each_stripe(geometry: Geometry) -> None:
    stripes = Stripes(geometry, 1)
    subsets = [set(c) for size in range(stripes.n + 1) for c in itertools.combinations(range(stripes.n), size)]
    for data, parity in itertools.product(subsets, subsets):
        left = [
            sum(position not in data for position, _ in stripes.data_of(stripe))
            + sum(position not in parity for position in stripes.parity_positions(stripe))
            for stripe in range(stripes.n)
        ]
        assert stripes.recoverable(data, parity) == (min(left) >= geometry.k)
        if len(data | parity) <= geometry.m:
            assert stripes.recoverable(data, parity)


@given(geometries, st.integers(0, 2**32))
@settings(max_examples=50)
def test_any_m_positions_may_be_lost_and_no_more(geometry: Geometry, seed: int) -> None:
    stripes = Stripes(geometry, 1)
    order = list(range(stripes.n))
    random.Random(seed).shuffle(order)
    assert stripes.recoverable(order[: geometry.m], order[: geometry.m])
    assert not stripes.recoverable(order[: geometry.m + 1], order[: geometry.m + 1])
    assert stripes.recoverable([], order)


# --- pieces -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("blocks", "expected"),
    [([9, 3, 4], 5), ([10, 10, 10], 5), ([11, 0, 0], 6), ([1, 0, 0], 1), ([0, 0, 0], 1), ([], 1)],
)
def test_pieces_are_a_kth_of_the_longest_image(blocks: list[int], expected: int) -> None:
    assert Stripes.plan(Geometry(2, 1), blocks) == Stripes(Geometry(2, 1), expected)


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_extents_cover_the_range_once_and_in_order(k: int, piece_blocks: int, draw: st.DataObject) -> None:
    stripes = Stripes(Geometry(k, 1), piece_blocks)
    first = draw.draw(st.integers(0, k * piece_blocks))
    blocks = draw.draw(st.integers(0, k * piece_blocks - first))
    extents = stripes.extents(first, blocks)
    covered = [piece * piece_blocks + start + at for piece, start, count in extents for at in range(count)]
    assert covered == list(range(first, first + blocks))
    assert all(count > 0 and start + count <= piece_blocks for _, start, count in extents)
    assert len({piece for piece, _, _ in extents}) == len(extents)


@pytest.mark.parametrize(("first", "blocks"), [(-1, 1), (0, -1), (0, 13), (12, 1)])
def test_a_range_beyond_the_pieces_is_refused(first: int, blocks: int) -> None:
    with pytest.raises(ValueError):
        Stripes(Geometry(4, 2), 3).extents(first, blocks)


@pytest.mark.parametrize("piece", [-1, 4])
def test_a_piece_that_no_image_has_is_refused(piece: int) -> None:
    with pytest.raises(ValueError):
        Stripes(Geometry(4, 2), 3).stripe_of(0, piece)


# --- all of it ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("geometry", [Geometry(1, 1), Geometry(2, 1), Geometry(3, 2), Geometry(5, 3)], ids=str)
def test_images_of_lost_positions_are_rebuilt_stripe_by_stripe(geometry: Geometry) -> None:
    random_, block = np.random.default_rng(3), 16
    lengths = [int(length) for length in random_.integers(0, 3 * geometry.k, sum(geometry))]
    stripes, code = Stripes.plan(geometry, lengths), Code(geometry)
    piece_bytes = stripes.piece_blocks * block
    images = np.zeros((stripes.n, geometry.k, piece_bytes), np.uint8)
    for image, length in zip(images.reshape(stripes.n, -1), lengths, strict=True):
        image[: length * block] = random_.integers(0, 256, length * block)
    parity = {fragment: np.zeros(piece_bytes, np.uint8) for i in range(stripes.n) for fragment in stripes.parity_of(i)}
    for (stripe, row), target in parity.items():
        code.encode_row(row, [images[position, piece] for position, piece in stripes.data_of(stripe)], target)
    for lost in itertools.combinations(range(stripes.n), geometry.m):
        for position, piece in itertools.product(lost, range(geometry.k)):
            stripe = stripes.stripe_of(position, piece)
            present = {
                stripes.column_of(stripe, other): images[other, part]
                for other, part in stripes.data_of(stripe)
                if other not in lost
            }
            present |= {
                geometry.k + row: parity[stripe, row]
                for row, other in enumerate(stripes.parity_positions(stripe))
                if other not in lost
            }
            rebuilt = np.empty(piece_bytes, np.uint8)
            code.reconstruct(present, {stripes.column_of(stripe, position): rebuilt})
            assert (rebuilt == images[position, piece]).all()
