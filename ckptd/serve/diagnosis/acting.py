"""``--on-fault``: a command of the owner's, run on a fault that is sure enough, within the limits of its rule.

Only an analyst that reaches more than half of the run acts. Before the command runs the action is recorded: with the
coordinator, or when that is gone with every daemon that the analyst reaches; any of them may refuse. One thread:
actions come one after the other, and a command that does not end is killed.
"""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import structlog

from ckptd.arena.records import save_record
from ckptd.detect.actions import calls_for_action, nodes_of, refusal
from ckptd.detect.records import Confidence, Fault
from ckptd.errors import CkptdError
from ckptd.model import Action, Incarnation, Roster, RosterEntry
from ckptd_api.convert import incarnation_to_pb
from ckptd_api.v1 import coordinator_pb2 as pb

if TYPE_CHECKING:
    from ckptd.serve.diagnosis.analyst import Analyst
    from ckptd.serve.node import Node

COMMAND_S: Final = 60.0
_CALL_S: Final = 5.0
_SHOWN_BYTES: Final = 2000
_SUCCESSORS: Final = 7
log = structlog.get_logger()


class Actor:
    """See the module. ``has_majority`` is asked when an action is about to be recorded, not when the fault was seen."""

    def __init__(self, node: Node, has_majority: Callable[[Analyst], bool]) -> None:
        self._node = node
        self._has_majority = has_majority
        self._tried: set[tuple[str, Incarnation, str, tuple[str, ...]]] = set()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="on-fault")

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def consider(self, analyst: Analyst, fault: Fault) -> None:
        """Act on ``fault`` if it calls for it and was not acted on before."""
        settings = self._node.settings
        if not settings.on_fault or not calls_for_action(fault, Confidence(settings.on_fault_level)):
            return
        nodes = nodes_of(fault, [entry.node_id for entry in analyst.roster.entries])
        key = (analyst.run, analyst.incarnation, fault.kind.value, nodes)
        if key not in self._tried:
            self._tried.add(key)
            self._pool.submit(self._act, key, analyst, fault, settings.on_fault)

    def record(self, run: str, roster: Roster, node_id: str, kind: str) -> str:
        """Keep an action on ``node_id`` in this daemon's record of the run; why it must not be done, "" when it may."""
        node, now_s = self._node, time.time()
        with self._lock:  # what is allowed once must not be granted twice
            record = node.records_of(run)
            if record is None:
                return f"run {run} is not known here"
            if why := refusal(record.actions, [node_id], len(roster.nodes), now_s):
                return why
            record.actions = (*record.actions, Action(node_id, now_s, kind))
            save_record(node.settings.arena, record)
        return ""

    # --- the thread ----------------------------------------------------------------------------------------------
    def _act(
        self, key: tuple[str, Incarnation, str, tuple[str, ...]], analyst: Analyst, fault: Fault, command: str
    ) -> None:
        nodes = key[-1]
        told = {"run": analyst.run, "kind": fault.kind.value, "nodes": list(nodes), "ranks": list(fault.ranks)}
        try:
            open_ones = [logged.fault for logged in analyst.faults(has_resolved=False)]
            if not any(now.kind is fault.kind and now.ranks == fault.ranks for now in open_ones):
                self._tried.discard(key)
                return  # over before its turn came
            if why := self._refusal(analyst, fault, nodes):
                self._tried.discard(key)  # what was refused now may be allowed later
                log.warning("no action on a fault", **told, reason=why)
                self._count(analyst.run, "refused")
                return
            self._run(command, _document(analyst, fault, nodes), told)
        except Exception:  # a thread's boundary: the next fault is considered all the same
            log.exception("action on a fault failed", **told)

    def _refusal(self, analyst: Analyst, fault: Fault, nodes: tuple[str, ...]) -> str:
        """Record the action wherever it must be; why it must not be done."""
        if not self._has_majority(analyst):
            return "the analyst does not reach more than half of the run"
        if len(nodes) != 1:
            return refusal((), nodes, len(analyst.roster.nodes), 0.0)
        roster = analyst.roster
        coordinator = roster.coordinator
        others = [entry for entry in roster.nodes.values() if entry.node_id != coordinator.node_id]
        if (answer := self._ask(coordinator, analyst, fault, nodes[0])) is not None:
            if not answer:  # and with those that would be analyst after it
                for entry in others[:_SUCCESSORS]:
                    self._ask(entry, analyst, fault, nodes[0])
            return answer
        answers = [self._ask(entry, analyst, fault, nodes[0]) for entry in others]
        reached = [answer for answer in answers if answer is not None]
        if 2 * len(reached) <= len(roster.nodes):
            return "fewer than half of the run's daemons could record it"
        return next((answer for answer in reached if answer), "")

    def _ask(self, entry: RosterEntry, analyst: Analyst, fault: Fault, node_id: str) -> str | None:
        """What that daemon says to the action; None when it does not answer."""
        if entry.node_id == self._node.node_id:
            return self.record(analyst.run, analyst.roster, node_id, fault.kind.value)
        peer = self._node.peering.channels.peer(entry.address)
        request = pb.RecordActionRequest(
            run=analyst.run,
            incarnation=incarnation_to_pb(analyst.incarnation),
            node_id=node_id,
            kind=fault.kind.value,
        )
        try:
            answer: pb.RecordActionResponse = peer.call(peer.coordinator.RecordAction, request, _CALL_S)
        except CkptdError:
            return None
        return answer.refusal

    def _run(self, command: str, document: dict[str, Any], told: dict[str, Any]) -> None:
        log.warning("acting on a fault", **told, command=command)
        try:
            done = subprocess.run(  # noqa: S603  the owner of the daemon wrote it
                ["/bin/sh", "-c", command],
                input=json.dumps(document).encode(),
                capture_output=True,
                timeout=COMMAND_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            log.warning("action killed", **told, seconds=COMMAND_S)
            self._count(told["run"], "killed")
            return
        output = (done.stdout + done.stderr)[-_SHOWN_BYTES:].decode(errors="replace")
        log.info("action done", **told, exit_code=done.returncode, output=output)
        self._count(told["run"], "failed" if done.returncode else "done")

    def _count(self, run: str, result: str) -> None:
        self._node.metrics.fault_actions_total.labels(run, result).inc()


def _document(analyst: Analyst, fault: Fault, nodes: tuple[str, ...]) -> dict[str, Any]:
    """The command's standard input: a fault as `ckptd faults --json` lists it, with the addresses of its nodes."""
    addresses = {node: analyst.roster.nodes[node].address for node in nodes if node in analyst.roster.nodes}
    return {
        "run": analyst.run,
        "incarnation": str(analyst.incarnation),
        "kind": fault.kind.value,
        "ranks": list(fault.ranks),
        "nodes": list(nodes),
        "addresses": addresses,
        "confidence": fault.confidence.value,
        "since_step": fault.since_step,
        "evidence": dict(fault.evidence),
    }
