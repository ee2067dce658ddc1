"""Which ranks compute slower than those that run the same program, window by window.

Layer: ``detect``, pure: no clock, no random; the state is explicit and a window is judged once, however often ``judge``
is called. Self time, the step without all communication, is long on the rank that is slow and not on those that wait
for it, so a victim is never above its peers. Invariants: a verdict is confirmed by windows that agree, never by one;
a localised excess and an imbalance of data never get beyond suspect.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from ckptd.detect.compute_baseline import Baseline
from ckptd.detect.compute_drift import Drift
from ckptd.detect.compute_findings import Cause, Comparison, Finding, spread_of, steady_share, z_in_time
from ckptd.detect.compute_scores import MANY, Flags, PeerSets, Values, score, window_values
from ckptd.detect.compute_thresholds import Calibration, Scale, Thresholds
from ckptd.detect.compute_verdicts import Verdict, faults_of
from ckptd.detect.history import History
from ckptd.detect.layout import Ids, Layout
from ckptd.detect.records import Fault
from ckptd.errors import InvalidRequest

# Looked at closely in one window; in a job where more ranks are slow at once, none of them stands out.
MOST_FINDINGS: Final = 64
_TEN: Final = 10  # steps of the windows that drift and baselines are made of
_DRIFT_WINDOWS: Final = 2


@dataclass(frozen=True, slots=True)
class _Standing:
    """What the last window of a scale said of a rank, and how many in a row did."""

    finding: Finding
    since_step: int
    in_a_row: int


class ComputeJudge:
    """Judges the windows of a ``History`` that became complete since the last call.

    ``nodes``: of each rank, "" unknown. Call it every few steps: of windows that became complete together the newest
    of each length decides what stands.
    """

    def __init__(self, layout: Layout, nodes: Sequence[str], thresholds: Thresholds | None = None) -> None:
        world_size = len(layout.program)
        if len(nodes) != world_size:
            raise InvalidRequest(f"{len(nodes)} nodes for {world_size} ranks")
        self._layout = layout
        self._nodes = tuple(nodes)
        self._node_of: Ids = np.unique(np.array(self._nodes), return_inverse=True)[1]
        self._has_node = np.array([bool(node) for node in nodes])
        self._thresholds = thresholds or Thresholds()
        self._program = PeerSets.of(layout.program)
        self._data = PeerSets.of(layout.data)
        is_staged = layout.replica is not None and len(np.unique(layout.stage)) > 1
        self._replica = PeerSets.of(layout.replica) if is_staged and layout.replica is not None else None
        self._world = PeerSets.of(np.zeros(world_size, np.int64))
        # Where some rank has few peers, or soon may have, their pasts are needed, and for that everybody's.
        self._has_few = bool((np.maximum(self._program.size, self._data.size) < 2 * MANY).any())
        self._baseline = Baseline(world_size)
        self._generation = 0
        self._judged_until: dict[int, int] = {}
        self._calibrations: dict[tuple[int, str], Calibration] = {}
        self._drifts: dict[str, Drift] = {}
        self._windows_of_ten = 0
        self._standing: dict[tuple[int, bool], dict[int, _Standing]] = {}

    def judge(self, history: History) -> list[Fault]:
        """The faults that stand now, confirmed ones first. ``history``: of the world of the layout."""
        if history.world_size != len(self._nodes):
            raise InvalidRequest(f"a history of {history.world_size} ranks, a layout of {len(self._nodes)}")
        if history.generation != self._generation:  # steps count anew: those judged before have other numbers
            self._generation = history.generation
            self._judged_until.clear()
            self._standing.clear()
        judged = history.judged_steps()
        for scale in self._thresholds.scales:
            for steps in self._due(scale, judged):
                self._judge_window(history, scale, steps)
        return faults_of(self._verdicts(), self._nodes, self._thresholds)

    def _due(self, scale: Scale, judged: Ids) -> Iterator[Ids]:
        """The windows of a scale that are complete and not judged."""
        until = self._judged_until.get(scale.window_steps)
        seen = 0 if until is None else int(np.searchsorted(judged, until, "right"))
        first = max(scale.window_steps, 0 if until is None else seen + scale.stride_steps)
        for end in range(first, len(judged) + 1, scale.stride_steps):
            self._judged_until[scale.window_steps] = int(judged[end - 1])
            yield judged[end - scale.window_steps : end]

    def _judge_window(self, history: History, scale: Scale, steps: Ids) -> None:
        values = window_values(history.self_s(steps), scale.is_fast)
        lengths = history.length_s(steps[-1:])
        floor_s = self._thresholds.floor_share * float(np.nanmedian(lengths)) if np.isfinite(lengths).any() else 0.0
        comparisons = self._compare(values, floor_s)
        # However many there are, only those count that this window knows of.
        most_peers = np.maximum(comparisons[0].scores.peers, comparisons[1].scores.peers)
        flags = [self._flag(scale, comparison, most_peers) for comparison in comparisons]
        flags = self._with_same_node(scale, comparisons, flags)
        found = self._findings(history, steps, values, comparisons, flags)
        self._stand((scale.window_steps, False), scale.in_a_row, found)
        if scale.window_steps == _TEN:
            if self._has_few:
                self._baseline.learn(values, np.logical_or.reduce(flags))
            if self._windows_of_ten % 2 == 0:
                drifting = [self._drifting(comparison, int(steps[0])) for comparison in comparisons]
                self._judge_drift(history, steps, values, comparisons, drifting)
            self._windows_of_ten += 1

    # --- who is above whom ---------------------------------------------------------------------------------------
    def _compare(self, values: Values, floor_s: float) -> list[Comparison]:
        one = np.ones(len(values))
        program = Comparison("program", self._program, one, score(values, self._program, floor_s), self._program)
        data = Comparison("data", self._data, one, score(values, self._data, floor_s), self._data)
        comparisons = [data, program]
        if self._replica is not None:
            # What the data of a replica costs shows in all of its stages, a slow device in its own.
            unit = np.where(program.scores.peers >= MANY, program.scores.reference, np.nan)
            scores = score(values / unit, self._replica, floor_s / unit)
            comparisons.append(Comparison("replica", self._replica, unit, scores, self._program))
        if self._has_few:
            unit = self._baseline.typical_s()
            scores = score(values / unit, self._world, floor_s / unit)
            comparisons.append(Comparison("own history", self._world, unit, scores, None))
        return comparisons

    def _flag(self, scale: Scale, comparison: Comparison, most_peers: Ids) -> Flags:
        scores = comparison.scores
        calibration = self._calibrations.setdefault((scale.window_steps, comparison.name), Calibration(scale.z))
        with np.errstate(invalid="ignore"):
            is_above = (scores.z > calibration.z) & (scores.rho > scale.rho)
            is_far = scores.rho > scale.few_rho
        if comparison.expected_by is None:
            # Pasts differ between ranks that do different work: only for those that have nobody else.
            return np.asarray(is_far & (is_above | ~np.isfinite(scores.z)) & (most_peers < 2))
        if not is_above.any() and np.isfinite(scores.z).any():
            top = int(np.nanargmax(scores.z))
            calibration.learn(float(scores.z[top]), self._nodes[top] or str(top))
        is_few = (scores.peers < MANY) & (most_peers < MANY)
        return np.asarray(np.where(is_few, is_far, is_above))

    def _with_same_node(self, scale: Scale, comparisons: list[Comparison], flags: list[Flags]) -> list[Flags]:
        """Also the ranks of a node that are less clearly above, where half of the node is."""
        is_above = np.logical_or.reduce(flags)
        if not is_above.any():
            return flags
        on_node = np.bincount(self._node_of, is_above) / np.bincount(self._node_of)
        is_near = (on_node >= self._thresholds.same_node_share)[self._node_of] & self._has_node
        with np.errstate(invalid="ignore"):
            return [
                flag | is_near & (c.scores.z > self._thresholds.same_node_z) & (c.scores.rho > scale.rho / 2)
                for c, flag in zip(comparisons, flags, strict=True)
            ]

    def _drifting(self, comparison: Comparison, first_step: int) -> Flags:
        if comparison.expected_by is not comparison.sets:
            return np.zeros(len(self._nodes), np.bool_)
        drift = self._drifts.setdefault(comparison.name, Drift(len(self._nodes), self._thresholds))
        return drift.take(comparison.scores, first_step)

    # --- a closer look -------------------------------------------------------------------------------------------
    def _findings(
        self, history: History, steps: Ids, values: Values, comparisons: list[Comparison], flags: list[Flags]
    ) -> list[Finding]:
        """Of the ranks that are flagged in any comparison, those with the largest excess, by the one that shows it
        most clearly; without those that are above in a few steps only."""
        is_flagged = np.stack(flags)
        scores = [comparison.scores for comparison in comparisons]
        above_s = np.stack([c.unit * c.scores.reference * c.scores.rho for c in comparisons])
        largest_s = np.where(is_flagged, above_s, -np.inf).max(axis=0)
        clearness = np.stack([np.where(np.isfinite(s.z), s.z, s.rho) for s in scores])
        clearest = np.where(is_flagged, clearness, -np.inf).argmax(axis=0)
        chosen = np.argsort(-largest_s, kind="stable")[: min(MOST_FINDINGS, int((largest_s > -np.inf).sum()))]
        findings = []
        for rank in chosen.tolist():
            comparison = comparisons[int(clearest[rank])]
            rho = float(comparison.scores.rho[rank])
            if steady_share(history, steps, rank, comparison, rho) < self._thresholds.steady_share:
                continue
            found = self._finding(history, steps, rank, float(values[rank]), comparison)
            is_restless = np.isnan(comparison.scores.z[rank]) and found.z < self._thresholds.z
            if not is_restless:
                findings.append(self._weigh(found, comparisons))
        return findings

    def _finding(self, history: History, steps: Ids, rank: int, value_s: float, comparison: Comparison) -> Finding:
        scores = comparison.scores
        spread, places = spread_of(history, steps, rank, comparison, self._thresholds)
        is_localised = spread < self._thresholds.spread_share
        z = float(scores.z[rank])
        if not np.isfinite(z):
            z = z_in_time(history, steps, rank, comparison)
        return Finding(
            rank=rank,
            cause=Cause.LOCALISED if is_localised else Cause.DEVICE,
            peers=comparison.name,
            peer_count=int(scores.peers[rank]) - 1,
            window_steps=len(steps),
            first_step=int(steps[0]),
            last_step=int(steps[-1]),
            z=z,
            rho=float(scores.rho[rank]),
            self_s=value_s,
            median_s=float(scores.reference[rank] * comparison.unit[rank]),
            spread=spread,
            places=places,
            weakness="only part of the program is slower" if is_localised else "",
        )

    def _weigh(self, found: Finding, comparisons: list[Comparison]) -> Finding:
        """What else is known of the rank that makes the finding weaker."""
        names = [comparison.name for comparison in comparisons]
        if found.peers == "program" and self._is_of_the_data(found, comparisons[names.index("program")]):
            return replace(found, cause=Cause.DATA, weakness="all ranks that work on the same data are slower")
        if found.peers == "own history":
            weakness = "" if found.peer_count + 1 >= MANY else "too few ranks to tell it from a change of the work"
            return replace(
                found, caution="nobody else runs its part of the program", weakness=found.weakness or weakness
            )
        if found.peer_count + 1 >= MANY:
            return found
        return self._weigh_few(found, comparisons[names.index("own history")])

    def _weigh_few(self, found: Finding, own: Comparison) -> Finding:
        """Of two or three ranks the slower one counts when it was not so before, or when all of it is far slower."""
        caution = f"only {found.peer_count} to compare with"
        change = float(own.scores.rho[found.rank])
        if np.isfinite(change):
            weakness = "" if change > self._thresholds.few_rho else "it was slower than the others before"
        else:
            is_plain = found.rho > self._thresholds.fast_rho and np.isfinite(found.spread)
            weakness = "" if is_plain else "nothing is known of how it was before"
        if not np.isfinite(found.z):
            weakness = "too few steps to know how much they vary"
        return replace(found, caution=caution, weakness=found.weakness or weakness)

    def _is_of_the_data(self, found: Finding, program: Comparison) -> bool:
        """Whether all that work on the rank's data are slower, and they are not just the ranks of one node."""
        if self._layout.replica is None:
            return False
        same = np.flatnonzero(self._layout.replica == self._layout.replica[found.rank])
        if self._layout.replica[found.rank] < 0 or np.nanpercentile(program.scores.rho[same], 25) < found.rho / 2:
            return False
        node = self._nodes[found.rank]
        on_node = {rank for rank, name in enumerate(self._nodes) if name == node}
        return not (node and set(same.tolist()) >= on_node and {self._nodes[rank] for rank in same.tolist()} == {node})

    # --- what stands ---------------------------------------------------------------------------------------------
    def _judge_drift(
        self, history: History, steps: Ids, values: Values, comparisons: list[Comparison], drifting: list[Flags]
    ) -> None:
        found = []
        for finding in self._findings(history, steps, values, comparisons, drifting):
            cause = Cause.DRIFT if finding.cause is Cause.DEVICE else finding.cause
            since = self._drifts[finding.peers].since(finding.rank)
            found.append(replace(finding, cause=cause, first_step=since))
        self._stand((len(steps), True), _DRIFT_WINDOWS, found)

    def _stand(self, key: tuple[int, bool], in_a_row: int, findings: list[Finding]) -> None:
        """One more window of a kind: who is still in it, and who for the first time."""
        before = self._standing.get(key, {})
        largest_s = max((finding.excess_s for finding in findings if not finding.weakness), default=0.0)
        standing = {}
        for finding in findings:
            last = before.get(finding.rank)
            if not finding.weakness and finding.excess_s < self._thresholds.dominance * largest_s:
                finding = replace(finding, weakness="another rank is slower by far")
            count = 0 if finding.weakness else min(in_a_row, (last.in_a_row if last else 0) + 1)
            standing[finding.rank] = _Standing(finding, last.since_step if last else finding.first_step, count)
        self._standing[key] = standing

    def _verdicts(self) -> list[Verdict]:
        """The strongest of each rank."""
        needed = {(scale.window_steps, False): scale.in_a_row for scale in self._thresholds.scales}
        best: dict[int, Verdict] = {}
        for key, standing in self._standing.items():
            for rank, at in standing.items():
                verdict = Verdict(at.finding, at.since_step, at.in_a_row >= needed.get(key, _DRIFT_WINDOWS))
                if rank not in best or verdict.strength > best[rank].strength:
                    best[rank] = verdict
        return [best[rank] for rank in sorted(best)]
