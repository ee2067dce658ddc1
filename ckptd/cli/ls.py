"""``ckptd ls``: the runs that are known, or the checkpoints of one."""

from __future__ import annotations

from typing import Annotated

import typer

from ckptd.cli import options, output
from ckptd.cli.checkpoints import incarnation_text, parent_text
from ckptd.errors import EXIT_OK, UnknownRun
from ckptd_api.v1 import operator_pb2


def ls(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="List the checkpoints of this run.")] = None,
    socket: options.Socket = None,
    as_json: options.Json = False,
) -> int:
    """List runs, or the checkpoints of RUN.

    In memory and in every tier; of a run only its newest checkpoint of each.
    """
    from ckptd.cli import channel

    with channel.connect(socket) as daemon:
        answer = daemon.unary(
            daemon.stub.ListCheckpoints, operator_pb2.ListCheckpointsRequest(run=run or ""), channel.TIER_DEADLINE_S
        )
    if run and not answer.rows:
        raise UnknownRun(f"no checkpoint of run {run!r} is known")
    if as_json:
        from ckptd.cli.messages import plain

        output.emit_json({"checkpoints" if run else "runs": [plain(row) for row in answer.rows]})
    elif run:
        _show_checkpoints(answer)
    else:
        _show_runs(answer)
    return EXIT_OK


def _show_runs(answer: operator_pb2.ListCheckpointsResponse) -> None:
    output.table(
        ["RUN", "NEWEST STEP", "STATE", "SOURCE", "RANKS", "SIZE", "CREATED"],
        [
            [
                row.run,
                row.snapshot.step,
                row.state,
                row.source,
                row.world_size,
                output.size(row.size_bytes),
                output.age(row.created_at_s),
            ]
            for row in answer.rows
        ],
    )


def _show_checkpoints(answer: operator_pb2.ListCheckpointsResponse) -> None:
    output.table(
        ["STEP", "INCARNATION", "STATE", "SOURCE", "RANKS", "SIZE", "CREATED", "PARENT"],
        [
            [
                row.snapshot.step,
                incarnation_text(row),
                row.state,
                row.source,
                row.world_size,
                output.size(row.size_bytes),
                output.age(row.created_at_s),
                parent_text(row),
            ]
            for row in answer.rows
        ],
    )
