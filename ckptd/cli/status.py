"""``ckptd status``: what the daemon of this node holds and how its runs, ranks and tiers are."""

from __future__ import annotations

from collections import Counter
from typing import Final

from ckptd.cli import options, output
from ckptd.errors import EXIT_DEGRADED, EXIT_OK, few
from ckptd_api.convert import incarnation_from_pb
from ckptd_api.v1 import operator_pb2, types_pb2

_NODES_SHOWN: Final = 3


def status(socket: options.Socket = None, as_json: options.Json = False) -> int:
    """Show memory, runs, protection, slots, parity and tiers of the daemon.

    Exits 3 when something is less than whole: a problem, a tier that does not answer, a run that no further loss of a
    node may hit, nodes of it that are silent, or a fault of it that is confirmed.
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
    return EXIT_OK if is_whole and not any(_is_at_risk(run) for run in answer.runs) else EXIT_DEGRADED


def _is_at_risk(run: operator_pb2.RunStatus) -> bool:
    """Something of it is at fault; or it is protected, and the next lost node may be one too many, or nodes may be lost
    already."""
    marks = run.watermarks
    if run.state == "ended":
        return False
    if run.faults:
        return True
    if not run.groups:
        return False
    return bool(marks.silent_nodes) or (marks.HasField("losses_tolerated") and marks.losses_tolerated <= 0)


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
    for run in answer.runs:
        for fault in run.faults:
            output.line(f"fault: {run.run}: {fault}")
    _show_protection([run for run in answer.runs if run.groups or run.protection_note])
    if answer.slots:
        output.line()
        output.table(
            ["SLOT", "RUN", "RANK", "STATE", "STEP", "SIZE", "LEASES"],
            [[s.slot, s.run, s.rank, s.state, _step(s), output.size(s.slot_bytes), s.leases] for s in answer.slots],
        )
    if answer.parity:
        output.line()
        output.table(
            ["PARITY OF", "STATE", "STEP", "GEOMETRY", "STRIPE", "ROW", "SIZE"],
            [_parity_row(parity) for parity in answer.parity],
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


def _show_protection(runs: list[operator_pb2.RunStatus]) -> None:
    if not runs:
        return
    output.line()
    output.table(
        ["RUN", "INCARNATION", "ROSTER", "GROUPS", "PARITY OF", "LOSSES TOLERATED", "SILENT"],
        [_protection_row(run) for run in runs],
    )
    for run in runs:
        if run.protection_note:
            output.line(f"note: {run.run}: {run.protection_note}")
        if silent := run.watermarks.silent_nodes:
            output.line(f"silent: {run.run}: {few(silent, _NODES_SHOWN)}")


def _protection_row(run: operator_pb2.RunStatus) -> list[object]:
    marks, groups = run.watermarks, Counter(f"{group.k}+{group.m}" for group in run.groups)
    parity = marks.parity_of
    return [
        run.run,
        str(incarnation_from_pb(run.incarnation)),
        run.roster_version,
        ", ".join(f"{count} x {geometry}" for geometry, count in groups.items()),
        f"{parity.step}@{parity.incarnation.ordinal}" if marks.HasField("parity_of") else None,
        marks.losses_tolerated if marks.HasField("losses_tolerated") else None,
        len(marks.silent_nodes),
    ]


def _parity_row(parity: operator_pb2.ParityStatus) -> list[object]:
    held = parity.HasField("snapshot")
    where = [parity.geometry, parity.stripe, parity.row] if held else [None, None, None]
    return [parity.run, parity.state, _step(parity), *where, output.size(parity.size_bytes)]


def _step(held: operator_pb2.SlotStatus | operator_pb2.ParityStatus) -> int | None:
    return held.snapshot.step if held.HasField("snapshot") else None


def _at(address: str) -> str:
    return f", at {address}" if address else ""
