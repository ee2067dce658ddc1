"""Two rounds of pairs: a slow node is named and no other, a slow link never makes a node guilty."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ckptd.detect.pairing import Blame, PairResult, PairVerdict, first_round, judge_pairs, second_round
from ckptd.errors import InvalidRequest

Slowdown = Callable[[str, str], float | None]
COUNTS = st.integers(4, 41)


def names(count: int) -> list[str]:
    return [f"node{index}" for index in range(count)]


def measured(pairs: Sequence[tuple[str, str]], slowdown: Slowdown, noise: Sequence[float]) -> list[PairResult]:
    results = []
    for index, (a, b) in enumerate(pairs):
        slower = slowdown(a, b)
        factor = None if slower is None else slower * noise[index % len(noise)]
        results.append(
            PairResult(a, b, None, None) if factor is None else PairResult(a, b, 1e10 / factor, 1e-4 * factor)
        )
    return results


def verdicts(nodes: Sequence[str], slowdown: Slowdown, noise: Sequence[float] = (1.0,)) -> list[PairVerdict]:
    round1 = measured(first_round(nodes), slowdown, noise)
    return judge_pairs(round1, measured(second_round(round1), slowdown, noise))


def of_nodes(*slow: str, by: float | None = 2.0) -> Slowdown:
    return lambda a, b: by if {a, b} & set(slow) else 1.0


def of_link(one: str, other: str, by: float | None = 4.0) -> Slowdown:
    return lambda a, b: by if {a, b} == {one, other} else 1.0


NOISE = st.lists(st.floats(0.95, 1.05), min_size=1, max_size=11)


@example(5, 1, [1.0], 1.6)  # both partners of the node measured twice are among the slower
@given(COUNTS, st.integers(0, 40), NOISE, st.sampled_from([1.6, 2.0, 10.0, None]))
def test_one_slow_node_is_always_named_and_no_other(
    count: int, which: int, noise: list[float], by: float | None
) -> None:
    slow = names(count)[which % count]
    found = verdicts(names(count), of_nodes(slow, by=by), noise)
    assert [(v.blame, v.nodes, v.is_certain) for v in found] == [(Blame.NODE, (slow,), True)]


@given(st.integers(2, 41), st.integers(0, 40), st.integers(1, 40), NOISE, st.sampled_from([1.6, 4.0, None]))
def test_one_slow_link_never_blames_a_node_with_certainty(
    count: int, one: int, apart: int, noise: list[float], by: float | None
) -> None:
    nodes = names(count)
    ends = nodes[one % count], nodes[(one + 1 + apart % (count - 1)) % count]
    for verdict in verdicts(nodes, of_link(*ends, by=by), noise):
        assert verdict.blame is Blame.LINK
        assert set(verdict.nodes) == set(ends)


@given(st.integers(2, 41), NOISE)
def test_healthy_nodes_are_not_blamed(count: int, noise: list[float]) -> None:
    assert verdicts(names(count), of_nodes(), noise) == []


@given(st.integers(2, 60), NOISE)
def test_each_round_measures_every_node_and_the_second_with_another(count: int, noise: list[float]) -> None:
    nodes = names(count)
    pairs1 = first_round(nodes)
    pairs2 = second_round(measured(pairs1, of_nodes(), noise))
    for pairs in (pairs1, pairs2):
        assert {node for pair in pairs for node in pair} == set(nodes)
        assert len(pairs) == (count + 1) // 2
        assert all(a != b for a, b in pairs)
    if count >= 4:
        assert not {frozenset(pair) for pair in pairs1} & {frozenset(pair) for pair in pairs2}


def test_two_slow_nodes_that_met_first_are_both_named() -> None:
    found = verdicts(names(8), of_nodes("node2", "node3"))
    assert [(v.nodes, v.is_certain) for v in found if v.blame is Blame.NODE] == [(("node2",), True), (("node3",), True)]


def test_a_slow_link_between_cleared_nodes_is_certain() -> None:
    (found,) = verdicts(names(8), of_link("node2", "node3"))
    assert (found.blame, found.nodes, found.is_certain) == (Blame.LINK, ("node2", "node3"), True)
    assert found.slowdown == pytest.approx(4.0)


def test_of_three_nodes_the_slow_one_is_named() -> None:
    for slow in names(3):
        assert [(v.nodes, v.is_certain) for v in verdicts(names(3), of_nodes(slow))] == [((slow,), True)]


def test_two_nodes_that_fail_to_meet_leave_open_which_it_is() -> None:
    (found,) = verdicts(names(2), of_nodes("node0", by=None))
    assert (found.blame, found.is_certain, found.slowdown) == (Blame.LINK, False, None)


def test_round_trips_alone_name_a_node() -> None:
    def results(pairs: Sequence[tuple[str, str]]) -> list[PairResult]:
        return [PairResult(a, b, 1e9, 5e-3 if "node4" in (a, b) else 1e-4) for a, b in pairs]

    round1 = results(first_round(names(6)))
    (found,) = judge_pairs(round1, results(second_round(round1)))
    assert (found.blame, found.nodes) == (Blame.NODE, ("node4",))


def test_round_trips_that_differ_by_little_are_no_fault() -> None:
    def results(pairs: Sequence[tuple[str, str]]) -> list[PairResult]:
        return [PairResult(a, b, 1e9, 9e-5 if "node4" in (a, b) else 3e-5) for a, b in pairs]

    round1 = results(first_round(names(6)))
    assert judge_pairs(round1, results(second_round(round1))) == []


def test_ten_thousand_nodes_are_paired_and_judged() -> None:
    found = verdicts(names(10_000), of_nodes("node77", "node9000"))
    assert [(v.blame, v.nodes) for v in found] == [(Blame.NODE, ("node77",)), (Blame.NODE, ("node9000",))]


@pytest.mark.parametrize("nodes", [[], ["node0"], ["node0", "node1", "node0"]])
def test_too_few_or_repeated_nodes_are_refused(nodes: list[str]) -> None:
    with pytest.raises(InvalidRequest):
        first_round(nodes)
