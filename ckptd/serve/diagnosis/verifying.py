"""Which open faults a probe verifies: those of a kind that it can show, on nodes among which is what it shows. Pure.

A probe sees nodes and links, never ranks: a fault of one rank among several of a node is not verified by it, and a
fault that covers more nodes than the probe has found guilty is narrowed to those.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ckptd.detect.actions import nodes_of
from ckptd.detect.records import Confidence, Fault, Kind
from ckptd.errors import InvalidRequest
from ckptd_api.v1 import coordinator_pb2 as pb


@dataclass(frozen=True, slots=True)
class ProbeFinding:
    """A node, or the two ends of a link, measured to be slow. ``kinds``: of faults that it can be the cause of."""

    kinds: frozenset[Kind]
    nodes: tuple[str, ...]
    evidence: Mapping[str, Any]


def verified_by(fault: Fault, finding: ProbeFinding, node_of_rank: Sequence[str]) -> Fault | None:
    """``fault`` as verified by ``finding``, at its place; None when they do not agree."""
    if fault.kind not in finding.kinds or not set(finding.nodes) <= set(nodes_of(fault, node_of_rank)):
        return None
    ranks = tuple(rank for rank in fault.ranks if node_of_rank[rank] in finding.nodes)
    if fault.kind is Kind.SLOW_COMPUTE and not _is_of_node(fault, ranks, finding.nodes, node_of_rank):
        return None
    evidence = {**fault.evidence, "probe": dict(finding.evidence)}
    return replace(fault, ranks=ranks, nodes=finding.nodes, confidence=Confidence.VERIFIED, evidence=evidence)


def _is_of_node(fault: Fault, ranks: tuple[int, ...], nodes: tuple[str, ...], node_of_rank: Sequence[str]) -> bool:
    """The fault is the node's, or of every rank there."""
    return fault.nodes == nodes or ranks == tuple(r for r, node in enumerate(node_of_rank) if node in nodes)


def finding_to_pb(finding: ProbeFinding) -> pb.ProbeFinding:
    return pb.ProbeFinding(
        kinds=sorted(finding.kinds), nodes=finding.nodes, evidence=json.dumps(dict(finding.evidence))
    )


def finding_from_pb(message: pb.ProbeFinding) -> ProbeFinding:
    """InvalidRequest on evidence that is no JSON object; kinds that this version does not know are left out."""
    try:
        evidence = json.loads(message.evidence or "{}")
    except ValueError as error:
        raise InvalidRequest(f"evidence of a probe is no JSON: {error}") from error
    if not isinstance(evidence, dict):
        raise InvalidRequest("evidence of a probe is no JSON object")
    known = frozenset(Kind(kind) for kind in message.kinds if kind in set(Kind))
    return ProbeFinding(known, tuple(sorted(message.nodes)), evidence)
