"""What the panels of a picture share: colours, scales, names cut to fit. Layer: ``cli``, below ``plot``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

Rect = tuple[float, float, float, float]

FLAGGED: Final = "#b00020"
PLAIN: Final = "#444444"
UNKNOWN: Final = "#c8c8c8"
COLOURS: Final = "RdBu_r"  # red above, blue below, white as it should be; told apart without red and green
_NAME_CHARACTERS: Final = 22


class Panel(Protocol):
    """``draw`` fills ``rect`` (left, bottom, width, height as shares of the figure), which is ``height_in`` high and
    has ``below_in`` below it for the names of columns."""

    @property
    def height_in(self) -> float: ...

    @property
    def below_in(self) -> float: ...

    def draw(self, figure: Figure, rect: Rect) -> None: ...


def scale(figure: Figure, rect: Rect, limit: float, unit: str, told: Callable[[float], str] | None = None) -> None:
    """A bar of the colours from ``-limit`` to ``limit``; ``told``: what stands at a value."""
    mapped = ScalarMappable(Normalize(-limit, limit), colormaps[COLOURS])
    bar = figure.colorbar(mapped, cax=figure.add_axes(rect), extend="both")
    bar.ax.tick_params(labelsize=8)
    bar.ax.set_title(unit, fontsize=8, pad=9)
    if told is not None:
        ticks = [-limit, -limit / 2, 0.0, limit / 2, limit]
        bar.set_ticks(ticks, labels=[told(tick) for tick in ticks])


def short(text: str, most: int = _NAME_CHARACTERS) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}\u2026"


def few(items: Sequence[Any], total: int, most: int = 8) -> str:
    """The first of ``items``, and how many of ``total`` are not told."""
    told = ", ".join(map(str, items[:most]))
    return f"{told} and {total - most} more" if total > most else told


def counted(name: str, total: int) -> str:
    return f"{total:,} {name}" if total == 1 else f"{total:,} {name}s"
