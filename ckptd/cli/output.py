"""What the verbs show: the only module of ckptd that prints.

Layer: ``cli``; standard library, and rich where a terminal is there to enjoy it. Invariants: results go to stdout and
everything else (progress, warnings, errors) to stderr, so that with ``--json`` stdout is one JSON document, also when
the verb fails; without a terminal, tables are plain aligned text that ``awk`` can cut.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ckptd.config import format_size
from ckptd.errors import CkptdError


def emit_json(value: Any) -> None:
    """The one JSON document of a verb."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def line(text: str = "") -> None:
    sys.stdout.write(text + "\n")


def flush() -> None:
    """Let whoever reads a pipe see what was written: of a stream, the next line may be long in coming."""
    sys.stdout.flush()


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Rows under column names; numbers to the right. None shows as ``-``."""
    cells = [["-" if cell is None or cell == "" else str(cell) for cell in row] for row in rows]
    is_right = [bool(rows) and all(isinstance(row[i], int | float | None) for row in rows) for i in range(len(columns))]
    if sys.stdout.isatty():
        _rich_table(columns, cells, is_right)
        return
    widths = [max(len(text) for text in column) for column in zip(columns, *cells, strict=True)]
    for row in [list(columns), *cells]:
        padded = (
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(row, widths, is_right, strict=True)
        )
        line("  ".join(padded).rstrip())


def _rich_table(columns: Sequence[str], cells: Sequence[Sequence[str]], is_right: Sequence[bool]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, header_style="bold", pad_edge=False)
    for column, right in zip(columns, is_right, strict=True):
        drawn.add_column(column, justify="right" if right else "left", overflow="fold")
    for row in cells:
        drawn.add_row(*(Text(text) for text in row))  # Text: a run may be named like markup
    Console().print(drawn)


@contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr while the body runs, moved by the yielded ``advance(bytes_done, bytes_total)``.

    Without a terminal on stderr nothing is shown.
    """
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total or None)


@contextmanager
def activity() -> Iterator[Callable[[str], None]]:
    """Says on stderr what is going on, by the yielded ``say(text)``: a line each, the newest beside a clock.

    Without a terminal on stderr, lines with the seconds since the start.
    """
    started = time.monotonic()

    def line_of(text: str) -> str:
        return f"{time.monotonic() - started:6.1f}s  {text}"

    if not sys.stderr.isatty():
        yield lambda text: show_usage(line_of(text))
        return
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    with console.status("") as status:

        def say(text: str) -> None:
            console.print(line_of(text), markup=False)
            status.update(text)

        yield say


def show_error(error: CkptdError, *, is_json: bool) -> None:
    """One line and a hint on stderr; with ``--json`` the same as a document on stdout too."""
    if is_json:
        emit_json(
            {
                "error": {
                    "name": type(error).__name__,
                    "message": error.message,
                    "hint": error.hint,
                    "exit_code": error.exit_code,
                    "is_retryable": error.is_retryable,
                }
            }
        )
    sys.stderr.write(f"ckptd: error: {error.message}\n")
    if error.hint:
        sys.stderr.write(f"hint: {error.hint}\n")


def show_usage(text: str) -> None:
    sys.stderr.write(text + "\n")


def size(size_bytes: int) -> str:
    return format_size(size_bytes)


def age(unix_s: float) -> str | None:
    """How long ago, in the largest unit that fits; None for a time that is not known."""
    if unix_s <= 0:
        return None
    seconds = max(0.0, time.time() - unix_s)
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f}{unit} ago"
    return f"{seconds:.0f}s ago"
