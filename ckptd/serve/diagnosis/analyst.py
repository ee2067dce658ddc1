"""The analyst of one incarnation: takes what nodes report of their ranks and has it judged; its memory is soft.

Every daemon can be it: it is the one that the nodes report to, the coordinator's as long as that answers.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import structlog

from ckptd.detect.faultlog import Logged
from ckptd.detect.health import Health
from ckptd.detect.judge import Judge
from ckptd.detect.layout import Layout
from ckptd.detect.pictures import Scene
from ckptd.detect.records import Communicator, Fault, RankState, Timings
from ckptd.errors import InstanceChanged, InvalidRequest, few
from ckptd.format.timings import POSITIONS, SAMPLE, SELF, unpack
from ckptd.model import Incarnation, Roster
from ckptd.replay.recording import Recording
from ckptd.serve.diagnosis.feeds import KEPT_STEPS, MOST_SAMPLES
from ckptd.serve.diagnosis.messages import communicator_from_pb, health_from_pb, rank_state
from ckptd.serve.diagnosis.peer_links import Answers, links_of, nodes_by_address
from ckptd.serve.diagnosis.verifying import ProbeFinding, verified_by
from ckptd_api.v1 import coordinator_pb2 as pb
from ckptd_api.v1 import faults_pb2, timings_pb2

# A node that has not reported for so long is not reached; its ranks are silent since it was heard of.
SILENT_S: Final = 5.0
# What is told changes with the faults; how many ranks are heard of may be so old.
TOLD_S: Final = 1.0
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Told:
    """The last step that a rank finished, None unknown; whether all that it does is seen."""

    step: int | None
    is_seen: bool


@dataclass(slots=True)
class _NodeView:
    """What one node last said."""

    heard_s: float = 0.0
    table: dict[int, Communicator] = field(default_factory=dict)
    states: dict[int, RankState] = field(default_factory=dict)
    problems: dict[int, str] = field(default_factory=dict)
    told: dict[int, _Told | None] = field(default_factory=dict)  # None: gone
    health: Health = field(default_factory=Health)


class Analyst:
    """See the module. ``on_change`` is called, without the lock, when the open faults have changed."""

    def __init__(
        self, run: str, incarnation: Incarnation, roster: Roster, on_change: Callable[[Analyst], None]
    ) -> None:
        self.run = run
        self.incarnation = incarnation
        self._follow(roster)
        self._on_change = on_change
        self._nodes: dict[str, _NodeView] = {}
        self._judge = Judge([entry.node_id for entry in roster.entries])
        self._communicators: dict[str, Communicator] = {}
        self._has_news = False
        self._reported: set[str] = set()  # nodes, since the last look
        self._peers = Answers()
        self._lock = threading.Lock()
        self._told: tuple[tuple[str, bool], float, faults_pb2.RunFaults] | None = None
        self._telling = threading.Lock()

    def _follow(self, roster: Roster) -> None:
        """A report is as cheap as the ranks in it: what is looked up in the roster for each is prepared."""
        self.roster = roster
        ranks: dict[str, set[int]] = {}
        for entry in roster.entries:
            ranks.setdefault(entry.node_id, set()).add(entry.rank)
        self._ranks_of = ranks
        self._node_at = nodes_by_address(roster)

    def take(self, request: pb.ReportRanksRequest, now_s: float) -> bool:
        """One node's report; True when somebody is gone of whom that was not known. InvalidRequest, InstanceChanged on
        what no daemon of this roster would report."""
        own = self._ranks_of.get(request.node_id)
        if not own:
            raise InstanceChanged(f"node {request.node_id} is not in version {self.roster.version} of the roster")
        if strangers := {item.rank for item in request.ranks} - own:
            raise InvalidRequest(f"node {request.node_id} has no rank {min(strangers)}")
        with self._lock:
            view = self._nodes.setdefault(request.node_id, _NodeView())
            view.heard_s = now_s
            self._reported.add(request.node_id)
            view.health = health_from_pb(request.health)
            for entry in request.communicators:
                known = communicator_from_pb(entry)
                # One object for all nodes: the world's has as many members as there are ranks.
                view.table[entry.row] = self._communicators.setdefault(known.id, known)
            if request.HasField("mesh"):
                self._lay_out(request.mesh)
            if request.HasField("peers"):
                links = links_of(request.node_id, request.peers, self._node_at)
                self._peers.take(request.node_id, links)
            before = {rank for rank, state in view.states.items() if state.gone_s is not None}
            for item in request.ranks:
                self._take_rank(view, request.node_id, item, now_s)
            return any(state.gone_s is not None and rank not in before for rank, state in view.states.items())

    def _lay_out(self, mesh: timings_pb2.Mesh) -> None:
        """Peer sets by the job's own mesh; one that does not tell them leaves it to what is seen."""
        # A mesh of one dimension needs no name: FSDP makes it so.
        names = tuple(mesh.names) or (("data",) if len(mesh.shape) == 1 else ())
        try:
            layout = Layout.from_mesh(names, tuple(mesh.shape), tuple(mesh.ranks), self.roster.world_size)
        except InvalidRequest as error:
            log.info("mesh not used", run=self.run, reason=error.message)
            return
        self._judge.lay_out(layout)

    def _take_rank(self, view: _NodeView, node: str, item: pb.RankReport, now_s: float) -> None:
        steps = unpack(item.steps, SELF, f"steps of rank {item.rank}", 2 * KEPT_STEPS)
        samples = unpack(item.samples, SAMPLE, f"samples of rank {item.rank}", MOST_SAMPLES)
        if len(steps) or len(samples):
            self._judge.take(item.rank, steps, samples, view.table)
            self._has_news = True
        if item.positions:
            if len(item.positions) != POSITIONS:
                raise InvalidRequest(f"rank {item.rank} names {len(item.positions)} positions, not {POSITIONS}")
            self._judge.name_positions(item.rank, tuple(item.positions))
        is_gone = item.is_dead or item.has_left or bool(item.error)
        if is_gone or (item.HasField("heartbeat") and item.coverage.source != "none"):
            view.states[item.rank] = rank_state(item, node, view.table, now_s)
        else:
            view.states.pop(item.rank, None)  # of one that is not seen it cannot be said that it does nothing
        view.problems[item.rank] = item.coverage.problem
        step = item.heartbeat.step if item.HasField("heartbeat") else None
        is_seen = item.coverage.source not in ("", "none") and not item.coverage.problem
        view.told[item.rank] = None if is_gone else _Told(step, is_seen)

    def renew(self, roster: Roster) -> None:
        """A later version of the roster: nodes may have changed, what ranks did has not."""
        with self._lock:
            self._follow(roster)
            self._nodes = {node: view for node, view in self._nodes.items() if node in roster.nodes}

    # --- judging -------------------------------------------------------------------------------------------------
    def tick(self, now_s: float) -> None:
        with self._lock:
            self._reported.clear()
            states = self._states(now_s)
            has_changed = self._judge.look(states, self._communicators, now_s)
        if has_changed:  # at once, whatever becomes of the rest
            self._change()
        with self._lock:
            peers = self._peers.newest()
            if not self._has_news and peers is None:
                return
            self._has_news = False
            health = {node: view.health for node, view in self._nodes.items()}
            has_changed = self._judge.weigh(states, self._communicators, now_s, health, peers)
        if has_changed:
            self._change()

    def verify(self, findings: Sequence[ProbeFinding]) -> list[Logged]:
        """A probe has found this: the open faults that agree with it, verified now."""
        faults, node_of_rank = self._judge.log, [entry.node_id for entry in self.roster.entries]
        with self._lock:
            agreed = [verified_by(known.fault, found, node_of_rank) for known in faults.open for found in findings]
            verified = [fault for fault in agreed if fault is not None and faults.verify(fault)]
            told = [known for known in faults.open if any(_is_at(known.fault, fault) for fault in verified)]
        if told:
            self._change()
        return told

    def _change(self) -> None:
        with self._telling:
            self._told = None
        self._on_change(self)

    def _states(self, now_s: float) -> list[RankState]:
        """Every rank that was heard of; those of a node that fell silent are as silent as it is."""
        states = []
        for view in self._nodes.values():
            quiet_s = now_s - view.heard_s
            for state in view.states.values():
                is_quiet = quiet_s > SILENT_S
                states.append(replace(state, silent_s=state.silent_s + quiet_s) if is_quiet else state)
        return sorted(states, key=lambda state: state.rank)

    @property
    def is_complete(self) -> bool:
        """Every node has reported since the last look: it is time for one."""
        with self._lock:
            return self._reported >= self._ranks_of.keys()

    @property
    def is_unsettled(self) -> bool:
        return self._judge.is_unsettled

    # --- answers -------------------------------------------------------------------------------------------------
    def faults(self, *, has_resolved: bool) -> list[Logged]:
        """Open faults, oldest first; with ``has_resolved`` those that are over come before them."""
        with self._lock:
            return [*(self._judge.log.resolved if has_resolved else ()), *self._judge.log.open]

    def told(
        self, stance: tuple[str, bool], now_s: float, make: Callable[[], faults_pb2.RunFaults]
    ) -> faults_pb2.RunFaults:
        """What ``make`` made last for a daemon of the same ``stance``; again when the faults have changed, and each
        TOLD_S."""
        with self._telling:
            if self._told is None or self._told[0] != stance or not 0 <= now_s - self._told[1] < TOLD_S:
                self._told = stance, now_s, make()
            return self._told[2]

    def scene(self, now_s: float) -> Scene:
        """What is seen at this moment, to be drawn without holding up the judge."""
        with self._lock:
            faults = [logged.fault for logged in self._judge.log.open]
            return Scene.of(self._judge, self._states(now_s), self._communicators, faults)

    def recording(self, now_s: float) -> Recording:
        """The steps held and what ranks are in the middle of, to be judged again elsewhere. Samples are not kept."""
        with self._lock:
            world_size, history = self.roster.world_size, self._judge.history
            steps = {rank: rows for rank in range(world_size) if len(rows := history.rows(rank))}
            return Recording(
                Timings(world_size, self._judge.nodes, steps),
                self._judge.layout,
                tuple(self._states(now_s)),
                dict(self._communicators),
                self.run,
                str(self.incarnation),
            )

    def nodes_heard(self, now_s: float) -> int:
        with self._lock:
            return sum(now_s - view.heard_s <= SILENT_S for view in self._nodes.values())

    def has_majority(self, now_s: float) -> bool:
        """It reaches more than half of the run's nodes: only then it may act, and judge in the coordinator's place."""
        return 2 * self.nodes_heard(now_s) > len(self.roster.nodes)

    def ranks_heard(self) -> int:
        with self._lock:
            return sum(state.silent_s < SILENT_S for view in self._nodes.values() for state in view.states.values())

    @property
    def lag_steps(self) -> float:
        """Of the slowest rank behind the fastest; not a number before any has told a step."""
        steps = [told.step for told in self._told_by_ranks() if told and told.step is not None and told.step >= 0]
        return max(steps) - min(steps) if steps else math.nan

    @property
    def coverage_ratio(self) -> float:
        """Of the ranks that are not gone, those that are seen; not a number when all are gone, or none tells anything:
        then nobody asked for timings."""
        told = self._told_by_ranks()
        there = [each for each in told if each]
        if all(each.step is None for each in there):
            return math.nan
        return sum(each.is_seen for each in there) / (self.roster.world_size - (len(told) - len(there)))

    def _told_by_ranks(self) -> list[_Told | None]:
        with self._lock:
            return [told for view in self._nodes.values() for told in view.told.values()]

    def problems(self) -> list[str]:
        """What is not seen, once for all ranks of which it is true."""
        with self._lock:
            ranks: dict[str, list[int]] = {}
            for view in self._nodes.values():
                for rank, problem in view.problems.items():
                    if problem:
                        ranks.setdefault(problem, []).append(rank)
        return [f"rank {few(sorted(of))}: {problem}" for problem, of in sorted(ranks.items())]


def _is_at(fault: Fault, other: Fault) -> bool:
    return (fault.kind, fault.ranks, fault.nodes) == (other.kind, other.ranks, other.nodes)
