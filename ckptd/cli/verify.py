"""``ckptd verify``: every copy read again and every block held against its checksum, by the daemon.

A node of several holds a part of a run: its own shards, parity for its peers, and what the tiers have of all.
"""

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
    """Check every block of what this node holds of RUN.

    In its memory, in its parity, which is held against the data of its peers too, and in the tiers; other nodes check
    theirs. Exits 4 when a copy is corrupt; what can be made again from others is, at once.
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
    # One that names no snapshot is a note: nothing is wrong, but something could not be checked.
    notes = [finding.problem for finding in findings.values() if not finding.HasField("snapshot")]
    wrong = [finding for finding in findings.values() if finding.HasField("snapshot")]
    if not last.copies_checked and not wrong:
        # Nothing checked must not read as nothing wrong.
        if step is None:
            raise UnknownRun(f"run {run!r} has no copy to verify")
        raise UnknownStep(f"step {step} of run {run!r} has no copy to verify")
    _show(last, wrong, notes, as_json=as_json)
    return EXIT_DATA_LOST if wrong else EXIT_OK


def _show(
    last: operator_pb2.VerifyResponse, findings: list[operator_pb2.Finding], notes: list[str], *, as_json: bool
) -> None:
    if as_json:
        from ckptd.cli.messages import plain

        output.emit_json(
            {
                "bytes_checked": last.bytes_done,
                "copies_checked": last.copies_checked,
                "findings": [plain(finding) for finding in findings],
                "notes": notes,
            }
        )
        return
    found = f"{len(findings)} finding{'s' if len(findings) != 1 else ''}" if findings else "no findings"
    copies = f"{last.copies_checked} {'copy' if last.copies_checked == 1 else 'copies'}"
    where = "in this node's memory, its parity and the tiers"
    output.line(f"checked {copies}, {output.size(last.bytes_done)}, {where}: {found}")
    for note in notes:
        output.line(f"note: {note}")
    if findings:
        output.table(
            ["STEP", "INCARNATION", "SOURCE", "PROBLEM"],
            [
                [f.snapshot.step, str(incarnation_from_pb(f.snapshot.incarnation)), f.source, f.problem]
                for f in findings
            ],
        )
