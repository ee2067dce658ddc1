"""What the judge sees of a job, as plain data to draw: self time by rank and step, who waits for whom, the links.

Layer: ``detect``, pure. Invariants: JSON values only, at most ``MOST_BYTES`` of them for a job of any size, with the
total beside whatever is cut off; ranks and nodes that stand out are never among what is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ckptd.detect.history import Masks, Matrix
from ckptd.detect.judge import Judge
from ckptd.detect.layout import Ids, Layout
from ckptd.detect.links import LinkMatrix
from ckptd.detect.picture_steps import MOST_STEPS, picture_of_steps
from ckptd.detect.picture_waits import picture_of_waits
from ckptd.detect.records import Communicator, Fault, RankState
from ckptd.detect.wait_graph import shown

FORMAT: Final = "ckptd-pictures"
VERSION: Final = 1
MOST_BYTES: Final = 2 << 20
_MOST_CELLS: Final = 4096
_MOST_MATRICES: Final = 5
_MOST_FAULTS: Final = 32
_NODES_SHOWN: Final = 16


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """All that is drawn, at one moment; nothing of it changes when the judge goes on. ``self_s`` and ``masks``: ranks
    x ``steps``."""

    nodes: tuple[str, ...]
    layout: Layout | None
    steps: Ids
    self_s: Matrix
    masks: Masks
    matrices: tuple[LinkMatrix, ...]
    states: tuple[RankState, ...]
    communicators: Mapping[str, Communicator]
    faults: tuple[Fault, ...]

    @classmethod
    def of(
        cls,
        judge: Judge,
        states: Sequence[RankState],
        communicators: Mapping[str, Communicator],
        faults: Sequence[Fault],
    ) -> Scene:
        steps = judge.history.held_steps()[-MOST_STEPS:]
        return cls(
            judge.nodes,
            judge.layout,
            steps,
            judge.history.self_s(steps),
            judge.history.masks(steps),
            judge.matrices,
            tuple(states),
            dict(communicators),
            tuple(faults),
        )


def pictures(scene: Scene, run: str = "", incarnation: str = "") -> dict[str, Any]:
    """``steps``, ``waits`` and ``links`` of the scene, each empty when there is nothing to draw, and the faults."""
    roots = {rank for fault in scene.faults for rank in fault.ranks}
    return {
        "format": FORMAT,
        "version": VERSION,
        "run": run,
        "incarnation": incarnation,
        "world_size": len(scene.nodes),
        "nodes_total": len({node for node in scene.nodes if node}),
        "faults": [_fault(fault) for fault in scene.faults[:_MOST_FAULTS]],
        "faults_total": len(scene.faults),
        "steps": picture_of_steps(scene.steps, scene.self_s, scene.masks, scene.layout, scene.nodes, roots),
        "waits": picture_of_waits(scene.states, scene.communicators, scene.faults),
        "links": [picture_of_links(matrix) for matrix in _distinct(scene.matrices)[:_MOST_MATRICES]],
    }


def encode(document: Mapping[str, Any]) -> bytes:
    """``document`` as the JSON that goes over the wire and into files."""
    return json.dumps(document, separators=(",", ":"), allow_nan=False).encode()


def has_something(document: Mapping[str, Any]) -> bool:
    """Whether there is anything to draw."""
    return bool(document["steps"] or document["waits"] or document["links"])


def picture_of_links(matrix: LinkMatrix) -> dict[str, Any]:
    """A link matrix by its used cells; of many all flagged ones and the slowest others. ``log2_ratio``: to the lower
    median of all, or to 1 where that is known to be normal."""
    layer = matrix.layer
    normal = 1.0 if layer.is_relative else float(np.sort(layer.values)[(layer.values.size - 1) // 2])
    ratios = np.log2(layer.values / normal)
    kept = np.sort(np.lexsort((-ratios, ~matrix.is_slow))[:_MOST_CELLS])
    places = np.unique(np.concatenate([layer.src[kept], layer.dst[kept]]))
    return {
        "figure": layer.figure,
        "unit": layer.unit,
        "places_are": "ranks" if layer.is_of_ranks else "nodes",
        "places": [layer.places[at] for at in places.tolist()],
        "places_total": int(np.unique(np.concatenate([layer.src, layer.dst])).size),
        "normal": float(f"{normal:.4g}"),
        "src": np.searchsorted(places, layer.src[kept]).tolist(),
        "dst": np.searchsorted(places, layer.dst[kept]).tolist(),
        "values": [float(f"{value:.4g}") for value in layer.values[kept].tolist()],
        "log2_ratio": [round(ratio, 2) for ratio in ratios[kept].tolist()],
        "flagged": np.flatnonzero(matrix.is_slow[kept]).tolist(),
        "cells_total": int(layer.values.size),
        "findings": [
            {
                "side": slow.side.value,
                "places": [layer.places[place] for place in slow.places],
                "ratio": round(slow.ratio, 3),
                "is_separable": slow.is_separable,
            }
            for slow in matrix.findings[:_NODES_SHOWN]
        ],
    }


def _distinct(matrices: Sequence[LinkMatrix]) -> list[LinkMatrix]:
    """Those that show most first; of a figure between ranks and between nodes the latter, which is what is mended."""
    of_nodes = {matrix.layer.figure for matrix in matrices if not matrix.layer.is_of_ranks}
    kept = [matrix for matrix in matrices if not matrix.layer.is_of_ranks or matrix.layer.figure not in of_nodes]
    return sorted(kept, key=lambda matrix: -max((slow.ratio for slow in matrix.findings), default=0.0))


def _fault(fault: Fault) -> dict[str, Any]:
    return {
        "kind": fault.kind.value,
        **shown(fault.ranks),
        "nodes": list(fault.nodes[:_NODES_SHOWN]),
        "nodes_total": len(fault.nodes),
        "confidence": fault.confidence.value,
        "since_step": fault.since_step,
        "summary": str(fault.evidence.get("summary", "")),
    }
