"""``ckptd probe``: the nodes of a run measured against each other, in two rounds of pairs, to find what is slow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ckptd.cli import options, output
from ckptd.errors import EXIT_DEGRADED, EXIT_OK, DaemonUnreachable, InvalidRequest
from ckptd_api.v1 import operator_pb2

if TYPE_CHECKING:
    from ckptd.cli.channel import Daemon


def probe(
    run: Annotated[str, typer.Argument(metavar="[RUN]", help="The run; not needed when one is active here.")] = "",
    nodes: Annotated[
        list[str] | None, typer.Option("--node", metavar="ID", help="Only this node and others named; repeatable.")
    ] = None,
    has_compute: Annotated[bool, typer.Option("--compute", help="How fast a core of each node is, too.")] = False,
    socket: options.Socket = None,
    as_json: options.Json = False,
) -> int:
    """Find a slow node or link of RUN.

    Its daemons measure each other in pairs, then again with others: at most 9 MiB each way of a pair, beside the
    training, and twice more where it is slow. What takes more than 1.3 times the median is slow; open faults that
    agree with it are verified. Exits 3 when something is slow, does not answer, or could not be measured.
    """
    from ckptd.cli import channel

    result: operator_pb2.ProbeResult | None = None
    with channel.connect(socket) as daemon, output.activity() as say:
        name = run or _only_active(daemon)
        request = operator_pb2.ProbeRequest(run=name, nodes=nodes or [], has_compute=has_compute)
        for answer in daemon.stream(daemon.stub.Probe, request):
            if answer.phase:
                say(answer.phase)
            if answer.HasField("result"):
                result = answer.result
    if result is None:
        raise DaemonUnreachable("the daemon ended the probe without a result")
    if as_json:
        from ckptd.cli.messages import plain

        document = plain(result) | {"run": name, "verified": [_plain_fault(fault) for fault in result.verified]}
        output.emit_json(document)
    else:
        _show(result)
    is_whole = not result.verdicts and not result.not_measured and not any(node.problem for node in result.nodes)
    return EXIT_OK if is_whole else EXIT_DEGRADED


def _only_active(daemon: Daemon) -> str:
    status = daemon.unary(daemon.stub.GetStatus, operator_pb2.GetStatusRequest())
    active = sorted({run.run for run in status.runs if run.state == "active"})
    if len(active) != 1:
        found = f"{len(active)} runs are active here: {', '.join(active)}" if active else "no run is active here"
        raise InvalidRequest(found, "name one: ckptd probe RUN")
    return active[0]


def _plain_fault(fault: Any) -> dict[str, Any]:
    return {"kind": fault.kind, "ranks": list(fault.ranks), "nodes": list(fault.nodes)}


def _show(result: operator_pb2.ProbeResult) -> None:
    output.table(
        ["NODE A", "NODE B", "A TO B", "B TO A", "ROUND TRIP", "PROBLEM"],
        [
            [
                pair.a,
                pair.b,
                _rate(pair.to_b_bytes_per_second) if pair.HasField("to_b_bytes_per_second") else None,
                _rate(pair.to_a_bytes_per_second) if pair.HasField("to_a_bytes_per_second") else None,
                _time(pair.round_trip_seconds) if pair.HasField("round_trip_seconds") else None,
                pair.problem,
            ]
            for pair in result.pairs
        ],
    )
    if result.nodes:
        output.line()
        output.table(["NODE", "PRODUCT", "COPY", "PROBLEM"], [_node_row(node) for node in result.nodes])
    output.line()
    for verdict in result.verdicts:
        output.line(_sentence(verdict))
    if not result.verdicts:
        output.line("nothing that was measured is slow" if result.not_measured else "all alike: nothing is slow")
    if result.not_measured:
        output.line(f"note: no time was left for {result.not_measured} of the measurements")
    for fault in result.verified:
        output.line(f"verified: {fault.kind} of {', '.join(fault.nodes)}")
    for note in result.notes:
        output.line(f"note: {note}")


def _node_row(node: operator_pb2.ProbedNode) -> list[str | None]:
    if node.problem:
        return [node.node_id, None, None, node.problem]
    return [node.node_id, _time(node.product_seconds), _time(node.copy_seconds), None]


def _sentence(verdict: operator_pb2.ProbeVerdict) -> str:
    """One verdict, as in "slow node: 0f3a, 2.1 times the median"."""
    what = {
        "node": f"node: {verdict.nodes[0]}",
        "link": f"link: {' - '.join(verdict.nodes)}",
        "compute": f"cores: node {verdict.nodes[0]}",
    }[verdict.blame]
    state = f", {verdict.slowdown:.1f} times the median" if verdict.HasField("slowdown") else ""
    doubt = "" if verdict.is_certain else " (or one of its ends: too few pairs to tell)"
    return f"{'slow' if state else 'unreachable'} {what}{state}{doubt}"


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e6:.3g} MB/s" if bytes_per_second < 1e9 else f"{bytes_per_second / 1e9:.3g} GB/s"


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
