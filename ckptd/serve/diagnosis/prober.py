"""Probes on one daemon: those that it drives for an operator, and what it measures when another daemon drives one.

One probe at a time is driven here. A node that does not answer the daemon that drives is not asked again; the way to it
is still measured by others, so that it is known whether it is gone or only cannot be reached from here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from ckptd.detect.pairing import PairVerdict
from ckptd.detect.records import Kind
from ckptd.errors import CkptdError, DaemonUnreachable, InvalidRequest
from ckptd.model import Incarnation
from ckptd.peers.channels import Peer
from ckptd.peers.probing import measure_way
from ckptd.serve.diagnosis.node_speed import MOST_S, NodeSpeed, measure_speed
from ckptd.serve.diagnosis.probing import TOTAL_S, Measured, Outcome, Probe
from ckptd.serve.diagnosis.slow_cores import NodeVerdict
from ckptd.serve.diagnosis.verifying import ProbeFinding, finding_to_pb
from ckptd.serve.node_run import NodeRun
from ckptd_api.convert import incarnation_to_pb
from ckptd_api.v1 import operator_pb2, peers_pb2

if TYPE_CHECKING:
    from ckptd.serve.node import Node

WAY_S: Final = 2.0
_GRACE_S: Final = 1.0
_SHOWN: Final = 8
_OF_THE_NETWORK: Final = frozenset({Kind.SLOW_LINK, Kind.SLOW_COMM})
_OF_THE_NODE: Final = frozenset({Kind.SLOW_COMPUTE})


class Prober:
    """See the module. Safe to call from any thread."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._driving = threading.Lock()

    # --- asked by another daemon ---------------------------------------------------------------------------------
    def measure_link(self, run: str, incarnation: Incarnation, node_id: str) -> peers_pb2.MeasureLinkResponse:
        """From ``node_id`` to this node. InvalidRequest when it is not in the roster of the run."""
        known = self._node.find_run(run, incarnation)
        if known is None:
            raise DaemonUnreachable(f"run {run} was not joined with this instance of the daemon")
        entry = known.roster.nodes.get(node_id)
        if entry is None or node_id == self._node.node_id:
            raise InvalidRequest(f"node {node_id} is no other node of run {run}")
        try:
            way = measure_way(self._node.peering.channels, entry.address, WAY_S)
        except CkptdError as error:
            return peers_pb2.MeasureLinkResponse(problem=error.message)
        return peers_pb2.MeasureLinkResponse(bytes_per_second=way.bytes_per_s, round_trip_seconds=way.round_trip_s)

    # --- asked by an operator ------------------------------------------------------------------------------------
    def probe(self, run: str, nodes: Sequence[str], *, has_compute: bool) -> Iterator[operator_pb2.ProbeResponse]:
        """What begins, then the result. InvalidRequest when there is nothing to compare."""
        known = self._newest(run)
        wanted = _wanted(known, nodes)
        with self._driving:
            driven = _Driven(self._node, known, self.measure_link)
            probe = Probe(wanted, driven.measure_pair, driven.measure_node, time.monotonic() + TOTAL_S)
            for phase in probe.run(has_compute=has_compute):
                yield operator_pb2.ProbeResponse(phase=phase)
            result = _result(wanted, probe.outcome)
            self._tell_analyst(known, probe.outcome, result)
        yield operator_pb2.ProbeResponse(result=result)

    def _newest(self, run: str) -> NodeRun:
        found = [known for known in self._node.node_runs() if known.run == run]
        if not found:
            raise InvalidRequest(f"no rank of run {run} is on this node", "ask the daemon of a node of the run")
        return max(found, key=lambda known: known.incarnation)

    def _tell_analyst(self, run: NodeRun, outcome: Outcome, result: operator_pb2.ProbeResult) -> None:
        findings = [finding_to_pb(finding) for finding in _findings(outcome)]
        if not findings:
            return
        try:
            result.verified.extend(self._node.diagnosis.tell_findings(run, findings))
        except CkptdError as error:
            result.notes.append(f"the analyst of the run could not be told: {error.message}")


class _Driven:
    """The measurements of one probe, each made by the daemon that it is about."""

    def __init__(
        self,
        node: Node,
        run: NodeRun,
        measure_here: Callable[[str, Incarnation, str], peers_pb2.MeasureLinkResponse],
    ) -> None:
        self._node = node
        self._run = run
        self._measure_here = measure_here
        self._mute: dict[str, str] = {}

    def measure_pair(self, a: str, b: str) -> Measured:
        """One way after the other: both at once would share processors and memory."""
        ways = [self._way(a, b), self._way(b, a)]
        answered = [way for way in ways if way is not None]
        problem = next((way.problem for way in answered if way.problem), "")
        if not answered:
            problem = f"neither answers: {self._mute[a]}"
        if problem:
            return Measured(a, b, problem=problem)
        to_a, to_b = (way.bytes_per_second if way is not None else None for way in ways)
        return Measured(a, b, to_a, to_b, max(way.round_trip_seconds for way in answered))

    def measure_node(self, node_id: str) -> NodeSpeed | str:
        """A text when it could not be measured."""
        if node_id == self._node.node_id:
            return measure_speed()
        request = peers_pb2.MeasureComputeRequest(run=self._run.run)
        answer = self._ask(node_id, lambda peer: peer.peers.MeasureCompute, request, MOST_S)
        if answer is None:
            return self._mute[node_id]
        return NodeSpeed(answer.product_seconds, answer.copy_seconds)

    def _way(self, reader: str, source: str) -> peers_pb2.MeasureLinkResponse | None:
        """From ``source`` to ``reader``; None when the reader does not answer."""
        run = self._run
        if reader == self._node.node_id:
            return self._measure_here(run.run, run.incarnation, source)
        request = peers_pb2.MeasureLinkRequest(
            run=run.run, incarnation=incarnation_to_pb(run.incarnation), node_id=source
        )
        answer: peers_pb2.MeasureLinkResponse | None = self._ask(
            reader, lambda peer: peer.peers.MeasureLink, request, WAY_S
        )
        return answer

    def _ask(self, node_id: str, method: Callable[[Peer], Any], request: Any, takes_s: float) -> Any:
        if node_id in self._mute:
            return None
        channels, address = self._node.peering.channels, self._run.roster.nodes[node_id].address
        for is_last in (False, True):
            peer = channels.peer(address)
            asked_s = time.monotonic()
            try:
                return peer.call(method(peer), request, takes_s + _GRACE_S)
            except CkptdError as error:
                # What failed at once may only be a connection that failed before.
                if is_last or not error.is_retryable or time.monotonic() - asked_s > _GRACE_S:
                    self._mute[node_id] = error.message
                    return None
                channels.renew(address)
        return None


def _wanted(run: NodeRun, nodes: Sequence[str]) -> tuple[str, ...]:
    known = tuple(run.roster.nodes)
    if len(known) < 2:
        raise InvalidRequest(f"run {run.run} is on one node: there is no pair to measure")
    if strangers := sorted(set(nodes) - set(known)):
        shown = ", ".join(known[:_SHOWN]) + (", ..." if len(known) > _SHOWN else "")
        raise InvalidRequest(f"node {strangers[0]} is not in run {run.run}", f"its nodes: {shown}")
    return tuple(nodes) or known


# --- what is told -------------------------------------------------------------------------------------------------
def _findings(outcome: Outcome) -> list[ProbeFinding]:
    """What is slow beyond doubt. A daemon that does not answer says nothing of the network."""
    measured = {(pair.a, pair.b): pair for pair in outcome.pairs}
    links = [
        ProbeFinding(_OF_THE_NETWORK, tuple(sorted(verdict.nodes)), _link_evidence(verdict, measured))
        for verdict in outcome.verdicts
        if verdict.is_certain and verdict.slowdown is not None
    ]
    return links + [
        ProbeFinding(_OF_THE_NODE, (slow.node,), _core_evidence(slow, outcome.speeds[slow.node]))
        for slow in outcome.slow_nodes
    ]


def _link_evidence(verdict: PairVerdict, measured: dict[tuple[str, str], Measured]) -> dict[str, Any]:
    pairs = [measured[pair.a, pair.b] for pair in verdict.pairs]
    return {
        "slowdown": verdict.slowdown,
        "pairs": [
            {
                "a": pair.a,
                "b": pair.b,
                "to_a_bytes_per_s": pair.to_a,
                "to_b_bytes_per_s": pair.to_b,
                "round_trip_s": pair.round_trip_s,
            }
            for pair in pairs
        ],
    }


def _core_evidence(slow: NodeVerdict, speed: NodeSpeed | str) -> dict[str, Any]:
    figures = {"product_s": speed.product_s, "copy_s": speed.copy_s} if isinstance(speed, NodeSpeed) else {}
    return {"slowdown": slow.slowdown, **figures}


def _result(nodes: Sequence[str], outcome: Outcome) -> operator_pb2.ProbeResult:
    verdicts = [
        operator_pb2.ProbeVerdict(
            blame=verdict.blame.value, nodes=verdict.nodes, is_certain=verdict.is_certain, slowdown=verdict.slowdown
        )
        for verdict in outcome.verdicts
    ]
    verdicts += [
        operator_pb2.ProbeVerdict(blame="compute", nodes=[slow.node], is_certain=True, slowdown=slow.slowdown)
        for slow in outcome.slow_nodes
    ]
    return operator_pb2.ProbeResult(
        pairs=[_pair_to_pb(pair) for pair in outcome.pairs],
        nodes=[_speed_to_pb(node, outcome.speeds[node]) for node in nodes if node in outcome.speeds],
        verdicts=verdicts,
        not_measured=outcome.not_measured,
    )


def _pair_to_pb(pair: Measured) -> operator_pb2.ProbedPair:
    return operator_pb2.ProbedPair(
        a=pair.a,
        b=pair.b,
        to_a_bytes_per_second=pair.to_a,
        to_b_bytes_per_second=pair.to_b,
        round_trip_seconds=pair.round_trip_s,
        problem=pair.problem,
    )


def _speed_to_pb(node: str, speed: NodeSpeed | str) -> operator_pb2.ProbedNode:
    if isinstance(speed, str):
        return operator_pb2.ProbedNode(node_id=node, problem=speed)
    return operator_pb2.ProbedNode(node_id=node, product_seconds=speed.product_s, copy_seconds=speed.copy_s)
