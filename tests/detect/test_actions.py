"""What may be done about a fault: the limits hold for any past."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from ckptd.detect.actions import EVERY_S, SHARE, calls_for_action, nodes_of, refusal
from ckptd.detect.records import Confidence, Fault, Kind
from ckptd.model import Action


def test_a_node_without_a_past_may_be_acted_on() -> None:
    assert refusal((), ["n1"], 6, 1e9) == ""


def test_within_an_hour_a_second_node_is_refused_and_after_it_the_share_of_nodes_counts() -> None:
    past = [Action("n1", 1000.0, "slow_compute")]
    assert "at most one node is acted on" in refusal(past, ["n2"], 1000, 1000.0 + EVERY_S - 1)
    assert refusal(past, ["n2"], 1000, 1000.0 + EVERY_S) == ""
    assert "the most there may be" in refusal(past, ["n2"], 99, 1000.0 + EVERY_S)


def test_the_same_node_is_acted_on_once() -> None:
    assert "before" in refusal([Action("n1", 0.0, "death")], ["n1"], 1000, 1e9)


def test_a_fault_on_several_nodes_or_on_none_is_for_a_person() -> None:
    assert refusal((), ["n1", "n2"], 1000, 1e9)
    assert refusal((), [], 1000, 1e9)


def test_a_desync_never_calls_for_action() -> None:
    assert not calls_for_action(Fault(Kind.DESYNC, (1,), ("n1",), Confidence.VERIFIED), Confidence.SUSPECT)


def test_less_confidence_than_asked_for_does_not_call_for_action() -> None:
    fault = Fault(Kind.SLOW_COMPUTE, (1,), (), Confidence.CONFIRMED)
    assert not calls_for_action(fault, Confidence.VERIFIED)
    assert calls_for_action(fault, Confidence.CONFIRMED)


def test_the_nodes_of_a_fault_are_those_of_its_ranks_when_it_names_none() -> None:
    assert nodes_of(Fault(Kind.HANG, (0, 3)), ["a", "a", "b", "b"]) == ("a", "b")
    assert nodes_of(Fault(Kind.HANG, (0,), ("c",)), ["a"]) == ("c",)


@given(st.lists(st.tuples(st.integers(0, 400), st.floats(0, 1e6))), st.integers(1, 400))
def test_whatever_is_asked_for_the_limits_hold(wishes: list[tuple[int, float]], node_count: int) -> None:
    done: list[Action] = []
    for node, at_s in sorted(wishes, key=lambda wish: wish[1]):
        if not refusal(done, [f"n{node}"], node_count, at_s):
            done.append(Action(f"n{node}", at_s, "slow_compute"))
    assert len(done) == len({action.node_id for action in done}) <= max(1, int(SHARE * node_count))
    assert all(b.at_s - a.at_s >= EVERY_S for a, b in itertools.pairwise(done))
