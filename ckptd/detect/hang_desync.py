"""Ranks that entered different operations under one number of one communicator: a bug of the program.

Layer: inside ``detect``, pure, below ``hang``. Invariant: names no node, since hardware has no part in it. A rank that
skips an operation enters the next under the number that others use for the skipped one; where the two look the same
nothing is seen here, and the rank is found absent at the end.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from ckptd.detect.hang_report import Reason, stop_fault
from ckptd.detect.records import Communicator, Fault, RankState
from ckptd.detect.wait_graph import shown
from ckptd.format.timings import POINT_TO_POINT, Op

_MISMATCHES_SHOWN: Final = 8
_PERIODS: Final = 3  # seen before what comes next is believed
# Their bytes differ between members by right: tokens routed to experts, the root's side of rooted operations.
_UNEVEN: Final = frozenset({Op.ALL_TO_ALL, Op.GATHER, Op.SCATTER, Op.BARRIER, Op.OTHER})

_Signature = tuple[Op, int]
_Number = tuple[str, int]


def judge_desync(
    states: Sequence[RankState], communicators: Mapping[str, Communicator], *, has_failed: bool = False
) -> list[Fault]:
    """One fault for each set of ranks that deviate, by the first number at which each communicator disagrees; only of
    communicators in which a rank waits, unless the job ``has_failed``: then nobody may wait any more. Ranks that agree
    cost a look-up for each of their signatures."""
    open_ones = {p.communicator for state in states for p in state.pending if p.op not in POINT_TO_POINT}
    first: dict[str, int] = {}
    seen: dict[_Number, _Signature] = {}
    for state in states:
        for key, signature in _entered(state):
            known = seen.setdefault(key, signature)
            if known == signature:
                continue
            if known[0] in POINT_TO_POINT:
                seen[key] = signature
            elif (has_failed or key[0] in open_ones) and _differ(known, signature):
                first[key[0]] = min(key[1], first.get(key[0], key[1]))
    found: dict[tuple[int, ...], list[dict[str, Any]]] = defaultdict(list)
    for name, seq in first.items():
        deviants, evidence = _mismatch(name, seq, states)
        found[deviants].append({**evidence, "label": communicators[name].label if name in communicators else ""})
    by_rank = {state.rank: state for state in states}
    return [
        stop_fault(
            Reason.DESYNC, ranks, by_rank, {"mismatches": told[:_MISMATCHES_SHOWN], "mismatches_total": len(told)}
        )
        for ranks, told in sorted(found.items())
    ]


def _expected(name: str, seq: int, states: Sequence[RankState]) -> _Signature | None:
    """What ``seq`` would have been had the program gone on as before: where there is no majority it decides. None when
    nothing repeats in what is known of the operations before it."""
    past: dict[int, _Signature] = {}
    for state in states:
        past |= {number: signature for (group, number), signature in _entered(state) if group == name and number < seq}
    before = [past[number] for number in itertools.takewhile(past.__contains__, range(seq - 1, 0, -1))]
    for period in range(1, len(before) // _PERIODS + 1):
        newest = before[: _PERIODS * period]  # the start of a job is not like the rest
        if all(one == other for one, other in zip(newest, newest[period:], strict=False)):
            op, size_bytes = before[period - 1]
            return op, 0 if op in _UNEVEN else size_bytes
    return None


def _entered(state: RankState) -> Iterator[tuple[_Number, _Signature]]:
    yield from state.signatures.items()
    for pending in state.pending:
        yield (pending.communicator, pending.seq), (pending.op, pending.size_bytes)


def _differ(one: _Signature, other: _Signature) -> bool:
    if one[0] in POINT_TO_POINT or other[0] in POINT_TO_POINT:
        return False  # numbered apart
    return one[0] is not other[0] or (one[1] != other[1] and one[0] not in _UNEVEN)


def _mismatch(name: str, seq: int, states: Sequence[RankState]) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Who deviates from the majority at ``seq``, all when there is none; and who entered what, where."""
    by_signature: dict[_Signature, list[int]] = defaultdict(list)
    for state in sorted(states, key=lambda state: state.rank):
        for op, size_bytes in {signature for key, signature in _entered(state) if key == (name, seq)}:
            if op not in POINT_TO_POINT:
                by_signature[op, 0 if op in _UNEVEN else size_bytes].append(state.rank)
    most = max(by_signature.values(), key=len)
    total = sum(map(len, by_signature.values()))
    if 2 * len(most) <= total and (expected := _expected(name, seq, states)) in by_signature:
        most, total = by_signature[expected], 0
    deviants = [r for ranks in by_signature.values() if ranks is not most or 2 * len(most) <= total for r in ranks]
    where = {s.rank: p.where for s in states for p in s.pending if (p.communicator, p.seq) == (name, seq) and p.where}
    told = [
        {
            "operation": op.label,
            "size_bytes": size_bytes,
            **shown(ranks),
            "where": next((where[rank] for rank in ranks if rank in where), ""),
        }
        for (op, size_bytes), ranks in sorted(by_signature.items(), key=lambda item: len(item[1]))
    ]
    return tuple(sorted(deviants)), {"communicator": name, "seq": seq, "signatures": told}
