"""The graph of waits as data: what holds each wait, its edges, and what leads to a root."""

from __future__ import annotations

from ckptd.detect.records import Communicator, Count, Pending, RankState
from ckptd.detect.wait_graph import Edge, Wait, Why, in_order, wait_graph
from ckptd.format.timings import Op

GROUPS = {"a": Communicator("a", (0, 1, 2)), "b": Communicator("b", (2, 3))}


def rank(number: int, *pending: Pending, **counts: tuple[int, int]) -> RankState:
    return RankState(number, "", {name: Count(*count) for name, count in counts.items()}, pending)


def pend(name: str, seq: int = 5, for_s: float = 1.0) -> Pending:
    return Pending(name, seq, Op.ALL_REDUCE, 8, for_s=for_s)


def graph_of(*states: RankState, **stopped: set[int]) -> tuple[Wait, ...]:
    return wait_graph({state.rank: state for state in states}, GROUPS, **stopped).waits


CHAIN = (
    rank(0, pend("a"), a=(5, 4)),
    rank(1, pend("a"), a=(5, 4)),
    rank(2, pend("b"), a=(4, 4), b=(5, 4)),
    rank(3, b=(4, 4)),
)


def test_a_wait_is_one_row_for_all_that_wait_in_it() -> None:
    assert graph_of(*CHAIN) == (
        Wait("a", 5, Op.ALL_REDUCE, Why.MISSING, (0, 1), (2,)),
        Wait("b", 5, Op.ALL_REDUCE, Why.MISSING, (2,), (3,)),
    )


def test_edges_lead_from_victims_to_blockers() -> None:
    graph = wait_graph({state.rank: state for state in CHAIN}, GROUPS)
    assert list(graph.edges()) == [
        Edge(0, 2, "a", 5, Op.ALL_REDUCE),
        Edge(1, 2, "a", 5, Op.ALL_REDUCE),
        Edge(2, 3, "b", 5, Op.ALL_REDUCE),
    ]


def test_all_that_wait_through_others_reach_the_root_and_the_nearest_wait_comes_first() -> None:
    graph = wait_graph({state.rank: state for state in CHAIN}, GROUPS)
    origin, path = graph.reach([3])
    assert origin == {0: 3, 1: 3, 2: 3, 3: 3}
    assert [wait.communicator for wait in path] == ["b", "a"]
    assert graph.reach([0]) == ({0: 0}, [])


def test_who_shares_a_closed_operation_with_a_victim_is_not_explained_by_it() -> None:
    older, newer = pend("b", for_s=2.0), pend("a", for_s=1.0)
    states = (rank(2, older, newer, b=(5, 4), a=(5, 4)), rank(3, older, b=(5, 4)), rank(0, a=(4, 4)), rank(1, a=(4, 4)))
    graph = wait_graph({state.rank: state for state in states}, GROUPS)
    assert set(graph.reach([0])[0]) == {0, 2}
    assert set(graph.reach([3])[0]) == {2, 3}


def test_a_member_held_by_something_older_holds_the_others() -> None:
    held = rank(2, pend("a", for_s=1.0), pend("b", for_s=2.0), a=(5, 4), b=(5, 4))
    waits = graph_of(*CHAIN[:2], held, rank(3, b=(4, 4)))
    assert waits[0] == Wait("a", 5, Op.ALL_REDUCE, Why.HELD, (0, 1, 2), (2,))


def test_what_pends_longest_is_the_oldest_and_ties_keep_the_order_given() -> None:
    first, second, third = pend("a", 1, 2.0), pend("b", 1, 2.0), pend("a", 2, 3.0)
    assert in_order(rank(2, first, second, third)) == [third, first, second]


def test_a_collective_that_ended_for_a_member_is_passed() -> None:
    waits = graph_of(rank(0, pend("a"), a=(5, 4)), rank(1, a=(5, 5)), rank(2, a=(5, 5)))
    assert waits == (Wait("a", 5, Op.ALL_REDUCE, Why.PASSED, (0,)),)


def test_a_later_operation_that_ended_first_does_not_count_as_an_earlier_one() -> None:
    out_of_order = rank(1, pend("a"), a=(6, 5))  # 6 ended, 5 did not
    waits = graph_of(rank(0, pend("a"), a=(6, 4)), out_of_order, rank(2, pend("a"), a=(6, 4)))
    assert [wait.why for wait in waits] == [Why.CLOSED]


def test_gone_ranks_hold_every_wait_and_wait_in_none() -> None:
    states = (rank(0, pend("a"), a=(5, 4)), rank(1, pend("a"), a=(5, 4)), rank(2, pend("a"), a=(5, 4)))
    assert graph_of(*states, gone={2}) == (Wait("a", 5, Op.ALL_REDUCE, Why.MISSING, (0, 1), (2,)),)


def test_a_silent_rank_does_not_hold_what_it_had_finished_when_last_heard() -> None:
    states = (rank(0, pend("a"), a=(5, 4)), rank(1, a=(5, 5)), rank(2, a=(5, 5)))
    assert [wait.why for wait in graph_of(*states, silent={2})] == [Why.PASSED]
    assert [wait.why for wait in graph_of(*states, gone={2})] == [Why.MISSING]


def test_ten_thousand_ranks_in_one_operation_are_one_wait() -> None:
    world = {"w": Communicator("w", tuple(range(10_240)))}
    states = {r: rank(r, pend("w"), w=(5, 4)) for r in range(10_239)} | {10_239: rank(10_239, w=(4, 4))}
    (wait,) = wait_graph(states, world).waits
    assert (len(wait.waiting), wait.blockers) == (10_239, (10_239,))
