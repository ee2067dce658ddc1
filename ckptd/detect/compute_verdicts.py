"""Findings of ranks as faults: a whole node where most of its ranks are slow, else each rank by itself.

Layer: ``detect``, pure.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ckptd.detect.compute_findings import Cause, Finding
from ckptd.detect.compute_thresholds import Thresholds
from ckptd.detect.records import Confidence, Fault, Kind


@dataclass(frozen=True, slots=True)
class Verdict:
    """What stands of one rank."""

    finding: Finding
    since_step: int
    is_confirmed: bool

    @property
    def strength(self) -> tuple[bool, bool, bool, float]:
        found = self.finding
        return self.is_confirmed, not found.weakness, found.cause is not Cause.DRIFT, found.excess_s


def faults_of(verdicts: Sequence[Verdict], nodes: Sequence[str], thresholds: Thresholds) -> list[Fault]:
    """Confirmed faults first, the largest excess first."""
    of_the_data = [verdict for verdict in verdicts if verdict.finding.cause is Cause.DATA]
    faults = [_fault(of_the_data, "", is_node=False)] if of_the_data else []
    by_node: dict[str, list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        if verdict.finding.cause is not Cause.DATA:
            by_node[nodes[verdict.finding.rank]].append(verdict)
    for node, found in by_node.items():
        if _is_node(found, sum(name == node for name in nodes), thresholds) and node:
            faults.append(_fault(found, node))
        else:
            faults += [_fault([verdict], node, is_node=False) for verdict in found]
    return sorted(faults, key=lambda f: (f.confidence is not Confidence.CONFIRMED, -f.evidence["excess_s"], f.ranks))


def _is_node(found: Sequence[Verdict], ranks_on_node: int, thresholds: Thresholds) -> bool:
    """Whether most ranks of the node are slow, for a reason that a node can have."""
    hardware = [v for v in found if v.finding.cause in (Cause.DEVICE, Cause.DRIFT)]
    return ranks_on_node > 1 and len(hardware) == len(found) >= thresholds.node_share * ranks_on_node


def _fault(found: Sequence[Verdict], node: str, is_node: bool = True) -> Fault:
    worst = max(found, key=lambda verdict: verdict.strength)
    # Half of them: the others follow, or are those that the windows just missed.
    is_confirmed = 2 * sum(verdict.is_confirmed for verdict in found) >= len(found)
    return Fault(
        kind=Kind.SLOW_COMPUTE,
        ranks=tuple(sorted(verdict.finding.rank for verdict in found)),
        nodes=(node,) if is_node else (),
        confidence=Confidence.CONFIRMED if is_confirmed else Confidence.SUSPECT,
        since_step=min(verdict.since_step for verdict in found),
        evidence=_evidence(worst.finding, node, len(found) if is_node else 0),
    )


def with_places(fault: Fault, names: Sequence[str]) -> Fault:
    """The fault, with what its positions are called. ``names``: (POSITIONS,), "" unknown."""
    if "worst_positions" not in fault.evidence:
        return fault
    places = [{**place, "name": names[place["position"]]} for place in fault.evidence["worst_positions"]]
    return replace(fault, evidence={**fault.evidence, "worst_positions": places})


def _evidence(finding: Finding, node: str, slow_on_node: int) -> dict[str, Any]:
    evidence: dict[str, Any] = {
        "summary": _summary(finding, node, slow_on_node),
        "class": f"node: {finding.cause}" if slow_on_node else str(finding.cause),
        "rank": finding.rank,
        "node": node,
        "peers": finding.peers,
        "peer_count": finding.peer_count,
        "window_steps": finding.window_steps,
        "window": [finding.first_step, finding.last_step],
        "rho": round(finding.rho, 4),
        "z": round(finding.z, 2) if np.isfinite(finding.z) else None,
        "self_s": finding.self_s,
        "median_s": finding.median_s,
        "excess_s": finding.excess_s,
        "spread_share": round(finding.spread, 3) if np.isfinite(finding.spread) else None,
        "worst_positions": [
            {"position": place.position, "self_s": place.self_s, "expected_s": place.expected_s}
            for place in finding.places
        ],
    }
    if finding.weakness:
        evidence["weakness"] = finding.weakness
    if finding.caution:
        evidence["low_confidence"] = finding.caution
    return evidence


def _summary(finding: Finding, node: str, slow_on_node: int) -> str:
    others = "1 rank" if finding.peer_count == 1 else f"{finding.peer_count} ranks"
    who = f"{slow_on_node} ranks of node {node}, rank {finding.rank} most," if slow_on_node else f"rank {finding.rank}"
    verb = "compute" if slow_on_node else "computes"
    against = {
        "program": f"{others} of the same program",
        "data": f"{others} with the same data",
        "replica": "what its data costs in other stages",
        "own history": "its own past and that of the others",
    }[finding.peers]
    extra = {
        Cause.LOCALISED: ", but only in part of the program: rather software than the device",
        Cause.DATA: ", like all that work on the same data: rather the data than the device",
        Cause.DRIFT: ", growing since it was first seen",
    }.get(finding.cause, "")
    return (
        f"{who} {verb} {finding.self_s:.4g} s a step, {100 * finding.rho:.1f} % more than {against}"
        f" ({finding.median_s:.4g} s) over {finding.window_steps} steps{extra}"
    )
