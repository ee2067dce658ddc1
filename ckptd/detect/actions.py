"""What may be done about a fault, and how often: the limits of ``--on-fault``. Pure.

The rule is asked by the analyst before it acts, and again by whoever records the action before it runs, so that two
analysts that do not see each other cannot both spend what is allowed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

from ckptd.detect.faultlog import RANKING
from ckptd.detect.records import Confidence, Fault, Kind
from ckptd.model import Action

EVERY_S: Final = 3600.0
SHARE: Final = 0.02
# Nobody's hardware: a program that disagrees with itself does so again on other nodes.
_NEVER: Final = frozenset({Kind.DESYNC})


class Placed(Protocol):
    """A fault, or a message of one."""

    @property
    def ranks(self) -> Sequence[int]: ...

    @property
    def nodes(self) -> Sequence[str]: ...


def nodes_of(fault: Placed, node_of_rank: Sequence[str]) -> tuple[str, ...]:
    """The nodes that a fault is on: those it names, else those of its ranks."""
    named = fault.nodes or {node_of_rank[rank] for rank in fault.ranks if rank < len(node_of_rank)}
    return tuple(sorted(node for node in named if node))


def calls_for_action(fault: Fault, at_least: Confidence) -> bool:
    """The fault is of a kind that hardware causes, is sure enough, and names somebody."""
    is_sure = RANKING[fault.confidence] >= RANKING[at_least]
    return fault.kind not in _NEVER and is_sure and bool(fault.ranks or fault.nodes)


def refusal(past: Sequence[Action], nodes: Sequence[str], node_count: int, now_s: float) -> str:
    """Why nothing may be done about ``nodes`` now, with ``past`` actions of the run; "" when it may.

    One node an hour; over a run at most 2 % of its ``node_count`` nodes, but one in any.
    """
    if not nodes:
        return "the fault is on no known node"
    if len(nodes) > 1:
        return f"the fault is on {len(nodes)} nodes, and an action is about one"
    touched = {action.node_id for action in past}
    if nodes[0] in touched:
        return f"node {nodes[0]} was acted on before"
    last_s = max((action.at_s for action in past), default=-EVERY_S)
    if now_s - last_s < EVERY_S:
        return f"the last action was {now_s - last_s:.0f} s ago, and at most one node is acted on in {EVERY_S:.0f} s"
    most = max(1, int(SHARE * node_count))
    if len(touched) >= most:
        return f"{len(touched)} of {node_count} nodes were acted on in this run, the most there may be"
    return ""
