"""``ckptd verify``: every copy read again and every block held against its checksum, by the daemon."""

from __future__ import annotations

from typing import Annotated

import typer

from ckptd.cli import options, output
from ckptd.errors import EXIT_DATA_LOST, EXIT_OK, UnknownRun, UnknownStep
from ckptd_api.convert import incarnation_from_pb
from ckptd_api.v1 import operator_pb2


def verify(
    run: options.Run,
    step: Annotated[int | None, typer.Argument(metavar="[STEP]", min=0, help="Only this step.")] = None,
    socket: options.Socket = None,
    as_json: options.Json = False,
) -> int:
    """Check every block of every copy of RUN.

    In memory and in every tier. Exits 4 when a copy is corrupt.
    """
    from ckptd.cli import channel

    last = operator_pb2.VerifyResponse()
    findings: dict[bytes, operator_pb2.Finding] = {}
    request = operator_pb2.VerifyRequest(run=run, step=step)
    with channel.connect(socket) as daemon, output.progress(f"verify {run}") as advance:
        for last in daemon.stream(daemon.stub.Verify, request):
            advance(last.bytes_done, last.bytes_total)
            # By content: a finding may be sent as it is made and again with the last message.
            findings |= {finding.SerializeToString(deterministic=True): finding for finding in last.findings}
    if not last.copies_checked and not findings:
        # Nothing checked must not read as nothing wrong.
        if step is None:
            raise UnknownRun(f"run {run!r} has no copy to verify")
        raise UnknownStep(f"step {step} of run {run!r} has no copy to verify")
    _show(last, list(findings.values()), as_json=as_json)
    return EXIT_DATA_LOST if findings else EXIT_OK


def _show(last: operator_pb2.VerifyResponse, findings: list[operator_pb2.Finding], *, as_json: bool) -> None:
    if as_json:
        from ckptd.cli.messages import plain

        output.emit_json(
            {
                "bytes_checked": last.bytes_done,
                "copies_checked": last.copies_checked,
                "findings": [plain(finding) for finding in findings],
            }
        )
        return
    found = f"{len(findings)} finding{'s' if len(findings) != 1 else ''}" if findings else "no findings"
    copies = f"{last.copies_checked} {'copy' if last.copies_checked == 1 else 'copies'}"
    output.line(f"checked {copies}, {output.size(last.bytes_done)}: {found}")
    if findings:
        output.table(
            ["STEP", "INCARNATION", "SOURCE", "PROBLEM"],
            [
                [f.snapshot.step, str(incarnation_from_pb(f.snapshot.incarnation)), f.source, f.problem]
                for f in findings
            ],
        )
