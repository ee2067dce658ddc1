"""Pictures of a job as one PNG, or their data as JSON: ``ckptd faults --plot FILE``.

Layer: ``cli``; matplotlib is imported when a picture is drawn, and only its object interface, so that no display, no
backend and no state of the process plays a part. Invariants: FILE is there with all of its bytes or as it was.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ckptd.detect.pictures import encode
from ckptd.errors import InvalidRequest
from ckptd.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ckptd.cli.plot_style import Panel

_INSTALL: Final = 'pip install "ckptd[plot]", or name a .json file for the data'
SUFFIXES: Final = (".png", ".json")
_WIDTH_IN: Final = 13.0
_SIDES_IN: Final = (1.7, 1.6)  # left for names of rows, right for medians, marks and scales
_ABOVE_IN: Final = 0.4  # a panel: its title
_TITLE_IN: Final = 0.6
_LINE_IN: Final = 0.24
_DPI: Final = 110
_FAULTS_SHOWN: Final = 5
_LINES_A_FAULT: Final = 2
_CAPTION_CHARACTERS: Final = 165


def check_file(path: Path) -> None:
    """InvalidRequest when no picture can be written to ``path``, before anything is asked or judged."""
    if path.suffix.lower() not in SUFFIXES:
        raise InvalidRequest(f"{path} is no name for a picture", "end it in .png, or in .json for the data")
    if not path.parent.is_dir():
        raise InvalidRequest(f"{path} cannot be written: {path.parent} is not a folder")
    if path.is_dir():
        raise InvalidRequest(f"{path} cannot be written: it is a folder")
    if path.suffix.lower() == ".png" and find_spec("matplotlib") is None:
        raise InvalidRequest("matplotlib is needed to draw", _INSTALL)


def write_pictures(path: Path, document: Mapping[str, Any]) -> None:
    """``document``: of ``ckptd.detect.pictures``. InvalidRequest when ``path`` cannot be written."""
    data = encode(document) if path.suffix.lower() == ".json" else render(document)
    try:
        write_atomic(path, data)
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be written: {error.strerror or error}") from error


def render(document: Mapping[str, Any]) -> bytes:
    """A PNG. InvalidRequest when matplotlib cannot be imported."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise InvalidRequest(f"matplotlib is needed to draw: {error}", _INSTALL) from error
    figure, buffer = draw(document), io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def draw(document: Mapping[str, Any]) -> Figure:
    """The panels that have data, below each other, under a title and the faults."""
    from matplotlib.figure import Figure

    caption, panels = caption_of(document), panels_of(document)
    height_in = _TITLE_IN + _LINE_IN * len(caption)
    height_in += sum(_ABOVE_IN + panel.height_in + panel.below_in for panel in panels)
    figure = Figure(figsize=(_WIDTH_IN, height_in), dpi=_DPI, facecolor="white")
    at_in = height_in - _TITLE_IN / 2
    figure.text(0.02, at_in / height_in, title_of(document), fontsize=15, weight="bold", va="center", parse_math=False)
    at_in -= _TITLE_IN / 2
    for line, is_fault in caption:
        colour = "#b00020" if is_fault else "#444444"
        middle = (at_in - _LINE_IN / 2) / height_in
        figure.text(0.02, middle, line, fontsize=10, va="center", color=colour, parse_math=False)
        at_in -= _LINE_IN
    left, right = _SIDES_IN[0] / _WIDTH_IN, _SIDES_IN[1] / _WIDTH_IN
    for panel in panels:
        at_in -= _ABOVE_IN + panel.height_in
        panel.draw(figure, (left, at_in / height_in, 1 - left - right, panel.height_in / height_in))
        at_in -= panel.below_in
    return figure


def panels_of(document: Mapping[str, Any]) -> list[Panel]:
    """What there is to draw, in the order in which it is to be read."""
    from ckptd.cli.plot_links import LinksPanel
    from ckptd.cli.plot_steps import steps_panels
    from ckptd.cli.plot_waits import WaitsPanel

    waits: list[Panel] = [WaitsPanel(document["waits"])] if document["waits"] else []
    steps = steps_panels(document) if document["steps"] else []
    links: list[Panel] = [LinksPanel(document["links"][0])] if document["links"] else []
    is_of_links = any(fault["kind"].startswith("slow_link") for fault in document["faults"])
    return [*waits, *links, *steps] if is_of_links else [*waits, *steps, *links]


def title_of(document: Mapping[str, Any]) -> str:
    from ckptd.cli.plot_style import counted

    run, incarnation = document["run"] or "recording", document["incarnation"]
    size = counted("rank", document["world_size"])
    if document["nodes_total"]:
        size += f" on {counted('node', document['nodes_total'])}"
    return f"{run} ({incarnation}), {size}" if incarnation else f"{run}, {size}"


def caption_of(document: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """Lines, and whether each is of a fault."""
    if not document["faults"]:
        return [("no faults", False)]
    lines = []
    for fault in document["faults"][:_FAULTS_SHOWN]:
        parts = textwrap.wrap(_fault_line(fault), _CAPTION_CHARACTERS, subsequent_indent="      ")
        lines += [(part, True) for part in parts[:_LINES_A_FAULT]]
    more = document["faults_total"] - _FAULTS_SHOWN
    return [*lines, (f"and {more} more: `ckptd faults` lists them", False)] if more > 0 else lines


def _fault_line(fault: Mapping[str, Any]) -> str:
    from ckptd.cli.plot_style import few

    parts = [f"{fault['kind']} ({fault['confidence']})"]
    for what in ("rank", "node"):
        if named := fault[f"{what}s"]:
            total = fault[f"{what}s_total"]
            parts.append(f"{what}{'s' if total > 1 else ''} {few(named, total)}")
    parts += [f"since step {fault['since_step']}"] if fault["since_step"] >= 0 else []
    head = ", ".join(parts)
    return f"{head}: {fault['summary']}" if fault["summary"] else head
