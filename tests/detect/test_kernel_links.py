"""Kernels' figures of links: noise names nobody, two bad answers in a row where transfers are slow name a place."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.detect.kernel_links import KernelLinks, PeerLink
from ckptd.detect.link_judge import LinkJudge
from ckptd.detect.records import Confidence, Fault, Kind

Pairs = list[tuple[int, int]]
# Of the logarithm, as was seen between namespaces of one machine.
NOISE_OF_DELIVERY = 0.06
NOISE_OF_ROUND_TRIP = 0.5


def mesh(count: int) -> Pairs:
    return [(a, b) for a in range(count) for b in range(count) if a != b]


def ring(count: int) -> Pairs:
    return [(a, (a + 1) % count) for a in range(count)]


class Kernels:
    """Answers of ``count`` nodes; links differ in rate by nature, for all time."""

    def __init__(self, pairs: Pairs, seed: int, differ: float = 0.0) -> None:
        self.random = np.random.default_rng(seed)
        self.pairs = pairs
        self.rates = 1e9 * self.random.lognormal(0, differ, len(pairs))

    def answer(self, slow: Callable[[int, int], bool] = lambda a, b: False, by: float = 4.0) -> list[PeerLink]:
        peers = []
        for (a, b), rate in zip(self.pairs, self.rates, strict=True):
            times = by if slow(a, b) else 1.0
            rate_bytes_s = rate / times * self.random.lognormal(0, NOISE_OF_DELIVERY)
            rtt_s = 1e-3 * times * self.random.lognormal(0, NOISE_OF_ROUND_TRIP)
            peers.append(PeerLink(f"node{a}", f"node{b}", rtt_s, 0.0, rate_bytes_s))
        return peers


def judge_of(count: int) -> LinkJudge:
    return LinkJudge(tuple(f"node{at}" for at in range(count)), np.arange(count))


def nodes_of(faults: Collection[Fault]) -> list[tuple[str, ...]]:
    return [fault.nodes for fault in faults]


@settings(max_examples=40)
@given(st.integers(4, 10), st.sampled_from([mesh, ring]), st.integers(0, 99), st.sampled_from([0.0, 0.5]))
def test_healthy_links_name_nobody_whatever_they_are_by_nature(count: int, shape, seed: int, differ: float) -> None:
    kernels, judge = Kernels(shape(count), seed), judge_of(count)
    everywhere = [np.arange(count)]
    found = [judge.judge(kernels.answer(), everywhere) for _ in range(30)]
    assert sum(bool(faults) for faults in found) <= 1


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("shape", [mesh, ring])
def test_a_node_is_named_by_the_second_bad_answer_where_transfers_are_slow(shape, seed: int) -> None:
    kernels, judge = Kernels(shape(6), seed), judge_of(6)
    for _ in range(6):
        judge.judge(kernels.answer())
    everywhere = [np.arange(6)]
    assert judge.judge(kernels.answer(lambda a, b: 3 in (a, b)), everywhere) == []
    (fault,) = judge.judge(kernels.answer(lambda a, b: 3 in (a, b)), everywhere)
    assert (fault.kind, fault.nodes, fault.ranks) == (Kind.SLOW_LINK, ("node3",), (3,))
    assert fault.confidence is Confidence.SUSPECT


def test_without_slow_transfers_kernels_are_believed_only_when_they_go_on_saying_so() -> None:
    kernels, judge = Kernels(mesh(5), 1), judge_of(5)
    found = [judge.judge(kernels.answer(lambda a, b: {a, b} == {1, 3})) for _ in range(8)]
    assert nodes_of(found[-1]) == [("node1", "node3")]
    assert found[:4] == [[]] * 4
    assert all(fault.confidence is Confidence.SUSPECT for faults in found for fault in faults)
    assert judge.judge(kernels.answer()) == []


def test_what_changes_little_where_another_link_is_slow_is_not_named() -> None:
    kernels, judge, everywhere = Kernels(ring(8), 3), judge_of(8), [np.arange(8)]
    for _ in range(6):
        judge.judge(kernels.answer())
    for _ in range(3):
        changed = [
            replace(one, delivery_bytes_per_s=(one.delivery_bytes_per_s or 0.0) / (1.7 if one.src == "node6" else 1.0))
            for one in kernels.answer(lambda a, b: 2 in (a, b))
        ]
        found = judge.judge(changed, everywhere)
    assert nodes_of(found) == [("node2",)]


def test_of_two_nodes_kernels_say_nothing_that_transfers_do_not() -> None:
    kernels, judge = Kernels(mesh(2), 1), judge_of(2)
    for is_slow in [False] * 6 + [True] * 10:
        everywhere = [np.arange(2)] * is_slow
        assert judge.judge(kernels.answer(lambda a, b, is_slow=is_slow: is_slow), everywhere, everywhere) == []


def test_between_answers_nothing_changes() -> None:
    kernels, judge = Kernels(mesh(5), 1), judge_of(5)
    everywhere = [np.arange(5)]
    found = [judge.judge(kernels.answer(lambda a, b: {a, b} == {1, 3}), everywhere) for _ in range(3)][-1]
    assert nodes_of(found) == [("node1", "node3")]
    for _ in range(10):
        assert nodes_of(judge.judge(None, everywhere)) == nodes_of(found)


def test_what_is_slow_does_not_become_normal() -> None:
    kernels, judge = Kernels(ring(6), 2), judge_of(6)
    for _ in range(6):
        judge.judge(kernels.answer())
    everywhere = [np.arange(6)]
    for _ in range(60):
        found = judge.judge(kernels.answer(lambda a, b: 3 in (a, b)), everywhere)
    assert nodes_of(found) == [("node3",)]
    assert "delivery_change" in found[0].evidence["figures"]


def test_retransmits_of_one_link_are_held_against_it() -> None:
    judge = judge_of(4)
    peers = [PeerLink(f"node{a}", f"node{b}", retransmit_share=0.06 * ({a, b} == {0, 2})) for a, b in mesh(4)]
    judge.judge(peers, [np.arange(4)])
    (fault,) = judge.judge(peers, [np.arange(4)])
    assert (fault.nodes, list(fault.evidence["figures"])) == (("node0", "node2"), ["retransmits"])


def test_unknown_figures_and_unknown_nodes_make_no_cell() -> None:
    kernels = KernelLinks(("a", "b"))
    peers = [PeerLink("a", "b", rtt_s=1e-4), PeerLink("b", "a"), PeerLink("a", "a", 1.0), PeerLink("a", "c", 1.0)]
    for _ in range(2):
        kernels.take(peers, np.empty(0, np.int64))
    (trips,) = kernels.layers()
    assert (trips.figure, trips.src.tolist(), trips.dst.tolist()) == ("round_trip", [0], [1])
    assert trips.values == pytest.approx([1e-4])


@pytest.mark.parametrize("seed", range(5))
def test_flows_that_begin_amid_a_fault_and_share_links_name_nobody_else(seed: int) -> None:
    """As parity that is made of a snapshot taken because of the fault: slower by nature, and with no past."""
    kernels, others = Kernels(ring(4), seed), Kernels([(0, 2), (2, 0), (1, 3), (3, 1)], seed)
    judge, everywhere = judge_of(4), [np.arange(4)]
    for _ in range(6):
        judge.judge(kernels.answer())
    for _ in range(4):
        bulk = kernels.answer(lambda a, b: 0 in (a, b))
        extra = others.answer(lambda a, b: 0 in (a, b), by=20.0)
        extra = [replace(one, retransmit_share=0.05) for one in extra]
        found = judge.judge(bulk + extra, everywhere, everywhere)
    (fault,) = found
    assert (fault.nodes, fault.confidence) == (("node0",), Confidence.CONFIRMED)
