"""Self time of ranks by step, as data for a heat map: how far each rank is above those that run the same program.

Layer: inside ``detect``, pure, below ``pictures``. Invariants: of a bounded size however large the job; where rows
stand for several ranks the largest excess of a step is kept, so that one slow rank among thousands is seen.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ckptd.detect.compute_scores import PeerSets, Values, median_of
from ckptd.detect.history import Masks, Matrix
from ckptd.detect.layout import Ids, Layout
from ckptd.detect.wait_graph import shown
from ckptd.format.timings import Mask

MOST_ROWS: Final = 1024
MOST_STEPS: Final = 192
_MOST_PERMILLE: Final = 9999
_MASKED_SHARE: Final = 0.5  # of the ranks: the step is told as masked
_UPPER: Final = 0.9  # of a rank's steps: above what is a stall now and then, below a fault that began a while ago
_WHAT: Final = (
    "self time of a step (its length without all communication) above the median of the ranks that run the same "
    "program (of two above the faster one), in 0.1 %; null: masked or absent"
)

Floats32 = npt.NDArray[np.float32]


def picture_of_steps(
    steps: Ids, self_s: Matrix, masks: Masks, layout: Layout | None, nodes: Sequence[str], roots: Collection[int]
) -> dict[str, Any] | None:
    """JSON values. ``self_s`` and ``masks``: ranks x steps, as ``History`` gives them; ``roots``: ranks that faults
    name. None without a single time."""
    steps, self_s, masks = steps[-MOST_STEPS:], self_s[:, -MOST_STEPS:], masks[:, -MOST_STEPS:]
    ranks = np.flatnonzero(np.isfinite(self_s).any(axis=1))
    if not len(ranks):
        return None
    excess = excess_of(self_s, layout)
    groups, rows_are = _groups(ranks, layout, nodes)
    order = np.concatenate(groups)
    starts = np.cumsum([0, *map(len, groups[:-1])])
    values = np.fmax.reduceat(excess[order], starts, axis=0)
    return {
        "what": _WHAT,
        "rows_are": rows_are,
        "steps": steps.tolist(),
        "masked_steps": _masked(steps, masks[ranks]),
        "rows": _rows(groups, excess, self_s, nodes, roots),
        "excess_permille": [_permille(row) for row in values],
        "median_self_s": [_seconds(value) for value in median_of(self_s[ranks].T)],
        "has_peers": bool(layout is not None and (layout.program >= 0).any()),
        "ranks_unseen_total": len(self_s) - len(ranks),
    }


def excess_of(self_s: Matrix, layout: Layout | None) -> Floats32:
    """Share above the median of the program peers in the same step, ranks x steps; of two above the faster one, so that
    it does not look as if it were at fault as well; without peers above the rank's own median. NaN: not known."""
    program = np.full(len(self_s), -1, np.int64) if layout is None else layout.program
    sets = PeerSets.of(program)
    reference = np.full(self_s.shape, np.nan, np.float32)
    for block in sets.blocks:
        rows = self_s[block]
        reference[block] = (rows.min(axis=1) if block.shape[1] == 2 else _medians(rows))[:, None]
    alone = sets.size < 2
    if alone.any():
        reference[alone] = median_of(self_s[alone])[:, None]
    reference[reference <= 0] = np.nan
    return np.asarray(self_s / reference - 1, np.float32)


def _medians(rows: Matrix) -> Values:
    """Of sets x ranks x steps, over the ranks."""
    sets, size, steps = rows.shape
    return median_of(rows.transpose(0, 2, 1).reshape(-1, size)).reshape(sets, steps)


def _groups(ranks: Ids, layout: Layout | None, nodes: Sequence[str]) -> tuple[list[Ids], str]:
    """The ranks of each row, and what a row is."""
    if len(ranks) <= MOST_ROWS:
        return [ranks[at : at + 1] for at in range(len(ranks))], "ranks"
    if all(nodes[rank] for rank in ranks.tolist()):
        first: dict[str, int] = {}
        ids, what = np.array([first.setdefault(nodes[rank], len(first)) for rank in ranks.tolist()]), "nodes"
    elif layout is not None and len(np.unique(layout.program[ranks])) > 1:
        ids, what = np.unique(layout.program[ranks], return_inverse=True)[1], "program peers"
    else:
        ids, what = np.arange(len(ranks)), "ranks"
    together = -(-(int(ids.max()) + 1) // MOST_ROWS)
    ids = ids // together
    order = np.argsort(ids, kind="stable")
    groups = np.split(ranks[order], np.flatnonzero(np.diff(ids[order])) + 1)
    return groups, what if together == 1 else f"{together} {what} each"


def _rows(
    groups: Sequence[Ids], excess: Floats32, self_s: Matrix, nodes: Sequence[str], roots: Collection[int]
) -> list[dict[str, Any]]:
    upper, typical = _upper(excess), median_of(self_s)
    rows = []
    for group in groups:
        worst = int(group[np.argmax(np.nan_to_num(upper[group], nan=-np.inf))])
        named = [rank for rank in group.tolist() if rank in roots]
        rows.append(
            {
                **shown(group.tolist()),
                "node": nodes[worst],
                "worst_rank": worst,
                "upper_excess_permille": _permille(upper[worst : worst + 1])[0],
                "self_s": _seconds(typical[worst]),
                "flagged": shown(named),
            }
        )
    return rows


def _upper(excess: Floats32) -> Floats32:
    """What the excess of a rank stays below in most of its steps; NaN without any."""
    ordered = np.sort(excess, axis=1)
    counts = np.isfinite(ordered).sum(axis=1)
    at = (_UPPER * np.maximum(counts - 1, 0)).astype(np.int64)
    return np.asarray(ordered[np.arange(len(ordered)), at])


def _masked(steps: Ids, masks: Masks) -> list[dict[str, Any]]:
    """Steps of which most ranks say the same of why they tell nothing. The newest, that most have not reported yet, are
    incomplete by nature and not told."""
    shares = {mask: (masks & mask.value).astype(bool).mean(axis=0) for mask in Mask if mask}
    reported = np.flatnonzero(shares[Mask.INCOMPLETE] < _MASKED_SHARE)
    shares[Mask.INCOMPLETE][reported[-1] + 1 if len(reported) else 0 :] = 0
    told = []
    for at in np.flatnonzero(np.max(list(shares.values()), axis=0) >= _MASKED_SHARE).tolist():
        names = [str(mask.name).lower() for mask, share in shares.items() if share[at] >= _MASKED_SHARE]
        told.append({"step": int(steps[at]), "masks": names})
    return told


def _permille(row: Floats32) -> list[int | None]:
    whole = np.clip(np.rint(1000 * np.nan_to_num(row, nan=0.0)), -_MOST_PERMILLE, _MOST_PERMILLE).astype(np.int64)
    return [value if known else None for value, known in zip(whole.tolist(), np.isfinite(row).tolist(), strict=True)]


def _seconds(value: float) -> float | None:
    return float(f"{value:.4g}") if np.isfinite(value) else None
