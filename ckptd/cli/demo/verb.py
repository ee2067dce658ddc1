"""``ckptd demo``: flags, and what is shown of the play."""

from __future__ import annotations

import importlib.util
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated, Final

import typer

from ckptd.cli import options, output
from ckptd.cli.demo import acts, cluster_acts
from ckptd.cli.demo.journal import Comparison
from ckptd.cli.demo.stage import Stage
from ckptd.errors import EXIT_ERROR, EXIT_OK, CkptdError, InvalidRequest

STEPS: Final = 36
CLUSTER_STEPS: Final = 24


def demo(
    nodes: Annotated[int, typer.Option(min=1, metavar="N", help="Nodes to play with: a daemon and a rank each.")] = 1,
    kill: Annotated[int, typer.Option(min=1, metavar="M", help="Nodes lost at once, less than N.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights, the data and what is killed when.")] = 0,
    as_json: options.Json = False,
) -> int:
    """Train a small GPT, kill what carries it, and prove that nothing was lost.

    With one node: a daemon and two ranks on this machine, killed three ways, in about a minute. With more: M of N nodes
    are lost for good, with their memory, others take their places, and the run goes on from memory and parity; a minute
    or two for six. Nothing is left behind. Exits 0 only if everything came back from where it should and the run ended
    with the very bits of an undisturbed one.
    """
    _check(nodes, kill)
    steps = STEPS if nodes == 1 else CLUSTER_STEPS
    outcome: acts.Outcome | cluster_acts.ClusterOutcome
    started = time.monotonic()
    with _terminated_like_interrupted(), output.activity() as say:
        stage = Stage()
        try:
            if nodes == 1:
                outcome = acts.play(stage, steps, seed, say)
            else:
                outcome = cluster_acts.play(stage, nodes, kill, steps, seed, say)
        finally:
            say("cleaning up")
            with _uninterrupted():
                stage.close()
    took_s = time.monotonic() - started
    if as_json:
        output.emit_json(
            {"is_good": outcome.is_good, "steps": steps, "seed": seed, "seconds": took_s}
            | asdict(outcome.comparison)
            | {name: value for name, value in asdict(outcome).items() if name != "comparison"}
        )
    else:
        if isinstance(outcome, acts.Outcome):
            _show(outcome)
        else:
            _show_cluster(outcome)
        _show_comparison(outcome.comparison)
        output.line(f"{steps} steps, final loss {outcome.comparison.final_loss:.4f}, {took_s:.0f}s in all")
    return EXIT_OK if outcome.is_good else EXIT_ERROR


def _check(nodes: int, kill: int) -> None:
    if nodes == 1 and kill > 1:
        raise InvalidRequest(
            f"--kill {kill} needs more than one node", f"give --nodes: with --nodes {kill + 2} any {kill} may be lost"
        )
    if nodes > 1 and kill >= nodes:
        raise InvalidRequest(
            f"--kill {kill} of {nodes} nodes leaves nothing to come back from",
            f"of a parity group of k+m nodes any m may be lost, and --kill is m: at most {nodes - 1} here",
        )
    for module, extra in (("torch", "client"), ("ckptd_client", "client")):
        if importlib.util.find_spec(module) is None:
            raise CkptdError(f"the demo trains with {module}, which is not installed", f"pip install 'ckptd[{extra}]'")


def _show(outcome: acts.Outcome) -> None:
    output.table(
        ["KILLED", "AT STEP", "RESTORED STEP", "FROM", "RESTORE", "DOWN", "STEPS LOST", "RECOVERED"],
        [
            [
                recovery.killed,
                recovery.killed_at_step,
                recovery.restored_step,
                recovery.restored_from,
                _seconds(recovery.restore_s),
                f"{recovery.downtime_s:.1f}s",
                recovery.steps_lost,
                "yes" if recovery.is_recovered else "no",
            ]
            for recovery in outcome.recoveries
        ],
    )
    output.line()


def _show_cluster(outcome: cluster_acts.ClusterOutcome) -> None:
    output.table(
        ["NODE", "WAS", "ADDRESS", "RANK", "RESTORED STEP", "FROM", "RESTORE", "RECOVERED"],
        [
            [
                fate.node,
                "lost" if fate.is_lost else "kept",
                f"{fate.address_before} -> {fate.address}" if fate.is_lost else fate.address,
                fate.node,
                fate.restored_step,
                fate.restored_from,
                _seconds(fate.restore_s),
                "yes" if fate.is_recovered else "no",
            ]
            for fate in outcome.fates
        ],
    )
    output.line()
    output.line(
        f"killed at step {outcome.killed_at_step}, of which {outcome.protected_step} was protected; training again "
        f"after {outcome.downtime_s:.1f}s, protected again with step {outcome.protected_again}"
    )


def _show_comparison(comparison: Comparison) -> None:
    losses = "the same" if comparison.is_every_loss_equal else "NOT the same"
    weights = "the same" if comparison.are_weights_equal else "NOT the same"
    output.line(f"against the undisturbed run, bit for bit: every loss {losses}, final weights {weights}")


def _seconds(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}s"


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM cleans up as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """A second Ctrl-C must not stop the cleaning up."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
