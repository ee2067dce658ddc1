"""`ckptd verify`: re-read every copy of a run's checkpoints and check every block, reporting as it goes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

from ckptd.errors import CkptdError, Corrupt
from ckptd.restore.inventory import MEMORY
from ckptd.serve.node import Node
from ckptd_api.convert import snapshot_from_pb
from ckptd_api.v1 import operator_pb2 as pb


def verify(node: Node, rows: list[pb.CheckpointRow]) -> Iterator[pb.VerifyResponse]:
    """Progress as it grows, findings as they are made; copies that are not complete are not copies and are passed."""
    total = sum(row.size_bytes for row in rows)
    answer = pb.VerifyResponse(bytes_total=total)
    yield answer
    for row in (row for row in rows if row.state != "uncommitted"):
        done_before = answer.bytes_done
        for done, problems in _check(node, row):
            findings = [pb.Finding(source=row.source, snapshot=row.snapshot, problem=p) for p in problems]
            answer = pb.VerifyResponse(
                bytes_total=total,
                bytes_done=min(total, done_before + done),
                copies_checked=answer.copies_checked,
                findings=findings,
            )
            yield answer
        node.metrics.bytes_total.labels(row.run, "verified").inc(row.size_bytes)
        answer.copies_checked += 1
        answer.bytes_done = min(total, done_before + row.size_bytes)
        answer.ClearField("findings")
    yield answer


def _check(node: Node, row: pb.CheckpointRow) -> Iterator[tuple[int, list[str]]]:
    """(bytes done, problems found) as the copy is read."""
    check = _check_memory if row.source == MEMORY else _check_tier
    for done, problems in check(node, row):
        place = "memory" if row.source == MEMORY else "tier"
        node.metrics.corrupt_total.labels(row.run, place).inc(len(problems))
        yield done, problems


def _check_memory(node: Node, row: pb.CheckpointRow) -> Iterator[tuple[int, list[str]]]:
    snapshot, done = snapshot_from_pb(row.snapshot), 0
    for slot in node.arena.sealed(row.run):
        if slot.header is None or slot.header.snapshot != snapshot:
            continue
        lease = node.arena.lease(slot, "verify")
        try:
            slot.check(node.arena.checksummer.pool)
        except Corrupt as error:
            yield done, [f"rank {slot.header.rank}: {error.message}"]
        finally:
            node.arena.release(lease.id)
        done += slot.header.layout.payload_bytes
        yield done, []


def _check_tier(node: Node, row: pb.CheckpointRow) -> Iterator[tuple[int, list[str]]]:
    """The tier's verify runs on a thread, so that its progress can be passed on while it reads."""
    tier = next(t for t in node.tiers if t.spec.url == row.source)
    events: queue.Queue[int | list[str]] = queue.Queue()

    def read() -> None:
        try:
            events.put(tier.verify(row.run, snapshot_from_pb(row.snapshot), events.put))
        except CkptdError as error:
            events.put([error.message])
        except Exception as error:  # noqa: BLE001  a thread's boundary: the reader must hear of the end
            events.put([f"{type(error).__name__}: {error}"])

    threading.Thread(target=read, name="verify", daemon=True).start()
    done = 0
    while isinstance(event := events.get(), int):
        done += event
        yield done, []
    yield done, event
