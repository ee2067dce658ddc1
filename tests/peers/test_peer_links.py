"""Figures of TCP by peer address become links between nodes, and answers with one sample a node at most."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.detect.kernel_links import PeerLink
from ckptd.detect.records import Confidence, Kind
from ckptd.model import Incarnation, Roster, RosterEntry
from ckptd.serve.diagnosis.analyst import Analyst
from ckptd.serve.diagnosis.feeds import NodeFeed
from ckptd.serve.diagnosis.peer_links import Answers, links_of, nodes_by_address, sample_of
from ckptd_api.v1 import coordinator_pb2 as pb

A, B, C = "10.0.0.1", "10.0.0.2", "10.0.0.3"


def roster(*addresses: str) -> Roster:
    entries = tuple(RosterEntry(rank, f"n{rank}", address, 1) for rank, address in enumerate(addresses))
    return Roster(version=1, incarnation_id=1, block_bytes=1, entries=entries)


def figures(address: str, share: float | None, rtt_s: float = 1e-3, delivery_bytes_s: float = 1e9) -> dict[str, float]:
    told = {f"tcp_peer_rtt_s{{{address}}}": rtt_s, f"tcp_peer_delivery_bytes_s{{{address}}}": delivery_bytes_s}
    return told if share is None else told | {f"tcp_peer_retransmit_share{{{address}}}": share}


def link(src: str, dst: str) -> PeerLink:
    return PeerLink(src, dst, rtt_s=1e-3)


def test_a_node_tells_of_peers_that_it_sends_much_to() -> None:
    sample = sample_of(figures(A, 0.01) | figures(B, None) | {"cpu_steal_share": 0.1})
    assert sample.peers == [
        pb.PeerFigures(address=A, rtt_seconds=1e-3, retransmit_share=0.01, delivery_bytes_per_second=1e9)
    ]


def test_a_figure_that_is_absent_is_not_known() -> None:
    sample = sample_of({f"tcp_peer_retransmit_share{{{B}}}": 0.0})
    (found,) = links_of("n0", sample, {B: "n1"})
    assert found == PeerLink("n0", "n1", rtt_s=None, retransmit_share=0.0, delivery_bytes_per_s=None)


def test_addresses_are_nodes_by_the_host_that_they_advertise() -> None:
    nodes = nodes_by_address(roster(f"{A}:7070", f"{B}:7071", "[fd00::5]:7070"))
    assert nodes == {A: "n0", B: "n1", "fd00::5": "n2"}


@pytest.mark.parametrize("address", ["node3:7070", "unix:///run/ckptd.sock", ""])
def test_an_advertised_name_or_socket_is_no_address(address: str) -> None:
    assert nodes_by_address(roster(f"{A}:7070", address)) == {A: "n0"}


def test_a_host_with_two_daemons_is_left_out() -> None:
    assert nodes_by_address(roster(f"{A}:7070", f"{B}:7070", f"{B}:7071")) == {A: "n0"}


def test_unknown_addresses_and_the_nodes_own_are_left_out() -> None:
    sample = sample_of(figures(A, 0.0) | figures(B, 0.0) | figures(C, 0.0))
    found = links_of("n0", sample, nodes_by_address(roster(f"{A}:7070", f"{B}:7070")))
    assert [(one.src, one.dst) for one in found] == [("n0", "n1")]


def test_an_answer_is_there_when_all_nodes_of_the_last_one_have_told_anew_and_is_given_once() -> None:
    answers = Answers()
    for node in ("a", "b"):
        answers.take(node, [link(node, "c")])
        assert answers.newest() is None  # nobody knows yet how many there are
    answers.take("a", [link("a", "c")])
    assert answers.newest() == [link("a", "c"), link("b", "c")]
    assert answers.newest() is None
    answers.take("b", [])
    assert answers.newest() == [link("a", "c")]


def test_a_node_that_is_gone_is_waited_for_once() -> None:
    answers = Answers()
    for node in ("a", "b", "c", "a", "b", "c"):
        answers.take(node, [link(node, "z")])
    answers.newest()
    for node in ("a", "b", "a"):
        assert answers.newest() is None
        answers.take(node, [link(node, "z")])
    assert answers.newest() == [link("a", "z"), link("b", "z")]
    answers.take("b", [link("b", "z")])
    assert answers.newest() == [link("a", "z"), link("b", "z")]


@given(st.lists(st.sampled_from("abcd"), max_size=40))
def test_no_answer_has_two_samples_of_a_node_and_none_is_told_twice(order: list[str]) -> None:
    answers, told = Answers(), []
    for number, node in enumerate(order):
        answers.take(node, [PeerLink(node, "z", rtt_s=number + 1.0)])
        answer = answers.newest() or []
        assert len({one.src for one in answer}) == len(answer)
        told += [one.rtt_s for one in answer]
    assert len(set(told)) == len(told)


def test_a_sample_is_told_once_to_each_analyst() -> None:
    feed = NodeFeed(2)
    assert [feed.is_new_sample(at_s) for at_s in (5.0, 5.0, 10.0, 10.0)] == [True, False, True, False]
    feed.begin("another")
    assert feed.is_new_sample(10.0)


def test_nodes_that_go_on_telling_of_a_slow_link_have_it_suspected() -> None:
    hosts = [f"10.0.0.{at}" for at in range(1, 5)]
    analyst = Analyst("run", Incarnation(1, 1), roster(*(f"{host}:7070" for host in hosts)), lambda _analyst: None)

    def report(at: int, slow: set[int]) -> None:
        told = {}
        for other, host in enumerate(hosts):
            if other != at:
                told |= figures(host, 0.0, delivery_bytes_s=2.5e8 if {at, other} == slow else 1e9)
        request = pb.ReportRanksRequest(run="run", node_id=f"n{at}", peers=sample_of(told))
        analyst.take(request, now_s=0.0)

    for round_s in range(8):
        for at in range(4):
            report(at, {1, 3})
        analyst.tick(float(round_s))
    (logged,) = analyst.faults(has_resolved=False)
    fault = logged.fault
    assert (fault.kind, fault.nodes, fault.confidence) == (Kind.SLOW_LINK, ("n1", "n3"), Confidence.SUSPECT)
