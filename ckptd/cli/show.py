"""``ckptd show``: the copies of one checkpoint and the tensors in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Final

import typer

from ckptd.cli import options, output
from ckptd.cli.checkpoints import incarnation_text, parent_text
from ckptd.errors import EXIT_OK, UnknownStep
from ckptd_api.v1 import operator_pb2

_TENSORS_SHOWN: Final = 50


def show(
    run: options.Run,
    step: Annotated[int, typer.Argument(metavar="STEP", min=0, help="Step of the checkpoint.")],
    socket: options.Socket = None,
    as_json: options.Json = False,
) -> int:
    """Show the copies of a checkpoint and its tensors.

    The first 50 tensors; with --json all.
    """
    from ckptd.cli import channel

    with channel.connect(socket) as daemon:
        answer = daemon.unary(
            daemon.stub.ShowCheckpoint,
            operator_pb2.ShowCheckpointRequest(run=run, step=step),
            channel.TIER_DEADLINE_S,
        )
    if not answer.copies:
        raise UnknownStep(f"no copy of step {step} of run {run!r} is known")
    if as_json:
        from ckptd.cli.messages import plain

        output.emit_json(plain(answer))
    else:
        _show_copies(answer)
        _show_tensors(answer)
    return EXIT_OK


def _show_copies(answer: operator_pb2.ShowCheckpointResponse) -> None:
    output.table(
        ["SOURCE", "STATE", "INCARNATION", "RANKS", "SIZE", "CREATED", "PARENT"],
        [
            [
                copy.source,
                copy.state,
                incarnation_text(copy),
                copy.world_size,
                output.size(copy.size_bytes),
                output.age(copy.created_at_s),
                parent_text(copy),
            ]
            for copy in answer.copies
        ],
    )


def _show_tensors(answer: operator_pb2.ShowCheckpointResponse) -> None:
    shown = answer.tensors[:_TENSORS_SHOWN]
    output.line()
    output.table(
        ["TENSOR", "DTYPE", "SHAPE", "RANKS"],
        [
            [tensor.name, tensor.dtype, "x".join(map(str, tensor.global_shape)) or "scalar", ranks_text(tensor.ranks)]
            for tensor in shown
        ],
    )
    if len(shown) < len(answer.tensors):
        output.line(f"... {len(shown)} of {len(answer.tensors)} tensors; --json lists all")


def ranks_text(ranks: Sequence[int]) -> str:
    """Ranks in order, runs of them as ranges: ``0-3,7``."""
    ranges: list[list[int]] = []
    for rank in sorted(ranks):
        if ranges and rank == ranges[-1][1] + 1:
            ranges[-1][1] = rank
        else:
            ranges.append([rank, rank])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
