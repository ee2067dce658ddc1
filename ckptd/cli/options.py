"""Flags that every verb takes, and arguments that several do. Layer: ``cli``; typer only."""

from __future__ import annotations

from typing import Annotated

import typer

Socket = Annotated[
    str | None,
    typer.Option(
        "--socket",
        metavar="P",
        help="The daemon's socket, or HOST:PORT. Default: CKPTD_DAEMON, else the first default socket that exists.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout; progress and warnings on stderr.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="Name of the run.")]
