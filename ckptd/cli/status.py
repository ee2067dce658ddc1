"""``ckptd status``: what the daemon of this node holds and how its runs, ranks and tiers are."""

from __future__ import annotations

from ckptd.cli import options, output
from ckptd.errors import EXIT_DEGRADED, EXIT_OK
from ckptd_api.convert import incarnation_from_pb
from ckptd_api.v1 import operator_pb2, types_pb2


def status(socket: options.Socket = None, as_json: options.Json = False) -> int:
    """Show memory, runs, slots and tiers of the daemon.

    Exits 3 when the daemon is less than whole: a problem, or a tier that does not answer.
    """
    from ckptd.cli import channel

    with channel.connect(socket) as daemon:
        answer = daemon.unary(daemon.stub.GetStatus, operator_pb2.GetStatusRequest())
    if as_json:
        from ckptd.cli.messages import plain

        output.emit_json(plain(answer))
    else:
        _show(answer)
    is_whole = not answer.problems and all(tier.is_healthy for tier in answer.tiers)
    return EXIT_OK if is_whole else EXIT_DEGRADED


def _show(answer: operator_pb2.GetStatusResponse) -> None:
    output.line(f"ckptd {answer.version}, node {answer.node_id}, pid {answer.pid}" + _at(answer.address))
    used, budget = output.size(answer.used_bytes), output.size(answer.memory_bytes)
    output.line(f"memory: {used} of {budget} in {answer.arena}")
    for problem in answer.problems:
        output.line(f"problem: {problem}")
    if answer.runs:
        output.line()
        output.table(
            ["RUN", "STATE", "INCARNATION", "RANKS HERE", "STAGED", "PROTECTED", "DURABLE", "DEAD", "OWNER"],
            [_run_row(run) for run in answer.runs],
        )
    if answer.slots:
        output.line()
        output.table(
            ["SLOT", "RUN", "RANK", "STATE", "STEP", "SIZE", "LEASES"],
            [[s.slot, s.run, s.rank, s.state, _step(s), output.size(s.slot_bytes), s.leases] for s in answer.slots],
        )
    if answer.tiers:
        output.line()
        output.table(
            ["TIER", "SCOPE", "HEALTH"],
            [[tier.url, tier.scope, "ok" if tier.is_healthy else tier.problem or "failing"] for tier in answer.tiers],
        )


def _run_row(run: operator_pb2.RunStatus) -> list[object]:
    joined = sum(rank.state == "joined" for rank in run.ranks)
    marks: types_pb2.Watermarks = run.watermarks
    return [
        run.run,
        run.state,
        str(incarnation_from_pb(run.incarnation)),
        f"{joined}/{len(run.ranks)} of {run.world_size}",
        marks.staged if marks.HasField("staged") else None,
        marks.protected if marks.HasField("protected") else None,
        marks.durable if marks.HasField("durable") else None,
        len(marks.dead),
        run.owner,
    ]


def _step(slot: operator_pb2.SlotStatus) -> int | None:
    return slot.snapshot.step if slot.HasField("snapshot") else None


def _at(address: str) -> str:
    return f", at {address}" if address else ""
