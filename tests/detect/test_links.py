"""The link matrix names a link, a side or a node, and owns up where these cannot be told apart."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.detect.links import Layer, Side, by_node, link_matrix

Pairs = list[tuple[int, int]]


def mesh(count: int) -> Pairs:
    return [(a, b) for a in range(count) for b in range(count) if a != b]


def chain(count: int) -> Pairs:
    return [pair for a in range(count - 1) for pair in ((a, a + 1), (a + 1, a))]


def ring(count: int) -> Pairs:
    return [(a, (a + 1) % count) for a in range(count)]


def layer(
    pairs: Pairs,
    slow: Iterable[tuple[int, int]],
    by: float = 4.0,
    noise: float = 0.03,
    seed: int = 0,
    past: bool = False,
) -> Layer:
    random = np.random.default_rng(seed)
    slow = set(slow)
    values = np.array([by if pair in slow else 1.0 for pair in pairs]) * random.lognormal(0, noise, len(pairs))
    src, dst = np.array(pairs, np.int64).T
    places = tuple(f"node{at}" for at in range(int(max(src.max(), dst.max())) + 1))
    return Layer("transfer", "s", places, src, dst, values, is_relative=past)


def touching(pairs: Pairs, place: int) -> Pairs:
    return [pair for pair in pairs if place in pair]


def findings(of: Layer) -> list[tuple[Side, tuple[int, ...]]]:
    return [(found.side, found.places) for found in link_matrix(of).findings]


@given(st.integers(4, 12), st.integers(0, 11), st.integers(0, 99), st.sampled_from([mesh, chain, ring]), st.booleans())
def test_a_slow_network_side_of_a_node_is_that_node(count: int, place: int, seed: int, shape, past: bool) -> None:
    pairs = shape(count)
    place %= count
    if len({end for pair in touching(pairs, place) for end in pair}) < 3:
        return  # the end of a chain
    of = layer(pairs, touching(pairs, place), seed=seed, past=past)
    assert {found for _, found in findings(of)} == {(place,)}


@given(st.integers(4, 12), st.integers(0, 200), st.integers(0, 99), st.sampled_from([mesh, chain]), st.booleans())
def test_a_slow_link_is_that_link(count: int, which: int, seed: int, shape, past: bool) -> None:
    pairs = shape(count)
    a, b = pairs[which % len(pairs)]
    (found,) = link_matrix(layer(pairs, [(a, b), (b, a)], seed=seed, past=past)).findings
    assert (found.side, found.places) == (Side.LINK, tuple(sorted((a, b))))
    has_other = all(len({end for pair in touching(pairs, at) for end in pair}) > 2 for at in (a, b))
    assert found.is_separable == has_other
    assert found.ratio == pytest.approx(4.0, rel=0.25)


@given(st.integers(4, 12), st.integers(0, 11), st.integers(0, 99), st.booleans())
def test_one_direction_of_a_node_is_its_sending_or_receiving_side(
    count: int, place: int, seed: int, sends: bool
) -> None:
    place %= count
    slow = [pair for pair in mesh(count) if pair[0 if sends else 1] == place]
    side = Side.SENDING if sends else Side.RECEIVING
    assert findings(layer(mesh(count), slow, seed=seed)) == [(side, (place,))]


@given(st.integers(2, 12), st.integers(0, 999), st.sampled_from([mesh, chain, ring]), st.floats(0.0, 0.05))
def test_a_healthy_matrix_names_nobody(count: int, seed: int, shape, noise: float) -> None:
    assert findings(layer(shape(count), [], noise=noise, seed=seed)) == []


def test_one_slow_pair_of_a_ring_cannot_be_told_from_its_ends() -> None:
    (found,) = link_matrix(layer(ring(5), [(1, 2)])).findings
    assert (found.side, found.places, found.is_separable) == (Side.LINK, (1, 2), False)


def test_of_two_nodes_the_link_is_named_by_its_past_only_and_as_inseparable() -> None:
    (found,) = link_matrix(layer(mesh(2), mesh(2), past=True)).findings
    assert (found.side, found.places, found.is_separable) == (Side.LINK, (0, 1), False)
    assert findings(layer(mesh(2), mesh(2))) == []


def test_all_links_slower_than_before_are_no_fault_of_one() -> None:
    assert findings(layer(chain(6), chain(6), past=True)) == []


def test_two_slow_links_are_both_named() -> None:
    of = layer(mesh(8), [(0, 1), (1, 0), (5, 6), (6, 5)])
    assert {found for _, found in findings(of)} == {(0, 1), (5, 6)}


def test_a_matrix_is_drawn_with_gaps_where_no_pair_is() -> None:
    matrix = link_matrix(layer(chain(4), [(1, 2)], noise=0.0))
    table = matrix.dense()
    assert table[1, 2] == 4.0
    assert np.isnan(table[0, 3])
    assert [pair for pair, slow in zip(chain(4), matrix.is_slow, strict=True) if slow] == [(1, 2)]


def test_pairs_of_ranks_become_pairs_of_nodes_by_their_lower_median() -> None:
    of = Layer("transfer", "s", ("r0", "r1", "r2", "r3"), np.array([0, 1]), np.array([2, 3]), np.array([1.0, 9.0]))
    nodes = by_node(of, np.array([0, 0, 1, 1]), ("a", "b"))
    assert (nodes.src.tolist(), nodes.dst.tolist(), nodes.values.tolist()) == ([0], [1], [1.0])
