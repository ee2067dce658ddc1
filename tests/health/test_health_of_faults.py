"""What the health of nodes does to a fault: who is confirmed, who is doubted, and what it never does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ckptd.detect.health import UNWELL, Health, adjust
from ckptd.detect.records import Confidence, Fault, Kind

WELL = Health(is_learned=True)
STOLEN = Health(0.9, ("cpu steal 38 %",), {"cpu_steal_share": 1.0, "cpu_pressure_share": 0.9}, True)
LOSSY = Health(1.0, ("TCP segments sent again 2 %",), {"tcp_retransmit_share": 1.0, "tcp_peer_rtt_s": 1.0}, True)
FALLEN = Health(1.0, ("Xid 79 on GPU 0000:3b:00",), {"gpu_xid": 1.0})


def fault(kind: Kind, confidence: Confidence, *nodes: str) -> Fault:
    return Fault(kind, ranks=(3,), nodes=nodes, confidence=confidence, evidence={"summary": "rank 3 is slow"})


def test_a_suspect_on_a_node_that_is_unwell_is_confirmed_and_the_signs_are_told() -> None:
    raised = adjust(fault(Kind.SLOW_COMPUTE, Confidence.SUSPECT, "b"), {"a": WELL, "b": STOLEN, "c": WELL}, ())
    assert raised.confidence is Confidence.CONFIRMED
    assert raised.evidence == {"summary": "rank 3 is slow", "health": {"b": ["cpu steal 38 %"]}}


def test_a_hard_sign_confirms_although_nothing_is_learned_yet() -> None:
    raised = adjust(fault(Kind.HANG, Confidence.SUSPECT, "b"), {"b": FALLEN}, ())
    assert raised.confidence is Confidence.CONFIRMED


def test_signs_of_what_the_kind_does_not_depend_on_say_nothing() -> None:
    given = fault(Kind.SLOW_COMPUTE, Confidence.SUSPECT, "b")
    assert adjust(given, {"b": LOSSY}, ()) is given
    assert adjust(fault(Kind.SLOW_LINK, Confidence.SUSPECT, "b"), {"b": LOSSY}, ()).confidence is Confidence.CONFIRMED


def test_nobody_is_confirmed_for_what_half_of_the_others_have_too() -> None:
    given = fault(Kind.SLOW_COMM, Confidence.SUSPECT, "b")
    assert adjust(given, {"a": LOSSY, "b": LOSSY, "c": LOSSY, "d": WELL}, ()) is given
    raised = adjust(given, {"a": LOSSY, "b": LOSSY, "c": WELL, "d": WELL}, ())
    assert raised.confidence is Confidence.CONFIRMED


def test_of_two_nodes_named_both_must_be_unwell() -> None:
    given = fault(Kind.SLOW_LINK, Confidence.SUSPECT, "a", "b")
    assert adjust(given, {"a": WELL, "b": LOSSY}, ()) is given
    assert adjust(given, {"a": LOSSY, "b": LOSSY}, ()).confidence is Confidence.CONFIRMED


def test_a_slow_link_of_a_well_node_is_doubted_when_another_member_is_unwell() -> None:
    given = fault(Kind.SLOW_LINK, Confidence.CONFIRMED, "a")
    health = {"a": WELL, "b": LOSSY, "c": WELL, "d": WELL}
    lowered = adjust(given, health, {"a", "b", "c"})
    assert lowered.confidence is Confidence.SUSPECT
    assert lowered.evidence["health"] == {"b": ["TCP segments sent again 2 %"]}
    # One that had no part in it is no other explanation, and what is not known to be well is not doubted.
    assert adjust(given, health, {"a", "c"}) is given
    assert adjust(given, {"b": LOSSY, "c": WELL, "d": WELL}, {"a", "b", "c"}) is given
    assert adjust(given, health | {"a": Health()}, {"a", "b", "c"}) is given


def test_what_was_measured_on_the_node_itself_is_not_lowered_by_the_health_of_another() -> None:
    for kind in (Kind.SLOW_COMPUTE, Kind.HANG, Kind.DEATH, Kind.COMM_HANG):
        given = fault(kind, Confidence.CONFIRMED, "a")
        assert adjust(given, {"a": WELL, "b": FALLEN, "c": WELL, "d": WELL}, {"b"}) is given


health_of_a_node = st.sampled_from([WELL, STOLEN, LOSSY, FALLEN, Health()])


@given(
    kind=st.sampled_from(list(Kind)),
    confidence=st.sampled_from(list(Confidence)),
    nodes=st.sets(st.sampled_from("abcd")).map(sorted),
    health=st.dictionaries(st.sampled_from("abcdef"), health_of_a_node),
    others=st.sets(st.sampled_from("abcdef")),
)
def test_health_never_verifies_nor_moves_what_is_verified_and_names_nobody_else(
    kind: Kind, confidence: Confidence, nodes: list[str], health: dict[str, Health], others: set[str]
) -> None:
    given_fault = fault(kind, confidence, *nodes)
    result = adjust(given_fault, health, others)
    assert (result.confidence is Confidence.VERIFIED) == (confidence is Confidence.VERIFIED)
    assert (result.kind, result.ranks, result.nodes) == (kind, given_fault.ranks, given_fault.nodes)
    if kind is Kind.DESYNC or confidence is Confidence.VERIFIED or not nodes:
        assert result is given_fault
    if (result.confidence, confidence) == (Confidence.CONFIRMED, Confidence.SUSPECT):
        assert all(health[node].score >= UNWELL for node in nodes)
