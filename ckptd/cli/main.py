"""The ``ckptd`` command: registers the verbs and is the boundary where errors become lines and exit codes.

Layer: the top. Invariants: a verb returns its exit code or raises a CkptdError; nothing a user can cause ends in a
traceback; verbs import what is heavy (the daemon, Zarr) only when they run.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Annotated

import typer

import ckptd
from ckptd.cli import doctor, faults, ls, output, probe, prune, serve, show, status, verify
from ckptd.cli.demo.verb import demo
from ckptd.errors import EXIT_OK, EXIT_USAGE, CkptdError, InvalidRequest

EXIT_INTERRUPTED = 130  # by convention 128 + SIGINT
_AGAIN_S = 0.05

app = typer.Typer(
    name="ckptd",
    help="Checkpoints for distributed PyTorch training: the daemon of a node, and what operators ask of it.",
    epilog="Exit codes: 0 ok, 1 error, 2 usage, 3 degraded, 4 data lost or corrupt, 5 not found, 6 daemon unreachable.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for verb in (
    serve.serve,
    status.status,
    ls.ls,
    show.show,
    verify.verify,
    prune.prune,
    faults.faults,
    probe.probe,
    doctor.doctor,
    demo,
):
    app.command()(verb)


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        output.line(f"ckptd {ckptd.__version__}")
        raise typer.Exit(EXIT_OK)


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Checkpoints for distributed PyTorch training: the daemon of a node, and what operators ask of it."""


def run(arguments: Sequence[str]) -> int:
    """Run one command line; its exit code."""
    is_json = "--json" in arguments
    try:
        code = app(list(arguments), prog_name="ckptd", standalone_mode=False)
    except CkptdError as error:
        output.show_error(error, is_json=is_json)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    except Exception as error:  # the parser's usage errors have no public base class; all else is raised again
        if not hasattr(error, "format_message"):
            raise
        return _show_usage_error(error.format_message(), arguments, is_json=is_json)
    return code if isinstance(code, int) else EXIT_OK


def _show_usage_error(message: str, arguments: Sequence[str], *, is_json: bool) -> int:
    if not arguments:
        output.show_usage(message)  # the help itself: nothing was asked
        return EXIT_USAGE
    known = {command.callback.__name__ for command in app.registered_commands if command.callback}
    verb = next((f"{argument} " for argument in arguments if argument in known), "")
    output.show_error(InvalidRequest(message, f"`ckptd {verb}--help` shows the usage"), is_json=is_json)
    return EXIT_USAGE


def _interrupt_again(lost: sys.UnraisableHookArgs) -> None:
    """An interrupt that falls into a callback or a destructor (of gRPC, of a subprocess) is dropped there by Python:
    the verb would go on as if nobody had pressed Ctrl-C."""
    if isinstance(lost.exc_value, KeyboardInterrupt):
        # Not from here: what is raised in this hook is dropped too.
        threading.Timer(_AGAIN_S, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(lost)


def main() -> int:
    """Entry point of the console script."""
    sys.unraisablehook = _interrupt_again
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (`| head`) has what it wanted; without this the interpreter complains at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


if __name__ == "__main__":
    sys.exit(main())
