"""How a stall is told: the reasons a rank may be named for, and the fault with what a person can check.

Layer: inside ``detect``, pure, below ``hang``. Invariant: evidence stays small however large the job is; ranks and
waits are shown up to a bound, with their totals.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, Final

from ckptd.detect.records import Confidence, Fault, Kind, RankState
from ckptd.detect.wait_graph import RANKS_SHOWN
from ckptd.errors import few

_COUNTS_SHOWN: Final = 4


class Reason(StrEnum):
    """The argument by which a rank is named: ``reason`` of the evidence."""

    DEAD = "dead"
    LEFT = "left"
    SILENT = "silent"
    ABSENT = "absent"
    STUCK = "stuck"
    UNHEARD = "unheard"
    BEHIND = "behind"
    CYCLE = "cycle"
    CLOSED = "closed"
    DESYNC = "desync"


_SUMMARY: Final = {
    Reason.DEAD: "{} died",
    Reason.LEFT: "{} left the job while others wait in operations of it",
    Reason.SILENT: "no heartbeat from {} while others wait: stopped, or the host is lost",
    Reason.ABSENT: "{} did not enter an operation that others wait in, while waiting for nobody",
    Reason.STUCK: "{} did not finish an operation that another member finished: stuck in the device or its stream",
    Reason.UNHEARD: "nothing is known of {} while others wait: dead, stopped, or never started",
    Reason.BEHIND: "{} stopped at a point that peers passed while waiting for the same operations",
    Reason.CYCLE: "{} wait for each other: the program enters operations in different orders",
    Reason.CLOSED: "{} all entered an operation that none of them finished: what connects them",
    Reason.DESYNC: "{} entered something else than others under the same number: the program, not the hardware",
}
CERTAIN: Final = frozenset({Reason.DEAD, Reason.LEFT, Reason.SILENT, Reason.ABSENT, Reason.STUCK})
_PROGRAM: Final = frozenset({Reason.CYCLE, Reason.DESYNC})
_KIND: Final = {
    Reason.DEAD: Kind.DEATH,
    Reason.CLOSED: Kind.COMM_HANG,
    Reason.CYCLE: Kind.DESYNC,
    Reason.DESYNC: Kind.DESYNC,
}


def by_node(roots: Mapping[int, Reason], states: Mapping[int, RankState]) -> list[tuple[Reason, list[int]]]:
    """Ranks named for one reason on one node are one fault; of unknown nodes, and of the program, all together."""
    order = list(Reason)
    found: dict[tuple[int, str], list[int]] = defaultdict(list)
    for rank, reason in sorted(roots.items()):
        node = states[rank].node if rank in states and reason not in _PROGRAM else ""
        found[order.index(reason), node].append(rank)
    return [(order[index], ranks) for (index, _), ranks in sorted(found.items())]


def stop_fault(
    reason: Reason,
    ranks: Sequence[int],
    states: Mapping[int, RankState],
    evidence: Mapping[str, Any],
    is_certain: bool = True,
) -> Fault:
    """The fault that names ``ranks`` for ``reason``; ``evidence`` is put behind what all such faults have."""
    known = [states[rank] for rank in ranks if rank in states]
    last = max((state.step for state in states.values()), default=-1)
    about: dict[str, Any] = {
        "summary": _SUMMARY[reason].format(f"rank{'s' if len(ranks) > 1 else ''} {few(ranks, RANKS_SHOWN)}"),
        "reason": reason.value,
        "silent_s": {str(state.rank): state.silent_s for state in known[:RANKS_SHOWN] if state.silent_s},
        "stacks": {str(state.rank): state.stack for state in known[:RANKS_SHOWN] if state.stack},
        "counts": {str(state.rank): _counts(state) for state in known[:_COUNTS_SHOWN] if state.counts},
    }
    return Fault(
        _KIND.get(reason, Kind.HANG),
        tuple(ranks),
        () if reason in _PROGRAM else tuple(sorted({state.node for state in known if state.node})),
        Confidence.CONFIRMED if is_certain else Confidence.SUSPECT,
        last + 1 if last >= 0 else -1,
        {**{name: value for name, value in about.items() if value}, **evidence},
    )


def _counts(state: RankState) -> dict[str, list[int]]:
    return {name: [count.enqueued, count.completed] for name, count in state.counts.items()}
