"""``ckptd faults``: what the detector has found of running jobs, or finds in recorded timings.

It answers, whatever it found, with exit code 0; ``ckptd status`` is the one that exits 3 when a run is less than whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ckptd.cli import options, output
from ckptd.errors import EXIT_OK, InvalidRequest, few
from ckptd_api.convert import incarnation_from_pb
from ckptd_api.v1 import faults_pb2, operator_pb2


def faults(
    run: Annotated[str, typer.Argument(metavar="[RUN]", help="Only this run.")] = "",
    replay: Annotated[
        Path | None,
        typer.Option(
            "--replay",
            metavar="PATH",
            help="Judge recorded timings: a recording of ckptd, a folder of Flight Recorder dumps, a parquet timeline.",
        ),
    ] = None,
    layout: Annotated[
        Path | None, typer.Option("--layout", metavar="F", help="With --replay: YAML with dp_size, pp_size, tp_size.")
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option("--record", metavar="F", help="Save what was judged as F.ckptd-timings, for --replay elsewhere."),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show every change until interrupted.")] = False,
    has_resolved: Annotated[bool, typer.Option("--all", help="Those that are over too.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            help="Draw what is seen of one run: self time by rank and step, who waits for whom, links. A .png, or a "
            ".json of the data.",
        ),
    ] = None,
    socket: options.Socket = None,
    as_json: options.Json = False,
) -> int:
    """Show faulty ranks, nodes and links.

    Kind, the ranks and nodes at the root of it (never those that wait for them), how sure it is, since which step, and
    what shows it. With --watch --json: one document a line.
    """
    if plot is not None:
        from ckptd.cli.plot import check_file

        if watch:
            raise InvalidRequest("--plot draws one moment: it does not go with --watch")
        check_file(plot)
    if replay is not None:
        if run or watch or record:
            raise InvalidRequest("--replay judges a file: it goes with neither RUN, --watch nor --record")
        return _replay(replay, layout, plot, as_json=as_json)
    if record is not None:
        _check_recording(record)
    if layout is not None:
        raise InvalidRequest("--layout describes a recording", "give --replay PATH too")
    from ckptd.cli import channel

    with channel.connect(socket) as daemon:
        if watch:
            seen: operator_pb2.WatchFaultsResponse | None = None
            for answer in daemon.stream(daemon.stub.WatchFaults, operator_pb2.WatchFaultsRequest(run=run)):
                if answer != seen:
                    _show(answer.faults, answer.coverage, as_json=as_json, is_stream=True)
                    output.flush()
                seen = answer
            return EXIT_OK
        request = operator_pb2.ListFaultsRequest(run=run, has_resolved=has_resolved)
        found = daemon.unary(daemon.stub.ListFaults, request)
        if plot is not None:
            drawn = daemon.unary(daemon.stub.GetPictures, operator_pb2.GetPicturesRequest(run=run))
            _plot(plot, json.loads(drawn.pictures))
        if record is not None:
            asked = operator_pb2.GetPicturesRequest(run=run, is_recording=True)
            _write(record, daemon.unary(daemon.stub.GetPictures, asked).recording)
    _show(found.faults, found.coverage, as_json=as_json)
    return EXIT_OK


def _replay(path: Path, layout: Path | None, plot: Path | None, *, as_json: bool) -> int:
    from ckptd.replay.judging import examine_file

    judged = examine_file(path, layout)
    if plot is not None:
        from ckptd.detect.pictures import has_something, pictures

        document = pictures(judged.scene, judged.run or path.name, judged.incarnation)
        if not has_something(document):
            raise InvalidRequest(f"{path} holds nothing to draw", "no steps, no links, and nothing that stands still")
        _plot(plot, document)
    found = [
        {
            "kind": fault.kind.value,
            "ranks": list(fault.ranks),
            "nodes": list(fault.nodes),
            "confidence": fault.confidence.value,
            "since_step": fault.since_step,
            "evidence": dict(fault.evidence),
        }
        for fault in judged.faults
    ]
    if as_json:
        output.emit_json({"faults": found})
        return EXIT_OK
    _show_table(found)
    return EXIT_OK


def _write(path: Path, recording: bytes) -> None:
    from ckptd.files import write_atomic

    try:
        write_atomic(path, recording)
    except OSError as error:
        raise InvalidRequest(f"--record: {path} cannot be written: {error.strerror}", "name another folder") from error
    output.show_usage(f"recording: {path}")


def _check_recording(path: Path) -> None:
    """InvalidRequest when ``path`` would not be known as a recording."""
    from ckptd.replay.recording import SUFFIX

    if not path.name.endswith(SUFFIX):
        raise InvalidRequest(f"--record: {path} does not end in {SUFFIX}", f"for example {path.stem or 'run'}{SUFFIX}")


def _plot(path: Path, document: dict[str, Any]) -> None:
    """Before anything is shown: with --json an error must be the only document."""
    from ckptd.cli.plot import write_pictures

    write_pictures(path, document)
    output.show_usage(f"picture: {path}")


def _show(
    rows: Iterable[faults_pb2.FaultRow],
    coverage: Sequence[faults_pb2.RunCoverage],
    *,
    as_json: bool,
    is_stream: bool = False,
) -> None:
    from ckptd.cli.messages import plain

    found = [_plain(row) for row in rows]
    if as_json:
        document = {"faults": found, "coverage": [plain(item) for item in coverage]}
        if is_stream:
            output.line(json.dumps(document))
        else:
            output.emit_json(document)
        return
    _show_table(found)
    for item in coverage:
        if not item.is_judging:
            output.line(f"note: {item.run}: nobody judges it: its coordinator is gone, no daemon reaches half of it")
        elif item.ranks_heard < item.world_size:
            output.line(f"note: {item.run}: {item.ranks_heard} of {item.world_size} ranks are heard of")
        for problem in item.problems:
            output.line(f"note: {item.run}: {problem}")


def _plain(row: faults_pb2.FaultRow) -> dict[str, Any]:
    return {
        "run": row.run,
        "incarnation": str(incarnation_from_pb(row.incarnation)),
        "kind": row.kind,
        "ranks": list(row.ranks),
        "nodes": list(row.nodes),
        "confidence": row.confidence,
        "since_step": row.since_step,
        "first_seen_s": row.first_seen_s,
        "resolved_s": row.resolved_s or None,
        "evidence": json.loads(row.evidence or "{}"),
    }


def _show_table(found: Sequence[dict[str, Any]]) -> None:
    if not found:
        output.line("no faults")
        return
    has_runs = "run" in found[0]
    columns = ["KIND", "RANKS", "NODES", "CONFIDENCE", "SINCE STEP", "WHAT"]
    output.table(
        ["RUN", "SEEN", *columns] if has_runs else columns,
        [[*(_when(fault) if has_runs else ()), *_row(fault)] for fault in found],
    )


def _when(fault: dict[str, Any]) -> tuple[str, str | None]:
    seen = output.age(fault["first_seen_s"])
    return fault["run"], f"{seen}, over" if fault["resolved_s"] else seen


def _row(fault: dict[str, Any]) -> list[Any]:
    ranks, since = fault["ranks"], fault["since_step"]
    return [
        fault["kind"],
        few(ranks),
        ", ".join(fault["nodes"]),
        fault["confidence"],
        since if since >= 0 else None,
        fault["evidence"].get("summary"),
    ]
