"""``ckptd prune``: what retention would delete (or ``--finish`` complete), and with ``--apply`` does."""

from __future__ import annotations

from typing import Annotated

import typer

from ckptd.cli import options, output
from ckptd.cli.checkpoints import incarnation_text
from ckptd.errors import EXIT_ERROR, EXIT_OK
from ckptd_api.v1 import operator_pb2


def prune(
    run: options.Run,
    finish: Annotated[bool, typer.Option("--finish", help="Complete commits that were interrupted instead.")] = False,
    apply: Annotated[bool, typer.Option("--apply", help="Do it; without, only the plan is shown.")] = False,
    socket: options.Socket = None,
    as_json: options.Json = False,
) -> int:
    """Show, or apply, what retention deletes of RUN.

    Shows the plan by the rule of each tier (keep=..); deletes only with --apply.
    """
    from ckptd.cli import channel

    with channel.connect(socket) as daemon:
        answer = daemon.unary(
            daemon.stub.Prune,
            operator_pb2.PruneRequest(run=run, is_finish=finish, is_applied=apply),
            channel.PRUNE_DEADLINE_S,
        )
    if as_json:
        from ckptd.cli.messages import plain

        output.emit_json({"is_applied": apply, "actions": [plain(action) for action in answer.actions]})
    else:
        _show(answer, is_applied=apply)
    has_failed = apply and any(action.problem or not action.is_done for action in answer.actions)
    return EXIT_ERROR if has_failed else EXIT_OK


def _show(answer: operator_pb2.PruneResponse, *, is_applied: bool) -> None:
    if not answer.actions:
        output.line("nothing to do")
        return
    output.table(
        ["ACTION", "STEP", "INCARNATION", "SOURCE", "SIZE", "REASON", "RESULT"],
        [
            [
                action.verb,
                action.checkpoint.snapshot.step,
                incarnation_text(action.checkpoint),
                action.checkpoint.source,
                output.size(action.checkpoint.size_bytes),
                action.reason,
                action.problem or ("done" if action.is_done else "planned" if not is_applied else "not done"),
            ]
            for action in answer.actions
        ],
    )
    if not is_applied:
        output.line("this is the plan; --apply does it")
