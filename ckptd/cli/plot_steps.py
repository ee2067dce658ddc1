"""The heat map of self time, ranks by steps, drawn. Layer: ``cli``, below ``plot``.

Invariants: what a fault names is drawn and named whatever the size of the job: of many rows those that stand out are
drawn by name above all others, and where rows of those are folded the largest value is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ckptd.cli.plot_style import COLOURS, FLAGGED, PLAIN, UNKNOWN, Panel, Rect, counted, scale, short

Floats = npt.NDArray[np.float64]

_NAMED_ROWS: Final = 48  # more are folded, and the worst drawn apart
_WORST_ROWS: Final = 10
_FOLDED_ROWS: Final = 256
_LEAST_PERCENT: Final = 10.0  # what the ends of the scale stand for at least: noise stays pale
_MOST_PERCENT: Final = 200.0
_MARKS: Final = 12
_TICKS: Final = 10
_SCALE: Final = (0.945, 0.01)  # left and width


@dataclass(frozen=True)
class Heat:
    """``percent``: the excess, rows x steps. ``limit``: what the ends of the scale stand for. ``since``: of ranks that
    a fault names as slow, the first step it speaks of."""

    data: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    percent: Floats
    limit: float
    since: Mapping[int, int]

    @classmethod
    def of(cls, data: Mapping[str, Any], since: Mapping[int, int]) -> Heat:
        permille = [[np.nan if value is None else value for value in row] for row in data["excess_permille"]]
        upper = max((row["upper_excess_permille"] or 0 for row in data["rows"]), default=0) / 10
        limit = min(max(1.1 * upper, _LEAST_PERCENT), _MOST_PERCENT)
        return cls(data, data["rows"], np.array(permille, np.float64) / 10, limit, since)

    @property
    def steps(self) -> list[int]:
        return list(self.data["steps"])

    def worst(self, most: int) -> Heat:
        """The rows that faults name, then those furthest above their peers."""

        def order(at: int) -> tuple[bool, float]:
            row = self.rows[at]
            return not row["flagged"]["ranks"], -(row["upper_excess_permille"] or 0)

        kept = sorted(sorted(range(len(self.rows)), key=order)[:most])
        return replace(self, rows=[self.rows[at] for at in kept], percent=self.percent[kept])

    def show(self, axes: Axes, values: Floats) -> None:
        """``values`` as an image, steps below it and their masks above."""
        axes.imshow(values, COLOURS, aspect="auto", interpolation="nearest", vmin=-self.limit, vmax=self.limit)
        axes.set_facecolor(UNKNOWN)
        ticks = self._ticks()
        axes.set_xticks(ticks, [str(self.steps[at]) for at in ticks], fontsize=8)
        columns = {step: at for at, step in enumerate(self.steps)}
        masked = self.data["masked_steps"]
        axes.plot([columns[item["step"]] for item in masked], [-0.5] * len(masked), "v", color=PLAIN, clip_on=False)
        reasons = sorted({mask for item in masked for mask in item["masks"]})
        told = f"; triangles: masked on most ranks ({', '.join(reasons)})" if reasons else ""
        axes.set_xlabel(f"steps {self.steps[0]} to {self.steps[-1]}; grey: masked or absent{told}", fontsize=9)

    def _ticks(self) -> list[int]:
        """Where round numbers are, else evenly."""
        steps = np.array(self.steps)
        pace = max(1.0, (steps[-1] - steps[0]) / _TICKS)
        unit = 10 ** np.floor(np.log10(pace))
        stride = int(unit * min(each for each in (1, 2, 5, 10) if unit * each >= pace))
        round_ones = np.flatnonzero(steps % stride == 0)
        evenly = np.unique(np.linspace(0, len(steps) - 1, _TICKS).astype(np.int64))
        return [int(at) for at in (round_ones if len(round_ones) > _TICKS // 3 else evenly)]


def steps_panels(document: Mapping[str, Any]) -> list[Panel]:
    """One panel of few rows; of many, the worst by name and all of them."""
    slow = [fault for fault in document["faults"] if fault["kind"] == "slow_compute"]
    heat = Heat.of(document["steps"], {rank: fault["since_step"] for fault in slow for rank in fault["ranks"]})
    if len(heat.rows) <= _NAMED_ROWS:
        return [NamedRows(heat)]
    return [NamedRows(heat.worst(_WORST_ROWS)), AllRows(heat)]


@dataclass(frozen=True)
class NamedRows:
    """Rows by name; those that a fault names as slow are outlined from its first step on."""

    heat: Heat
    below_in: float = 0.6

    @property
    def height_in(self) -> float:
        return max(1.2, min(0.3 * len(self.heat.rows), 8.0))

    def draw(self, figure: Figure, rect: Rect) -> None:
        heat = self.heat
        axes = figure.add_axes(rect)
        heat.show(axes, heat.percent)
        axes.set_title(self._title(), fontsize=10, loc="left")
        axes.set_yticks(range(len(heat.rows)), [_name(row) for row in heat.rows], fontsize=8)
        beside = axes.get_yaxis_transform()
        axes.text(1.005, -0.95, "median", transform=beside, fontsize=8, color=PLAIN)
        for at, row in enumerate(heat.rows):
            told = "-" if row["self_s"] is None else f"{row['self_s']:.3g} s"
            flagged = row["flagged"]["ranks"]
            colour, weight = (FLAGGED, "bold") if flagged else (PLAIN, "normal")
            axes.text(1.005, at, told, transform=beside, fontsize=8, va="center", color=colour, weight=weight)
            axes.get_yticklabels()[at].set(color=colour, weight=weight)
            if slow := [rank for rank in flagged if rank in heat.since]:
                self._outline(axes, at, heat.since[slow[0]])
        scale(figure, (_SCALE[0], rect[1], _SCALE[1], rect[3]), heat.limit, "%")

    def _title(self) -> str:
        has_peers = self.heat.data["has_peers"]
        above = "the median of ranks that run the same program" if has_peers else "the rank's own median"
        total = len(self.heat.data["rows"])
        which = f"; {len(self.heat.rows)} of {total:,} rows, the furthest above" if total > len(self.heat.rows) else ""
        return f"self time of steps (without communication), % above {above}{which}"

    def _outline(self, axes: Axes, at: int, since: int) -> None:
        begin = int(np.searchsorted(self.heat.steps, since))
        width = max(1, len(self.heat.steps) - begin)
        axes.add_patch(Rectangle((begin - 0.5, at - 0.5), width, 1, fill=False, edgecolor="black", linewidth=1.3))


@dataclass(frozen=True)
class AllRows:
    """All rows, folded to as many as can be seen."""

    heat: Heat
    height_in: float = 4.2
    below_in: float = 0.6

    def draw(self, figure: Figure, rect: Rect) -> None:
        heat = self.heat
        together = -(-len(heat.rows) // _FOLDED_ROWS)
        starts = np.arange(0, len(heat.rows), together)
        axes = figure.add_axes(rect)
        heat.show(axes, np.fmax.reduceat(heat.percent, starts, axis=0))
        seen = counted("rank", sum(row["ranks_total"] for row in heat.rows))
        ranks_a_line = -(-sum(row["ranks_total"] for row in heat.rows) // len(starts))
        folded = f", a line shows the largest of {ranks_a_line}" if ranks_a_line > 1 else ""
        axes.set_title(f"the same of all {seen}{folded}", fontsize=10, loc="left")
        ticks = np.unique(np.linspace(0, len(starts) - 1, _TICKS).astype(np.int64)).tolist()
        axes.set_yticks(ticks, [f"rank {heat.rows[starts[at]]['ranks'][0]}" for at in ticks], fontsize=8)
        flagged = [(at, row["flagged"]["ranks"][0]) for at, row in enumerate(heat.rows) if row["flagged"]["ranks"]]
        style: dict[str, Any] = {"color": FLAGGED, "weight": "bold", "fontsize": 9, "va": "center"}
        for at, rank in flagged[:_MARKS]:
            axes.text(1.003, at // together, f"\u25c4 {rank}", transform=axes.get_yaxis_transform(), **style)
        scale(figure, (_SCALE[0], rect[1], _SCALE[1], rect[3]), heat.limit, "%")


def _name(row: Mapping[str, Any]) -> str:
    """A row of several ranks by the one that a fault names, or that is furthest above."""
    named = row["flagged"]["ranks"][0] if row["flagged"]["ranks"] else row["worst_rank"]
    return short(f"rank {named}  {row['node']}".rstrip())
