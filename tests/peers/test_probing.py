"""Probes: the rounds over nodes that are made up, what a finding verifies, and the bounds of what is sent."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.detect.faultlog import Family, FaultLog
from ckptd.detect.pairing import Blame
from ckptd.detect.records import Confidence, Fault, Kind
from ckptd.errors import InvalidRequest
from ckptd.peers.probing import MOST_BYTES, echo
from ckptd.serve.diagnosis.node_speed import MOST_S, NodeSpeed, measure_speed
from ckptd.serve.diagnosis.probing import Measured, Outcome, Probe
from ckptd.serve.diagnosis.slow_cores import judge_speeds
from ckptd.serve.diagnosis.verifying import ProbeFinding, finding_from_pb, finding_to_pb, verified_by
from ckptd_api.v1 import coordinator_pb2

NETWORK = frozenset({Kind.SLOW_LINK, Kind.SLOW_COMM})
USUAL = NodeSpeed(0.004, 0.001)


class Nodes:
    """Nodes that are measured: ``slow`` ones and links are ten times slower, to ``dead`` ones there is no way.
    ``hiccups`` are slow when they are first measured. Watches that no node is in two measurements at once."""

    def __init__(
        self,
        count: int,
        slow: frozenset[str] = frozenset(),
        dead: frozenset[str] = frozenset(),
        hiccups: frozenset[str] = frozenset(),
    ) -> None:
        self.names = [f"n{number:02}" for number in range(count)]
        self.slow, self.dead, self.hiccups = slow, dead, hiccups
        self.looks: Counter[str] = Counter()
        self.clashes: list[tuple[str, str]] = []
        self._busy: Counter[str] = Counter()
        self._lock = threading.Lock()

    def pair(self, a: str, b: str) -> Measured:
        with self._lock:
            self._busy.update((a, b))
            self.clashes += [(a, b)] if max(self._busy[a], self._busy[b]) > 1 else []
            self.looks.update((a, b))
        try:
            return self._measured(a, b)
        finally:
            with self._lock:
                self._busy.subtract((a, b))

    def _measured(self, a: str, b: str) -> Measured:
        ends = {a, b}
        if ends & self.dead:
            return Measured(a, b, problem="no daemon answers")
        is_first = any(end in self.hiccups and self.looks[end] == 1 for end in ends)
        factor = 10.0 if ends & self.slow or is_first else 1.0
        return Measured(a, b, 1e9, 1e9 / factor, 5e-4 * factor)

    def speed(self, node: str) -> NodeSpeed | str:
        with self._lock:
            self.looks[node] += 1
            if node in self.dead:
                return "no daemon answers"
            is_slow = node in self.slow or (node in self.hiccups and self.looks[node] == 1)
        return NodeSpeed(USUAL.product_s * (2.0 if is_slow else 1.0), USUAL.copy_s)

    def probed(self, *, has_compute: bool = False, now_s: Callable[[], float] = lambda: 0.0) -> Outcome:
        probe = Probe(self.names, self.pair, self.speed, until_s=60.0, now_s=now_s)
        self.phases = list(probe.run(has_compute=has_compute))
        return probe.outcome


# --- the rounds ---------------------------------------------------------------------------------------------------
@settings(max_examples=40)
@given(st.integers(4, 17), st.integers(0, 16), st.booleans())
def test_a_slow_or_dead_node_is_named_and_no_other_whatever_the_count(count: int, which: int, is_dead: bool) -> None:
    guilty = frozenset({f"n{which % count:02}"})
    nodes = Nodes(count, dead=guilty) if is_dead else Nodes(count, slow=guilty)
    (verdict,) = nodes.probed().verdicts
    assert (verdict.blame, frozenset(verdict.nodes), verdict.is_certain) == (Blame.NODE, guilty, True)
    assert (verdict.slowdown is None) == is_dead


@settings(max_examples=40)
@given(st.integers(2, 17))
def test_no_node_is_in_two_measurements_at_once_and_each_is_measured_in_both_rounds(count: int) -> None:
    nodes = Nodes(count)
    assert nodes.probed().verdicts == []
    assert nodes.clashes == []
    assert min(nodes.looks[node] for node in nodes.names) >= 2


def test_what_was_slow_only_once_is_not_blamed() -> None:
    nodes = Nodes(6, hiccups=frozenset({"n03"}))
    outcome = nodes.probed()
    assert outcome.verdicts == []
    assert any("again" in phase for phase in nodes.phases)
    assert all(pair.to_b == 1e9 for pair in outcome.pairs)
    cores = Nodes(6, hiccups=frozenset({"n03"}))
    assert cores.probed(has_compute=True).slow_nodes == []


def test_what_stays_slow_is_measured_no_more_than_twice_again() -> None:
    nodes = Nodes(6, slow=frozenset({"n01"}), dead=frozenset({"n04"}))
    nodes.probed()
    assert nodes.looks["n01"] == 2 + 2 * 2
    assert nodes.looks["n04"] == 2 + 2  # what failed takes long: once


def test_slow_cores_are_named_and_a_node_that_does_not_answer_is_none_of_them() -> None:
    outcome = Nodes(5, slow=frozenset({"n01"}), dead=frozenset({"n04"})).probed(has_compute=True)
    assert [(slow.node, slow.slowdown) for slow in outcome.slow_nodes] == [("n01", pytest.approx(2.0))]
    assert outcome.speeds["n04"] == "no daemon answers"


def test_nothing_begins_after_the_end_and_what_was_left_out_is_counted() -> None:
    late = iter([0.0, 0.0, 100.0])
    outcome = Nodes(4).probed(now_s=lambda: next(late, 100.0))
    assert len(outcome.pairs) == 2
    assert outcome.not_measured == 2
    none = Nodes(4)
    outcome = none.probed(has_compute=True, now_s=lambda: 100.0)
    assert (outcome.pairs, outcome.speeds, outcome.verdicts) == ([], {}, [])
    assert not none.looks


def test_a_probe_of_one_node_or_of_one_twice_is_refused() -> None:
    for names in (["n00"], ["n00", "n00"]):
        nodes = Nodes(1)
        nodes.names = names
        with pytest.raises(InvalidRequest, match="to pair"):
            nodes.probed()


# --- one pair -----------------------------------------------------------------------------------------------------
def test_a_pair_is_as_fast_as_its_slower_way() -> None:
    assert Measured("a", "b", 2e9, 1e9, 0.005).result.bytes_per_s == 1e9
    assert Measured("a", "b", None, 1e9, 0.005).result.bytes_per_s == 1e9
    assert Measured("a", "b", 2e9, 1e9, 0.005, problem="b does not reach a").result.bytes_per_s is None


def test_round_trips_that_are_those_of_a_call_are_all_alike() -> None:
    assert (
        Measured("a", "b", 1e9, 1e9, 2e-4).result.round_trip_s == Measured("a", "b", 1e9, 1e9, 8e-4).result.round_trip_s
    )
    assert Measured("a", "b", 1e9, 1e9, 0.05).result.round_trip_s == 0.05


def test_of_two_times_the_better_figures_count_and_a_failure_does_not() -> None:
    once, again = Measured("a", "b", 1e9, 3e9, 0.002), Measured("a", "b", 2e9, 1e9, 0.001)
    assert once.or_better(again) == Measured("a", "b", 2e9, 3e9, 0.001)
    failed = Measured("a", "b", problem="away")
    assert failed.or_better(once) == once == once.or_better(failed)
    assert failed.or_better(failed).problem


# --- cores --------------------------------------------------------------------------------------------------------
def test_a_copy_that_is_slow_makes_a_node_slow_too() -> None:
    speeds = {"a": USUAL, "b": USUAL, "c": NodeSpeed(USUAL.product_s, 1.5 * USUAL.copy_s)}
    assert [(slow.node, slow.slowdown) for slow in judge_speeds(speeds)] == [("c", pytest.approx(1.5))]


def test_of_two_nodes_the_slower_is_held_against_the_faster() -> None:
    assert [slow.node for slow in judge_speeds({"a": NodeSpeed(0.008, 0.001), "b": USUAL})] == ["a"]
    assert judge_speeds({"a": USUAL}) == judge_speeds({}) == []


def test_the_speed_of_this_node_is_measured() -> None:
    speed = measure_speed()
    assert 0 < speed.product_s < MOST_S
    assert 0 < speed.copy_s < MOST_S


# --- bytes --------------------------------------------------------------------------------------------------------
@given(st.integers(0, 2 << 20))
@settings(max_examples=30)
def test_as_many_bytes_are_echoed_as_were_asked_for(size_bytes: int) -> None:
    assert sum(len(part.payload) for part in echo(size_bytes)) == size_bytes


def test_more_bytes_than_a_burst_are_refused_before_one_is_sent() -> None:
    with pytest.raises(InvalidRequest, match="at most"):
        next(echo((2 << 20) + 1))


def test_a_measurement_moves_at_most_what_operations_says() -> None:
    assert MOST_BYTES == 9 << 20


# --- what a finding verifies --------------------------------------------------------------------------------------
NODE_OF_RANK = ("a", "a", "b", "b", "c", "d")


def finding(*nodes: str, kinds: frozenset[Kind] = NETWORK) -> ProbeFinding:
    return ProbeFinding(kinds, nodes, {"slowdown": 2.5})


def of_cores(node: str) -> ProbeFinding:
    return finding(node, kinds=frozenset({Kind.SLOW_COMPUTE}))


@pytest.mark.parametrize(
    ("fault", "found", "ranks"),
    [
        (Fault(Kind.SLOW_COMM, (2, 3), ("b",)), finding("b"), (2, 3)),
        (Fault(Kind.SLOW_LINK, (1, 2), ("a", "b")), finding("a", "b"), (1, 2)),
        (Fault(Kind.SLOW_LINK, (), ("a", "b")), finding("b"), ()),
        (Fault(Kind.SLOW_COMM, (0, 2, 4, 5)), finding("b"), (2,)),
        (Fault(Kind.SLOW_COMPUTE, (2, 3), ("b",)), of_cores("b"), (2, 3)),
        (Fault(Kind.SLOW_COMPUTE, (4,)), of_cores("c"), (4,)),
    ],
)
def test_a_fault_that_agrees_is_verified_at_what_was_found(
    fault: Fault, found: ProbeFinding, ranks: tuple[int, ...]
) -> None:
    log = FaultLog()
    family = Family.COMPUTE if fault.kind is Kind.SLOW_COMPUTE else Family.COMMUNICATION
    log.update(family, [fault], 1.0)
    verified = verified_by(fault, found, NODE_OF_RANK)
    assert verified is not None
    assert log.verify(verified)
    (logged,) = log.open
    assert (logged.fault.nodes, logged.fault.ranks) == (found.nodes, ranks)
    assert logged.fault.confidence is Confidence.VERIFIED
    assert logged.fault.evidence["probe"] == {"slowdown": 2.5}


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (Fault(Kind.SLOW_COMM, (2, 3), ("b",)), finding("c")),
        (Fault(Kind.SLOW_COMM, (2, 3), ("b",)), finding("b", "c")),
        (Fault(Kind.SLOW_COMM, ()), finding("b")),
        (Fault(Kind.SLOW_COMM, (2, 3), ("b",)), of_cores("b")),
        (Fault(Kind.SLOW_COMPUTE, (2, 3), ("b",)), finding("b")),
        (Fault(Kind.SLOW_COMPUTE, (2,)), of_cores("b")),  # one device of two: not what a core can show
        (Fault(Kind.HANG, (2,), ("b",)), finding("b")),
    ],
)
def test_a_fault_elsewhere_or_of_another_kind_is_not_verified(fault: Fault, found: ProbeFinding) -> None:
    assert verified_by(fault, found, NODE_OF_RANK) is None


def test_findings_survive_the_wire() -> None:
    found = finding("a", "b")
    message = finding_to_pb(found)
    message.kinds.append("of a later version")
    assert finding_from_pb(message) == found


@pytest.mark.parametrize("evidence", ["{", "[]", "7"])
def test_evidence_that_is_no_object_is_refused(evidence: str) -> None:
    with pytest.raises(InvalidRequest, match="evidence"):
        finding_from_pb(coordinator_pb2.ProbeFinding(kinds=["slow_link"], nodes=["a"], evidence=evidence))
