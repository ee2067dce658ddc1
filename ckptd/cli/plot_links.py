"""The link matrix, drawn: from whom by row, to whom by column. Layer: ``cli``, below ``plot``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ckptd.cli.plot_style import COLOURS, FLAGGED, UNKNOWN, Rect, scale, short

_PLACES: Final = 32  # of more those with the slowest links are drawn
_PLACES_WITH_TEXT: Final = 16
_FINDINGS: Final = 8
_CELL_IN: Final = (0.48, 0.32)
_LARGEST_IN: Final = (7.2, 5.4)
_LINE_IN: Final = 0.22
_NAME_CHARACTERS: Final = 12


@dataclass(frozen=True)
class LinksPanel:
    """``data``: one matrix of a document of pictures. What a fault names is among the places whatever their number."""

    data: Mapping[str, Any]
    below_in: float = 0.9

    @property
    def height_in(self) -> float:
        return min(max(2.0, _CELL_IN[1] * len(self._places)), _LARGEST_IN[1])

    @cached_property
    def _places(self) -> list[int]:
        """Those of flagged cells first, then by their slowest cell."""
        data = self.data
        slowest = np.full(len(data["places"]), -np.inf)
        is_flagged = np.zeros(len(data["places"]), np.bool_)
        flagged = np.array(data["flagged"], np.int64)
        for ends in (np.array(data["src"], np.int64), np.array(data["dst"], np.int64)):
            np.maximum.at(slowest, ends, np.array(data["log2_ratio"], np.float64))
            is_flagged[ends[flagged]] = True
        return sorted(np.lexsort((-slowest, ~is_flagged))[:_PLACES].tolist())

    def draw(self, figure: Figure, rect: Rect) -> None:
        places = self._places
        width = min(max(2.0, _CELL_IN[0] * len(places)), _LARGEST_IN[0]) / float(figure.get_figwidth())
        left, bottom, _, height = rect
        axes = figure.add_axes((left, bottom, width, height))
        limit = self._cells(axes)
        names = [short(self.data["places"][place], _NAME_CHARACTERS) for place in places]
        axes.set_xticks(range(len(places)), names, fontsize=8, rotation=90 if len(places) > 4 else 0)
        axes.set_yticks(range(len(places)), names, fontsize=8)
        axes.set_ylabel("from", fontsize=9)
        axes.set_title(self._title(), fontsize=10, loc="left")
        scale(figure, (left + width + 0.02, bottom, 0.01, height), limit, "", lambda ratio: f"{2**ratio:.2g}\u00d7")
        self._tell(figure, left + width + 0.09, bottom + height)

    def _cells(self, axes: Axes) -> float:
        """Draws them; the end of the scale, as a power of 2."""
        data = self.data
        at = {place: index for index, place in enumerate(self._places)}
        table = np.full((len(at), len(at)), np.nan)
        cells = [
            (cell, at[src], at[dst])
            for cell, (src, dst) in enumerate(zip(data["src"], data["dst"], strict=True))
            if src in at and dst in at
        ]
        for cell, y, x in cells:
            table[y, x] = data["log2_ratio"][cell]
        limit = max(1.0, float(np.nanmax(np.abs(table))))
        axes.imshow(table, COLOURS, aspect="auto", interpolation="nearest", vmin=-limit, vmax=limit)
        axes.set_facecolor(UNKNOWN)
        flagged = set(data["flagged"])
        for cell, y, x in cells:
            if cell in flagged:
                edge = Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=1.8, zorder=3)
                axes.add_patch(edge)
            if len(at) <= _PLACES_WITH_TEXT:
                colour = "white" if abs(table[y, x]) > 0.6 * limit else "black"
                axes.text(x, y, f"{2 ** table[y, x]:.1f}", fontsize=8, ha="center", va="center", color=colour)
        return limit

    def _title(self) -> str:
        data, shown = self.data, len(self._places)
        of = f", {shown} of {data['places_total']:,}" if data["places_total"] > shown else ""
        normal = f"{data['normal']:g} {data['unit']}".strip()
        what = f"links between {data['places_are']}{of}: {data['figure'].replace('_', ' ')}"
        return f"{what}, as times of what is normal ({normal}); grey: not used"

    def _tell(self, figure: Figure, left: float, top: float) -> None:
        for line, found in enumerate(self.data["findings"][:_FINDINGS]):
            where = " - ".join(found["places"])
            what = f"link {where}" if found["side"] == "link" else f"{where}, {_SIDES[found['side']]}"
            height = top - _LINE_IN * (line + 0.5) / float(figure.get_figheight())
            told = f"{what}: {found['ratio']:.1f} times slower"
            figure.text(left, height, told, fontsize=9, color=FLAGGED, weight="bold", va="center", parse_math=False)


_SIDES: Final = {"sending": "what it sends", "receiving": "what it receives", "both": "both ways"}
