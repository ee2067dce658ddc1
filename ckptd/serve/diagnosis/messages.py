"""Messages of timings and faults, and the values they stand for."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from ckptd.detect.actions import nodes_of
from ckptd.detect.faultlog import Logged
from ckptd.detect.health import FIGURES, Health
from ckptd.detect.records import Communicator, Confidence, Count, Kind, Pending, RankState
from ckptd.format.timings import Op
from ckptd.model import Incarnation, Roster
from ckptd_api.convert import incarnation_to_pb
from ckptd_api.v1 import coordinator_pb2, timings_pb2
from ckptd_api.v1 import faults_pb2 as pb

if TYPE_CHECKING:
    from ckptd.serve.diagnosis.analyst import Analyst

# Of the faults that are over, so many of the newest are told.
MOST_RESOLVED: Final = 32
_OPS = frozenset(int(op) for op in Op)


def communicator_from_pb(entry: timings_pb2.CommunicatorEntry) -> Communicator:
    return Communicator(entry.id, tuple(entry.members), entry.label)


def rank_state(
    item: coordinator_pb2.RankReport, node: str, table: Mapping[int, Communicator], now_s: float
) -> RankState:
    """What a rank is in the middle of, by its node's report that came at ``now_s``."""
    beat = item.heartbeat
    is_gone = item.is_dead or bool(item.error)
    return RankState(
        rank=item.rank,
        node=node,
        counts={
            table[c.communicator].id: Count(c.enqueued, c.completed) for c in beat.counts if c.communicator in table
        },
        pending=tuple(
            Pending(table[p.communicator].id, p.seq, op_from(p.op), p.size_bytes, p.peer, p.for_seconds, p.where)
            for p in beat.pending
            if p.communicator in table
        ),
        signatures={
            (table[s.communicator].id, s.seq): (op_from(s.op), s.size_bytes)
            for s in beat.signatures
            if s.communicator in table
        },
        silent_s=item.silent_seconds,
        is_dead=item.is_dead,
        has_left=item.has_left,
        step=beat.step if item.HasField("heartbeat") else -1,
        stack=beat.stack,
        gone_s=now_s - item.gone_seconds if is_gone else None,
        error=item.error,
        signal=item.signal,
        mask=beat.mask,
    )


def health_to_pb(health: Health) -> coordinator_pb2.NodeHealth:
    return coordinator_pb2.NodeHealth(
        score=health.score, signs=health.signs, severities=health.severities, is_learned=health.is_learned
    )


def health_from_pb(message: coordinator_pb2.NodeHealth) -> Health:
    """What this version does not judge is left out."""
    severities = {family: value for family, value in message.severities.items() if family in FIGURES}
    return Health(message.score, tuple(message.signs), severities, message.is_learned)


def op_from(number: int) -> Op:
    """OTHER for one that this version does not know."""
    return Op(number) if number in _OPS else Op.OTHER


def fault_row(run: str, incarnation: Incarnation, logged: Logged, epoch_s: float) -> pb.FaultRow:
    """``epoch_s``: what to add to the analyst's seconds for those since the epoch."""
    fault = logged.fault
    return pb.FaultRow(
        run=run,
        incarnation=incarnation_to_pb(incarnation),
        kind=fault.kind.value,
        ranks=fault.ranks,
        nodes=fault.nodes,
        confidence=fault.confidence.value,
        since_step=fault.since_step,
        evidence=json.dumps(dict(fault.evidence), default=str),
        # Whole seconds: the two clocks drift, and what is told again must be the same.
        first_seen_s=round(logged.first_seen_s + epoch_s),
        resolved_s=round(logged.resolved_s + epoch_s) if logged.resolved_s is not None else 0.0,
    )


def nodes_named(told: pb.RunFaults, roster: Roster) -> set[str]:
    """Those to which a cause in hardware is put down by a fault that lasts and is more than a suspicion."""
    node_of_rank = [entry.node_id for entry in roster.entries]
    rows = [row for row in told.faults if not row.resolved_s and row.confidence != Confidence.SUSPECT]
    at_fault = [row for row in rows if row.kind not in (Kind.DESYNC, Kind.DEATH)]
    return {node for row in at_fault for node in nodes_of(row, node_of_rank)}


def run_faults(analyst: Analyst, node_id: str, is_judging: bool, now_s: float, clock_s: float) -> pb.RunFaults:
    """What the analyst has found, made at most once a second while nothing changes: every node asks. ``now_s``
    monotonic, ``clock_s`` since the epoch."""
    return analyst.told(
        (node_id, is_judging), now_s, lambda: _run_faults(analyst, node_id, is_judging, clock_s - now_s)
    )


def _run_faults(analyst: Analyst, node_id: str, is_judging: bool, epoch_s: float) -> pb.RunFaults:
    """The open faults and the newest of those that are over; its version is a digest."""
    known = analyst.faults(has_resolved=True)
    over = [logged for logged in known if logged.resolved_s is not None]
    lasting = [logged for logged in known if logged.resolved_s is None]
    run, incarnation = analyst.run, analyst.incarnation
    told = pb.RunFaults(
        faults=[fault_row(run, incarnation, logged, epoch_s) for logged in (*over[-MOST_RESOLVED:], *lasting)],
        coverage=pb.RunCoverage(
            run=run,
            analyst=node_id if is_judging else "",
            is_judging=is_judging,
            ranks_heard=analyst.ranks_heard(),
            world_size=analyst.roster.world_size,
            problems=analyst.problems(),
        ),
    )
    told.version = zlib.crc32(told.SerializeToString(deterministic=True)) + 1
    return told
