"""The wait graph of a hang, drawn: roots to the left, whoever waits for them to the right, arrows to who is waited for.

Layer: ``cli``, below ``plot``. Coordinates are inches, so that boxes fit their text at any size of the figure.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from ckptd.cli.plot_style import FLAGGED, Rect, few, short

_COLUMNS: Final = 4
_ROWS: Final = 7  # boxes below each other; more are counted
_BOX_IN: Final = (2.35, 0.78)
_ROW_IN: Final = 1.0
_LINE_IN: Final = 0.17
_SIDES_IN: Final = 0.3
_CHARACTERS: Final = 36
_LABEL_CHARACTERS: Final = 10
_COMMON: Final = re.compile(r"_?(MODEL|PARALLEL|GROUP)(?=_|$)")  # what Megatron puts into every label
_BOW_IN: Final = 0.35
_RANKS_SHOWN: Final = 6
_NODES_SHOWN: Final = 2
_NODES_CHARACTERS: Final = 20
_COLOURS: Final = ("#1f4e9c", "#a0522d", "#2e7d32", "#6a1b9a", "#00838f", "#795548")
REASONS: Final = {
    "dead": "its process died",
    "death": "its process died",
    "left": "left the job",
    "silent": "no heartbeat: stopped, or host lost",
    "absent": "did not come, waits for nobody",
    "stuck": "stuck in what others finished",
    "unheard": "nothing is known of it",
    "behind": "stopped before others did",
    "cycle": "wait for each other",
    "closed": "all entered, none finished",
    "desync": "entered something else",
}
_CONDITIONS: Final = {"dead": "died since", "left": "left since", "silent": "silent", "running": "waits for nobody"}


@dataclass(frozen=True)
class WaitsPanel:
    """``data``: ``waits`` of a document of pictures."""

    data: Mapping[str, Any]
    below_in: float = 0.15

    @property
    def height_in(self) -> float:
        return _ROW_IN * max(len(self._drawn(column)) for column in self._columns) + 0.1

    @cached_property
    def _columns(self) -> list[list[Mapping[str, Any]]]:
        """Groups by how far they are from a root; last those further than can be drawn, and those that lead to none."""
        last = min(max((group["hops_from_root"] or 0 for group in self.data["groups"]), default=0), _COLUMNS - 1)
        columns: list[list[Mapping[str, Any]]] = [[] for _ in range(last + 1)]
        for group in self.data["groups"]:
            hops = group["hops_from_root"]
            columns[last if hops is None else min(hops, last)].append(group)
        return [column for column in columns if column]

    @staticmethod
    def _drawn(column: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        return column[:_ROWS]

    def draw(self, figure: Figure, rect: Rect) -> None:
        width_in = float(figure.get_figwidth()) - 2 * _SIDES_IN
        share = _SIDES_IN / float(figure.get_figwidth())
        axes = figure.add_axes((share, rect[1], 1 - 2 * share, rect[3]))
        axes.set(xlim=(0, width_in), ylim=(0, self.height_in))
        axes.set_axis_off()
        axes.set_title(self._title(), fontsize=10, loc="left")
        places = self._places(width_in)
        for edge in self._drawn_edges(places):
            self._arrow(axes, edge, places[edge["victim"]], places[edge["blocker"]])
        for group in self.data["groups"]:
            if group["id"] in places:
                _box(axes, group, *places[group["id"]])

    def _drawn_edges(self, places: Collection[int]) -> list[Mapping[str, Any]]:
        """Those that lead on to a root: that victims wait for each other as well says nothing more. All of them where
        there is no way to a root."""
        hops = {group["id"]: group["hops_from_root"] for group in self.data["groups"]}
        drawn = []
        for edge in self.data["edges"]:
            victim, blocker = hops.get(edge["victim"]), hops.get(edge["blocker"])
            is_onward = not victim or blocker is None or blocker < victim
            if is_onward and edge["victim"] in places and edge["blocker"] in places:
                drawn.append(edge)
        return drawn

    def _title(self) -> str:
        drawn = sum(len(self._drawn(column)) for column in self._columns)
        left_out = self.data["groups_total"] - drawn
        more = f"; {left_out} groups further away are left out" if left_out else ""
        return f"who waits for whom: red holds the job, arrows lead to who is waited for, in which communicator{more}"

    def _places(self, width_in: float) -> dict[int, tuple[float, float]]:
        """The middle of the box of each group that is drawn."""
        pitch_in = min(width_in / max(len(self._columns), 1), 4.2)
        places = {}
        for x, column in enumerate(self._columns):
            drawn = self._drawn(column)
            for y, group in enumerate(drawn):
                middle = self.height_in * (1 - (y + 0.5) / len(drawn))
                places[group["id"]] = (pitch_in * x + _BOX_IN[0] / 2 + 0.05, middle)
        return places

    def _arrow(
        self, axes: Axes, edge: Mapping[str, Any], victim: tuple[float, float], blocker: tuple[float, float]
    ) -> None:
        """To the left between columns, in a bow within one."""
        labels = sorted({each["label"] for each in self.data["edges"]})
        colour = _COLOURS[labels.index(edge["label"]) % len(_COLOURS)]
        half = _BOX_IN[0] / 2
        is_across = victim[0] > blocker[0]
        begin = (victim[0] - half if is_across else victim[0] + half, victim[1])
        end = (blocker[0] + half, blocker[1] + (0.0 if is_across else _BOW_IN / 3))
        bend = f"arc3,rad={0.0 if is_across else 0.6}"
        axes.annotate(
            "", end, begin, arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.6, "connectionstyle": bend}
        )
        # Nearer to the victim: arrows that end in one box meet there.
        at = (begin[0] + _BOW_IN, begin[1])
        if is_across:
            at = (0.6 * begin[0] + 0.4 * end[0], 0.6 * begin[1] + 0.4 * end[1])
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.9}
        name = short(_label(edge["label"]), _LABEL_CHARACTERS)
        axes.text(*at, name, fontsize=8, color=colour, ha="center", va="center", bbox=paper, parse_math=False)


def _box(axes: Axes, group: Mapping[str, Any], x: float, y: float) -> None:
    is_root = group["reason"] is not None
    width, height = _BOX_IN
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2),
            width,
            height,
            boxstyle="round,pad=0.02,rounding_size=0.08",
            facecolor="#ffd9d9" if is_root else "#eef2f7",
            edgecolor=FLAGGED if is_root else "#607d8b",
            linewidth=2.2 if is_root else 1.0,
            linestyle="--" if group["hops_from_root"] is None else "-",
            zorder=3,
        )
    )
    lines = _lines(group)
    top = y + _LINE_IN * (len(lines) - 1) / 2
    for at, line in enumerate(lines):
        weight = "bold" if at == 0 else "normal"
        colour = FLAGGED if is_root and at == 2 else "black"
        style: dict[str, Any] = {"fontsize": 8, "weight": weight, "color": colour, "parse_math": False, "zorder": 4}
        axes.text(x, top - at * _LINE_IN, line, ha="center", va="center", **style)


def _lines(group: Mapping[str, Any]) -> list[str]:
    """What stands in a box: ranks, nodes, what it waits in; of a root why it is one, and where in the program it is."""
    total, shown = group["ranks_total"], ", ".join(map(str, group["ranks"][:_RANKS_SHOWN]))
    ranks = f"rank{'s' if total > 1 else ''} {shown}" if total <= _RANKS_SHOWN else f"{total:,} ranks: {shown}, \u2026"
    step = f", in step {group['step'] + 1}" if group["step"] >= 0 else ""
    wait = group["waits_in"]
    told = "" if wait else _CONDITIONS.get(group["condition"], "")
    if wait:
        waited = f", {wait['for_s']:.0f} s" if wait["for_s"] >= 1 else ""
        told = f"in {wait['operation']} {wait['seq']} of {_label(wait['label'])}{waited}"
    if group["reason"] is None:
        return [short(line, _CHARACTERS) for line in (ranks, f"{_nodes(group)}{step}", told) if line]
    why = REASONS.get(group["reason"], group["reason"])
    own = [short(line, _CHARACTERS) for line in (ranks, f"{_nodes(group)}{step}", why, told if wait else "") if line]
    return own + _where(group["where"])


def _label(text: str) -> str:
    """What tells a communicator from others."""
    return _COMMON.sub("", text).strip("_") or text


def _nodes(group: Mapping[str, Any]) -> str:
    """Their names if these are short."""
    names = few(group["nodes"], group["nodes_total"], _NODES_SHOWN) or "node unknown"
    return names if len(names) <= _NODES_CHARACTERS else f"{group['nodes_total']} nodes"


def _where(text: str) -> list[str]:
    """The end of a place in the program: its folders say least."""
    return [] if not text else [text if len(text) <= _CHARACTERS else f"\u2026{text[1 - _CHARACTERS :]}"]
