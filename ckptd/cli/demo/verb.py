"""``ckptd demo``: flags, and what is shown of the play."""

from __future__ import annotations

import importlib.util
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated, Any, Final

import typer

from ckptd.cli import options, output
from ckptd.errors import EXIT_ERROR, EXIT_OK, CkptdError, InvalidRequest

STEPS: Final = 36


def demo(
    nodes: Annotated[int, typer.Option(min=1, metavar="N", help="Nodes to play with; 1 for now.")] = 1,
    kill: Annotated[int, typer.Option(min=1, metavar="M", help="Nodes lost at once in the last act; 1 for now.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights, the data and the steps at which is killed.")] = 0,
    as_json: options.Json = False,
) -> int:
    """Train a small GPT, kill it three ways, and prove that nothing was lost.

    A daemon and two ranks on this machine, about a minute, nothing left behind. Exits 0 only if the killed run ended
    with the very bits of an undisturbed one.
    """
    _check(nodes, kill)
    from ckptd.cli.demo.acts import play
    from ckptd.cli.demo.processes import Stage

    started = time.monotonic()
    with _terminated_like_interrupted(), output.activity() as say:
        stage = Stage()
        try:
            outcome = play(stage, STEPS, seed, say)
        finally:
            say("cleaning up")
            stage.close()
    took_s = time.monotonic() - started
    if as_json:
        output.emit_json(
            {"is_good": outcome.is_good, "steps": STEPS, "seed": seed, "seconds": took_s} | asdict(outcome)
        )
    else:
        _show(outcome, took_s)
    return EXIT_OK if outcome.is_good else EXIT_ERROR


def _check(nodes: int, kill: int) -> None:
    if nodes != 1 or kill != 1:
        raise InvalidRequest("the demo plays with one node, and loses that one", "leave out --nodes and --kill")
    for module, extra in (("torch", "client"), ("ckptd_client", "client")):
        if importlib.util.find_spec(module) is None:
            raise CkptdError(f"the demo trains with {module}, which is not installed", f"pip install 'ckptd[{extra}]'")


def _show(outcome: Any, took_s: float) -> None:
    output.table(
        ["KILLED", "AT STEP", "RESTORED STEP", "FROM", "RESTORE", "DOWN", "STEPS LOST", "RECOVERED"],
        [
            [
                recovery.killed,
                recovery.killed_at_step,
                recovery.restored_step,
                recovery.restored_from,
                None if recovery.restore_s is None else f"{recovery.restore_s:.3f}s",
                f"{recovery.downtime_s:.1f}s",
                recovery.steps_lost,
                "yes" if recovery.is_recovered else "no",
            ]
            for recovery in outcome.recoveries
        ],
    )
    output.line()
    losses = "the same" if outcome.is_every_loss_equal else "NOT the same"
    weights = "the same" if outcome.are_weights_equal else "NOT the same"
    output.line(f"against the undisturbed run, bit for bit: every loss {losses}, final weights {weights}")
    output.line(f"{STEPS} steps, final loss {outcome.final_loss:.4f}, {took_s:.0f}s in all")


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM cleans up as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
