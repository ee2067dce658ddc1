"""Diagnosis on one daemon: collects from the ranks here, tells the analyst of each run, judges where it is one itself.

A node reports to the first daemon of the roster that answers, the coordinator's as long as it does: so all agree on the
analyst without asking one another. Nothing of it touches the job's process groups. One thread, once a second, and at
once when all have reported or a rank is gone; a daemon that does not answer costs one deadline, then it is passed over
for a while.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, ParamSpec

import structlog

from ckptd.detect.health import Resource
from ckptd.detect.judge import SETTLE_S
from ckptd.errors import CkptdError, DaemonUnreachable, InstanceChanged, InvalidRequest
from ckptd.health.monitor import Monitor, sources_of_node
from ckptd.health.tcp import PeerTcpSource
from ckptd.model import Incarnation
from ckptd.serve.diagnosis.acting import Actor
from ckptd.serve.diagnosis.analyst import Analyst
from ckptd.serve.diagnosis.feeds import NodeFeed
from ckptd.serve.diagnosis.gauges import Gauges
from ckptd.serve.diagnosis.health_gauges import HealthGauges
from ckptd.serve.diagnosis.messages import fault_row, health_to_pb, nodes_named, run_faults
from ckptd.serve.diagnosis.named import NamedNodes
from ckptd.serve.diagnosis.peer_links import sample_of
from ckptd.serve.diagnosis.reacting import Reactions
from ckptd.serve.diagnosis.verifying import finding_from_pb
from ckptd.serve.members import Member
from ckptd.serve.node_run import NodeRun
from ckptd.serve.processes import ProcessWatch
from ckptd_api.convert import incarnation_from_pb, incarnation_to_pb
from ckptd_api.v1 import coordinator_pb2 as pb
from ckptd_api.v1 import faults_pb2, node_pb2, types_pb2

if TYPE_CHECKING:
    from ckptd.serve.node import Node

BEAT_S: Final = 1.0
# So much of a pause is saved at most when every rank here has reported: the analyst of many nodes has no time to spare.
_SAVED_S: Final = 0.5
# Ranks that went with the first to go are in the same report.
_GATHER_S: Final = 0.05
_CALL_S: Final = 2.0
_PASSED_OVER_S: Final = 5.0
_MOST_TRIED: Final = 3
_AFTER_S: Final = 60.0
# Until a job that died is started again its death is no news of the past.
_AFTER_DEATH_S: Final = 3600.0
_NODES_PER_SECOND: Final = 2000
Key = tuple[str, Incarnation]
P = ParamSpec("P")
log = structlog.get_logger()


class Diagnosis:
    """See the module. Safe to call from any thread."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._feeds: dict[Key, NodeFeed] = {}
        self._analysts: dict[Key, Analyst] = {}
        self._told: dict[Key, faults_pb2.RunFaults] = {}
        self._named = NamedNodes()
        self._reactions: dict[Key, Reactions] = {}
        self._gauges = Gauges(node.metrics)
        self._health_gauges = HealthGauges(node.metrics)
        self._processes = ProcessWatch()
        self._monitor = Monitor(sources_of_node(), self._loaded)
        self._passed_over_s: dict[tuple[str, str], float] = {}
        self._lock = threading.Lock()
        self.changed = threading.Condition()
        self._actor = Actor(node, lambda analyst: analyst.has_majority(time.monotonic()))
        self._wake = threading.Event()
        self._looked_s = -math.inf
        self._is_closed = False
        self._thread = threading.Thread(target=self._keep, name="diagnosis", daemon=True)

    def start(self) -> None:
        self._processes.start()
        self._monitor.start()
        self._thread.start()

    def close(self) -> None:
        self._is_closed = True
        self._wake.set()
        self._processes.close()
        self._monitor.close()
        self._actor.close()
        if self._thread.is_alive():
            self._thread.join()

    def wake(self) -> None:
        """A rank is gone: report and judge at once."""
        self._wake.set()

    # --- from the services ---------------------------------------------------------------------------------------
    def watch_process(self, run: NodeRun, rank: int, pid: int) -> None:
        """Have the death of a rank's process noticed at once; ``pid`` 0: only by the end of its control stream."""
        member = run.ranks.get(rank)
        if pid <= 0 or member is None or member.watched_pid == pid:
            return

        def on_end(number: int) -> None:
            if run.ranks.get(rank) is member and member.state == "joined":
                log.warning("rank died", run=run.run, rank=rank, pid=pid, signal=number)
                member.signal = number
                run.leave(rank, "dead")
                self.wake()

        member.watched_pid = pid if self._processes.watch(pid, on_end) else 0

    def take_timings(self, run: NodeRun, request: node_pb2.ReportTimingsRequest) -> bool:
        """A rank's report; False when it must send its communicators again."""
        feed, now_s = self._feed(run), time.monotonic()
        dropped = feed.dropped_total
        is_known = feed.take(request, now_s)
        self._node.metrics.timing_dropped_total.labels(run.run).inc(feed.dropped_total - dropped)
        joined = [rank for rank, member in list(run.ranks.items()) if member.state == "joined"]
        if feed.has_news_of(joined) and now_s - self._looked_s > self._pause_s() - _SAVED_S:
            self._wake.set()
        return is_known

    def open_black_box(self, run: NodeRun, rank: int) -> int:
        """A descriptor of memory for the last operations of ``rank``, which joined here; the caller closes it."""
        if rank not in run.ranks:
            raise InvalidRequest(f"rank {rank} of run {run.run} has not joined here")
        return self._feed(run).open_black_box(rank)

    def take_ranks(self, request: pb.ReportRanksRequest) -> pb.ReportRanksResponse:
        """A node's report to the analyst here."""
        run = self._joined(request.run, request.incarnation)
        key = (run.run, run.incarnation)
        with self._lock:
            analyst = self._analysts.get(key)
            if analyst is None:
                analyst = self._analysts[key] = Analyst(*key, run.roster, self._on_change)
        if analyst.roster.version < run.roster.version:
            analyst.renew(run.roster)
        has_lost = analyst.take(request, time.monotonic())
        # After a report of its own it judges anyway.
        if (has_lost or analyst.is_complete) and request.node_id != self._node.node_id:
            self._wake.set()
        faults = self._faults_of(analyst)
        is_news = faults.version != request.known_faults
        return pb.ReportRanksResponse(instance=self._node.instance, faults=faults if is_news else None)

    def record_action(self, request: pb.RecordActionRequest) -> pb.RecordActionResponse:
        """Another analyst's action, to be recorded here before it runs."""
        run = self._joined(request.run, request.incarnation)
        refusal = self._actor.record(run.run, run.roster, request.node_id, request.kind)
        return pb.RecordActionResponse(refusal=refusal)

    def _joined(self, run: str, incarnation: types_pb2.Incarnation) -> NodeRun:
        found = self._node.find_run(run, incarnation_from_pb(incarnation))
        if found is None:
            raise DaemonUnreachable(f"run {run} was not joined with this instance of the daemon")
        return found

    def take_findings(self, request: pb.VerifyFaultsRequest) -> pb.VerifyFaultsResponse:
        """What a probe has found, to the analyst here."""
        key = (request.run, incarnation_from_pb(request.incarnation))
        analyst = self._analysts.get(key)
        if analyst is None:
            return pb.VerifyFaultsResponse()
        verified = analyst.verify([finding_from_pb(finding) for finding in request.findings])
        epoch_s = time.time() - time.monotonic()
        return pb.VerifyFaultsResponse(faults=[fault_row(*key, logged, epoch_s) for logged in verified])

    def tell_findings(self, run: NodeRun, findings: Sequence[pb.ProbeFinding]) -> list[faults_pb2.FaultRow]:
        """To the analyst of the run, wherever it is; the faults that it has verified. A CkptdError when it does not
        answer."""
        told = self._told.get((run.run, run.incarnation))
        analyst = run.roster.nodes.get(told.coverage.analyst) if told else None
        if analyst is None:
            return []
        request = pb.VerifyFaultsRequest(run=run.run, incarnation=incarnation_to_pb(run.incarnation), findings=findings)
        if analyst.node_id == self._node.node_id:
            return list(self.take_findings(request).faults)
        peer = self._node.peering.channels.peer(analyst.address)
        return list(peer.call(peer.coordinator.VerifyFaults, request, _CALL_S).faults)

    def faults(self, run: str) -> Iterator[faults_pb2.RunFaults]:
        """What was last heard of every incarnation of ``run`` that is known here."""
        with self._lock:
            found = [(key, told) for key, told in self._told.items() if key[0] == run]
        return iter([told for _, told in sorted(found, key=lambda item: item[0][1])])

    def sentences(self, run: str, incarnation: Incarnation) -> list[str]:
        """The open faults of that incarnation that are more than suspects."""
        told = self._told.get((run, incarnation))
        rows = [row for row in told.faults if not row.resolved_s and row.confidence != "suspect"] if told else []
        return [f"{row.kind}, {row.confidence}: {json.loads(row.evidence).get('summary', '')}" for row in rows]

    def nodes_at_fault(self, run: str) -> frozenset[str]:
        """Nodes that a fault of ``run`` names, or named a while ago, with more than suspicion."""
        with self._lock:
            return self._named.of(run, time.monotonic())

    def newest(self, run: str) -> tuple[Incarnation, faults_pb2.RunCoverage] | None:
        """The newest incarnation of ``run`` that anything was heard of, and how far its analyst sees."""
        with self._lock:
            known = [(key[1], told.coverage) for key, told in self._told.items() if key[0] == run]
        return max(known, key=lambda item: item[0], default=None)

    def analyst(self, run: str, incarnation: Incarnation) -> Analyst | None:
        """The analyst of that incarnation, when it is here."""
        with self._lock:
            return self._analysts.get((run, incarnation))

    def _loaded(self) -> set[Resource]:
        """What this daemon itself keeps busy: its own drains are no sign of a sick disk."""
        runs = self._node.node_runs()
        is_draining = any(run.is_draining for run in runs)
        is_protecting = any(run.is_making_parity for run in runs)
        return {Resource.DISK, Resource.NETWORK} if is_draining else {Resource.NETWORK} if is_protecting else set()

    # --- the thread ----------------------------------------------------------------------------------------------
    def _keep(self) -> None:
        while not self._is_closed:
            is_woken = self._wake.wait(self._pause_s())
            if is_woken and not self._is_closed:
                time.sleep(_GATHER_S)
            self._wake.clear()
            self._looked_s = time.monotonic()
            for run in self._runs():
                self._guard(self._report, run)
            with self._lock:
                analysts = list(self._analysts.values())
            for analyst in analysts:
                self._guard(self._judge, analyst)
            self._guard(self._health_gauges.show, self._monitor.snapshot(), time.monotonic())
            self._guard(self._forget)

    def _guard(self, action: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """A thread's boundary: one run that fails costs no other, and the next beat tries again."""
        try:
            action(*args, **kwargs)
        except Exception:
            log.exception("diagnosis failed")

    def _pause_s(self) -> float:
        """The more nodes an analyst has to hear, the longer the pauses."""
        if any(analyst.is_unsettled for analyst in list(self._analysts.values())):
            return SETTLE_S
        return BEAT_S + max((run.node_count for run in self._runs()), default=0) / _NODES_PER_SECOND

    def _runs(self) -> list[NodeRun]:
        """Those with somebody here, or that somebody left a while ago: what became of it is still told."""
        now_s = time.monotonic()
        return [
            run
            for run in self._node.node_runs()
            if any(now_s < _told_until_s(member) for member in list(run.ranks.values()))
        ]

    def _feed(self, run: NodeRun) -> NodeFeed:
        key = (run.run, run.incarnation)
        with self._lock:
            if key not in self._feeds:
                self._feeds[key] = NodeFeed(run.roster.world_size)
            return self._feeds[key]

    def _report(self, run: NodeRun) -> None:
        """To the first of the roster that answers."""
        now_s, feed = time.monotonic(), self._feed(run)
        nodes = run.roster.nodes.values()
        entries = [e for e in nodes if self._passed_over_s.get((run.run, e.node_id), 0.0) <= now_s]
        for entry in entries[:_MOST_TRIED]:
            feed.begin(entry.node_id)
            request = self._request(run, feed)
            try:
                answer = self._send(entry.node_id, entry.address, request)
            except CkptdError as error:
                feed.failed()
                if not error.is_retryable or isinstance(error, InstanceChanged):
                    log.warning("report refused", run=run.run, node=entry.node_id, reason=error.message)
                    return  # by one that is there: a later roster is on its way to it, or something here is wrong
                self._passed_over_s[run.run, entry.node_id] = time.monotonic() + _PASSED_OVER_S
                log.warning("analyst cannot be reached", run=run.run, node=entry.node_id, reason=error.message)
                continue
            feed.answered(answer.instance)
            if answer.HasField("faults"):
                self._learn((run.run, run.incarnation), answer.faults)
            return

    def _request(self, run: NodeRun, feed: NodeFeed) -> pb.ReportRanksRequest:
        now_s, snapshot = time.monotonic(), self._monitor.snapshot()
        told = self._told.get((run.run, run.incarnation))
        request = pb.ReportRanksRequest(
            run=run.run,
            incarnation=incarnation_to_pb(run.incarnation),
            node_id=self._node.node_id,
            known_faults=told.version if told else 0,
            health=health_to_pb(snapshot.health),
        )
        for rank, member in sorted(run.ranks.items()):
            item = request.ranks.add(rank=rank, is_dead=member.state == "dead", error=member.error)
            item.has_left = member.state == "left" and not member.error
            item.gone_seconds = now_s - member.gone_s if member.gone_s is not None else 0.0
            item.signal = member.signal
        feed.fill(request, now_s)
        if PeerTcpSource.name not in snapshot.unread and feed.is_new_sample(snapshot.at_s):
            request.peers.CopyFrom(sample_of(snapshot.figures))
        return request

    def _send(self, node_id: str, address: str, request: pb.ReportRanksRequest) -> pb.ReportRanksResponse:
        if node_id == self._node.node_id:
            return self.take_ranks(request)
        peer = self._node.peering.channels.peer(address)
        answer: pb.ReportRanksResponse = peer.call(peer.coordinator.ReportRanks, request, _CALL_S)
        return answer

    def _judge(self, analyst: Analyst) -> None:
        now_s = time.monotonic()
        if self._is_judging(analyst, now_s):
            analyst.tick(now_s)
            self._react(analyst)
            self._gauges.show(analyst)
        else:
            self._gauges.hide(analyst)

    def _react(self, analyst: Analyst) -> None:
        """Only the coordinator can have snapshots taken and drained."""
        key = (analyst.run, analyst.incarnation)
        found = [c for c in self._node.coordinators() if (c.run, c.incarnation) == key]
        for logged in analyst.faults(has_resolved=False) if found else ():
            self._reactions.setdefault(key, Reactions()).react(found[0], logged.fault, time.monotonic())

    def _is_judging(self, analyst: Analyst, now_s: float) -> bool:
        """The coordinator's always does; another in its place only when it reaches more than half of the run."""
        return analyst.roster.coordinator.node_id == self._node.node_id or analyst.has_majority(now_s)

    def _forget(self) -> None:
        """Of a run that is over only what was found of it stays, until the run itself is forgotten."""
        known = {(run.run, run.incarnation) for run in self._node.node_runs()}
        live = {(run.run, run.incarnation) for run in self._runs()}
        now_s = time.monotonic()
        self._passed_over_s = {key: until_s for key, until_s in self._passed_over_s.items() if until_s > now_s}
        with self._lock:
            for key in self._analysts.keys() - live:
                self._gauges.forget(self._analysts[key])
            for key in self._told.keys() - known:
                self._named.tell(*key, (), now_s)
            for kept, keys in (
                (self._feeds, live),
                (self._analysts, live),
                (self._reactions, live),
                (self._told, known),
            ):
                for key in kept.keys() - keys:
                    del kept[key]

    # --- faults --------------------------------------------------------------------------------------------------
    def _faults_of(self, analyst: Analyst) -> faults_pb2.RunFaults:
        now_s = time.monotonic()
        return run_faults(analyst, self._node.node_id, self._is_judging(analyst, now_s), now_s, time.time())

    def _learn(self, key: Key, told: faults_pb2.RunFaults) -> None:
        run = self._node.find_run(*key)
        with self._lock:
            self._told[key] = told
            self._named.tell(*key, nodes_named(told, run.roster) if run else (), time.monotonic())
        with self.changed:
            self.changed.notify_all()

    def _on_change(self, analyst: Analyst) -> None:
        for logged in analyst.faults(has_resolved=False):
            fault = logged.fault
            self._actor.consider(analyst, fault)
            log.warning(
                "fault",
                run=analyst.run,
                kind=fault.kind.value,
                ranks=list(fault.ranks),
                nodes=list(fault.nodes),
                confidence=fault.confidence.value,
                since_step=fault.since_step,
                summary=fault.evidence.get("summary", ""),
            )
        key = (analyst.run, analyst.incarnation)
        self._learn(key, self._faults_of(analyst))


def _told_until_s(member: Member) -> float:
    if member.gone_s is None:
        return math.inf
    return member.gone_s + (_AFTER_DEATH_S if member.state == "dead" or member.error else _AFTER_S)
