"""`ckptd prune`: what retention lets go, and commits that a dead coordinator left unfinished."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from ckptd.arena.slot import Slot
from ckptd.errors import CkptdError, DrainFailed
from ckptd.format.manifest import Manifest
from ckptd.model import SnapshotId
from ckptd.serve.catalog import tier_rows
from ckptd.serve.commits import expendable_in
from ckptd.serve.node import Node
from ckptd.tiers.tier import Tier
from ckptd_api.convert import snapshot_from_pb
from ckptd_api.v1 import operator_pb2 as pb


def prune_actions(node: Node, run: str, is_applied: bool) -> list[pb.PruneAction]:
    """Deletions by each tier's retention rule; done only when ``is_applied``."""
    actions = []
    for tier in node.tiers:
        rows = {
            (r.snapshot.incarnation.ordinal, r.snapshot.incarnation.id, r.snapshot.step): r
            for r in tier_rows(tier, run)
        }
        for snapshot in expendable_in(tier, run, node.draining_of(run)):
            row = rows[snapshot.incarnation.ordinal, snapshot.incarnation.id, snapshot.step]
            action = pb.PruneAction(verb="delete", checkpoint=row, reason=f"beyond keep={tier.spec.keep}")
            if row.state == "uncommitted":
                action.reason = "never committed, and a newer checkpoint was"
            if is_applied:
                _do(action, lambda tier=tier, snapshot=snapshot: tier.delete(run, snapshot))  # type: ignore[misc]
            actions.append(action)
    if node.is_ended(run) and is_applied:
        node.forget(run)
    return actions


def finish_actions(node: Node, run: str, is_applied: bool) -> list[pb.PruneAction]:
    """Checkpoints without a manifest whose shards are all in memory: write what is missing and commit them. Those that
    are being drained are left to their drain."""
    actions = []
    for tier in node.tiers:
        draining = node.draining_of(run)
        for row in tier_rows(tier, run):
            snapshot = snapshot_from_pb(row.snapshot)
            if row.state != "uncommitted" or snapshot in draining:
                continue
            action = pb.PruneAction(verb="finish", checkpoint=row, reason="its commit was interrupted")
            slots = [s for s in node.arena.sealed(run) if s.header and s.header.snapshot == snapshot]
            if not slots or len({s.sealed_header.rank for s in slots}) != slots[0].sealed_header.world_size:
                action.problem = "not in memory any more: it cannot be finished"
            elif is_applied:
                _do(action, partial(_finish, node, tier, run, snapshot, slots))
            actions.append(action)
    return actions


def _finish(node: Node, tier: Tier, run: str, snapshot: SnapshotId, slots: list[Slot]) -> None:
    """Write every rank's shard (what is there already is left as it is), then the manifest."""
    leases = [node.arena.lease(slot, f"finish/{run}") for slot in slots]
    try:
        headers = [slot.sealed_header for slot in slots]
        if any(header.snapshot != snapshot for header in headers):
            raise DrainFailed(f"{snapshot}: its slots were recycled meanwhile")
        records = [
            tier.write_rank(run, snapshot, header.rank, header.layout, slot.payload, slot.table)
            for slot, header in zip(slots, headers, strict=True)
        ]
        tier.commit(
            Manifest(
                run=run,
                snapshot=snapshot,
                parent=headers[0].parent,
                world_size=headers[0].world_size,
                roster_version=headers[0].roster_version,
                block_bytes=headers[0].layout.block_bytes,
                created_at_s=time.time(),
                ranks=tuple(sorted(records, key=lambda record: record.rank)),
            )
        )
    finally:
        for lease in leases:
            node.arena.release(lease.id)


def _do(action: pb.PruneAction, work: Callable[[], object]) -> None:
    try:
        work()
    except CkptdError as error:
        action.problem = str(error)
    else:
        action.is_done = True
