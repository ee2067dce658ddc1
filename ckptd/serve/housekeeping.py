"""`ckptd prune`: what retention lets go, and commits that a dead coordinator left unfinished."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial

from ckptd.erasure.holdings import Holder, lost_ranks, world_sizes
from ckptd.errors import CkptdError
from ckptd.format.manifest import Manifest
from ckptd.model import SnapshotId
from ckptd.restore.inventory import MEMORY
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
    """Checkpoints without a manifest whose shards are all in the memory of the run's nodes, or can be reconstructed:
    write what is missing and commit them. Those that are being drained are left to their drain."""
    actions = []
    record = node.records.get(run)
    roster = record.newest.roster if record and record.newest else None
    holders = node.peering.cluster.holders(run, roster.entries if roster else ())
    sizes = world_sizes(holders)
    for tier in node.tiers:
        draining = node.draining_of(run) - _orphaned(node, run)
        for row in tier_rows(tier, run):
            snapshot = snapshot_from_pb(row.snapshot)
            if row.state != "uncommitted" or snapshot in draining:
                continue
            action = pb.PruneAction(verb="finish", checkpoint=row, reason="its commit was interrupted")
            if snapshot not in sizes or lost_ranks(holders, snapshot, sizes[snapshot]):
                action.problem = "not in memory any more: it cannot be finished"
            elif is_applied:
                _do(action, partial(_finish, node, tier, run, snapshot, sizes[snapshot], holders))
            actions.append(action)
    return actions


def _orphaned(node: Node, run: str) -> set[SnapshotId]:
    """What waits for a commit by a coordinator that cannot be reached."""
    cut_off = [r for r in node.node_runs() if r.run == run and r.reporter.problem is not None]
    return {snapshot for node_run in cut_off for snapshot in node_run.draining_ids()}


def _finish(node: Node, tier: Tier, run: str, snapshot: SnapshotId, world_size: int, holders: Sequence[Holder]) -> None:
    """Write every rank's shard (what is there already is left as it is), one after the other through this node's
    memory, then the manifest."""
    holder, records = f"finish/{run}/{snapshot}", []
    for rank in range(world_size):
        lease, _ = node.peering.fetcher.fetch(
            run, snapshot, rank, world_size, MEMORY, os.getuid(), holder, lambda: holders
        )
        try:
            slot, header = lease.slot, lease.slot.sealed_header
            records.append(tier.write_rank(run, snapshot, rank, header.layout, slot.payload, slot.table))
        finally:
            node.arena.release(lease.id)
    tier.commit(
        Manifest(
            run=run,
            snapshot=snapshot,
            parent=header.parent,
            world_size=world_size,
            roster_version=header.roster_version,
            block_bytes=header.layout.block_bytes,
            created_at_s=time.time(),
            ranks=tuple(records),
        )
    )


def _do(action: pb.PruneAction, work: Callable[[], object]) -> None:
    try:
        work()
    except CkptdError as error:
        action.problem = str(error)
    else:
        action.is_done = True
