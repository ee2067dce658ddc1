"""Which nodes have slower cores than the others, of what each measured of itself. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median_low

from ckptd.detect.pairing import FACTOR
from ckptd.serve.diagnosis.node_speed import NodeSpeed


@dataclass(frozen=True, slots=True)
class NodeVerdict:
    """``slowdown``: against the median node, by the worse of product and copy."""

    node: str
    slowdown: float


def judge_speeds(speeds: Mapping[str, NodeSpeed], factor: float = FACTOR) -> list[NodeVerdict]:
    """Nodes that take more than ``factor`` of the median node's time; of two nodes, of the faster one's."""
    if not speeds:
        return []
    product_s = median_low(speed.product_s for speed in speeds.values())
    copy_s = median_low(speed.copy_s for speed in speeds.values())
    slowdowns = {
        node: max(speed.product_s / product_s, speed.copy_s / copy_s) for node, speed in sorted(speeds.items())
    }
    return [NodeVerdict(node, slowdown) for node, slowdown in slowdowns.items() if slowdown > factor]
