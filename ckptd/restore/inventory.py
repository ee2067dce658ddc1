"""What exists of a run on this node: complete snapshots in memory and in the tiers, and the known incarnations."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from ckptd.arena.arena import Arena
from ckptd.arena.records import IncarnationRecord, RunRecord, incarnation_from_json, incarnation_to_json
from ckptd.errors import CkptdError, CommitConflict, Corrupt, FormatTooNew, RestoreUndecided, TierFailed
from ckptd.model import Incarnation, SnapshotId
from ckptd.restore.candidates import Ancestor, Available
from ckptd.tiers.tier import Tier

MEMORY = "memory"


def in_memory(arena: Arena, run: str) -> dict[SnapshotId, tuple[int, set[int]]]:
    """Per snapshot with sealed slots here: (world size, ranks held)."""
    held: dict[SnapshotId, tuple[int, set[int]]] = {}
    for slot in arena.sealed(run):
        if header := slot.header:
            held.setdefault(header.snapshot, (header.world_size, set()))[1].add(header.rank)
    return held


def available(arena: Arena, tiers: Sequence[Tier], run: str) -> list[Available]:
    """Every complete snapshot of ``run``; RestoreUndecided when a tier does not answer, or holds what is too new."""
    found: dict[SnapshotId, tuple[int, list[str]]] = {}
    for snapshot, (world_size, ranks) in in_memory(arena, run).items():
        if len(ranks) == world_size:
            found[snapshot] = (world_size, [MEMORY])
    for tier in tiers:
        try:
            stored = [s.snapshot for s in tier.snapshots(run) if s.is_committed]
        except CkptdError as error:
            raise RestoreUndecided(f"tier {tier.spec.url} did not answer: {error.message}") from error
        for snapshot in stored:
            saved_by = _world_size(tier, run, snapshot)
            if saved_by is not None:
                found.setdefault(snapshot, (saved_by, []))[1].append(tier.spec.url)
    return [Available(s, world_size, tuple(sources)) for s, (world_size, sources) in found.items()]


def _world_size(tier: Tier, run: str, snapshot: SnapshotId) -> int | None:
    """From the manifest; None when that is corrupt: such a checkpoint is no candidate, `ckptd verify` names it."""
    try:
        return tier.manifest(run, snapshot).world_size
    except Corrupt:
        return None
    except FormatTooNew as error:
        raise RestoreUndecided(f"tier {tier.spec.url}: {error.message}", error.hint) from error
    except TierFailed as error:
        raise RestoreUndecided(f"tier {tier.spec.url} did not answer: {error.message}") from error


def incarnations(record: RunRecord | None, tiers: Iterable[Tier], run: str) -> dict[Incarnation, Ancestor]:
    """Every incarnation that this node or a tier recorded, and those named by checkpoints; RestoreUndecided."""
    known: dict[Incarnation, Ancestor] = {}
    for tier in tiers:
        try:
            for data in tier.incarnations(run).values():
                stored = incarnation_from_json(json.loads(data))
                known[stored.incarnation] = Ancestor(stored.is_decided, stored.parent)
            for item in tier.snapshots(run):
                known.setdefault(item.snapshot.incarnation, Ancestor(False, None))
        except (CkptdError, ValueError, KeyError) as error:
            raise RestoreUndecided(f"tier {tier.spec.url} did not answer: {error}") from error
    for incarnation, own in (record.incarnations if record else {}).items():
        known[incarnation] = Ancestor(own.is_decided, own.parent)
    return known


def record_in_tiers(tiers: Iterable[Tier], run: str, record: IncarnationRecord) -> list[str]:
    """Keep the decision where it survives the loss of all memory. Returns what failed: the decision stands anyway."""
    problems = []
    data = json.dumps({**incarnation_to_json(record), "roster": None}).encode()
    for tier in tiers:
        try:
            tier.record_incarnation(run, str(record.incarnation), data)
        except CommitConflict:
            continue  # recorded before
        except CkptdError as error:
            problems.append(f"{tier.spec.url}: {error.message}")
    return problems
