"""`ckptd prune`: what retention lets go, and commits that a dead coordinator left unfinished."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from ckptd.errors import CkptdError
from ckptd.format.manifest import Manifest
from ckptd.serve.catalog import tier_rows
from ckptd.serve.coordinator import expendable_in
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
    """Checkpoints whose arrays are all in the tier but whose manifest was never put: commit them."""
    actions = []
    for tier in node.tiers:
        for row in tier_rows(tier, run):
            if row.state != "uncommitted":
                continue
            action = pb.PruneAction(verb="finish", checkpoint=row, reason="its commit was interrupted")
            manifest = next(_manifests(node, tier, run, row), None)
            if manifest is None:
                action.problem = "not in memory any more: it cannot be finished"
            elif missing := tier.missing(manifest):
                action.problem = f"{len(missing)} parts are missing, the first is {missing[0]}"
            elif is_applied:
                _do(action, lambda tier=tier, manifest=manifest: tier.commit(manifest))  # type: ignore[misc]
            actions.append(action)
    return actions


def _manifests(node: Node, tier: Tier, run: str, row: pb.CheckpointRow) -> Iterator[Manifest]:
    """The manifest of an uncommitted checkpoint, from the slots it was written from, when all of them are here."""
    snapshot = snapshot_from_pb(row.snapshot)
    slots = [s for s in node.arena.sealed(run) if s.header and s.header.snapshot == snapshot]
    headers = [s.sealed_header for s in slots]
    if not slots or len({h.rank for h in headers}) != headers[0].world_size:
        return
    records = tuple(
        tier.write_rank(run, snapshot, s.sealed_header.rank, s.sealed_header.layout, s.payload, s.table) for s in slots
    )
    first = headers[0]
    yield Manifest(
        run=run,
        snapshot=snapshot,
        parent=first.parent,
        world_size=first.world_size,
        roster_version=first.roster_version,
        block_bytes=first.layout.block_bytes,
        created_at_s=time.time(),
        ranks=tuple(sorted(records, key=lambda r: r.rank)),
    )


def _do(action: pb.PruneAction, work: Callable[[], object]) -> None:
    try:
        work()
    except CkptdError as error:
        action.problem = str(error)
    else:
        action.is_done = True
