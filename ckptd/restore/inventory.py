"""What exists of a run: complete snapshots in the memory of its nodes and in the tiers, and the known incarnations."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from ckptd.arena.records import IncarnationRecord, incarnation_from_json, incarnation_to_json
from ckptd.erasure.holdings import Holder, lost_ranks, world_sizes
from ckptd.errors import CkptdError, CommitConflict, Corrupt, FormatTooNew, RestoreUndecided, TierFailed, few
from ckptd.model import Incarnation, SnapshotId
from ckptd.restore.candidates import Ancestor, Available
from ckptd.tiers.tier import Tier

MEMORY = "memory"


def available(holders: Sequence[Holder], tiers: Sequence[Tier], run: str) -> list[Available]:
    """Every complete snapshot of ``run``, in the memory of all ``holders`` together or in a tier; RestoreUndecided when
    a tier does not answer, or holds what is too new."""
    found: dict[SnapshotId, tuple[int, list[str]]] = {}
    for snapshot, world_size in world_sizes(holders).items():
        if not lost_ranks(holders, snapshot, world_size):
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


def incarnations(
    records: Mapping[Incarnation, IncarnationRecord], tiers: Iterable[Tier], run: str
) -> dict[Incarnation, Ancestor]:
    """Every incarnation that a daemon or a tier recorded, and those named by checkpoints; RestoreUndecided."""
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
    for incarnation, own in records.items():
        known[incarnation] = Ancestor(own.is_decided, own.parent)
    return known


def explain_lost(
    holders: Sequence[Holder], lost_nodes: Mapping[str, str], ordered: Sequence[Available], found: Sequence[Available]
) -> list[str]:
    """A line for every snapshot that is newer than the best candidate and was lost with nodes."""
    best = ordered[0].snapshot if ordered else None
    durable = max((a.snapshot for a in found if any(s != MEMORY for s in a.sources)), default=None)
    newest = f"newest durable is step {durable.step}" if durable else "nothing is durable"
    notes = []
    for snapshot, world_size in sorted(world_sizes(holders).items(), reverse=True):
        lost = lost_ranks(holders, snapshot, world_size)
        if lost and lost_nodes and (best is None or snapshot > best):
            notes.append(
                f"{snapshot} is not recoverable: the shards of ranks {few(sorted(lost))} "
                f"are lost with {_some(lost_nodes)}, "
                f"more than parity makes up for; {newest}"
            )
    return notes


def check_nothing_lost(holders: Sequence[Holder], lost_nodes: Mapping[str, str]) -> None:
    """RestoreUndecided when there is no candidate, but shards or parity are held and nodes that held more are gone: a
    run that had a snapshot does not start from scratch by itself."""
    held = any(holder.ranks or holder.parity for holder in holders)
    if held and lost_nodes:
        notes = explain_lost(holders, lost_nodes, (), ()) or [f"{_some(lost_nodes)} did not answer"]
        raise RestoreUndecided(notes[0])


def _some(nodes: Mapping[str, str]) -> str:
    shown = ", ".join(f"{node} ({why})" for node, why in sorted(nodes.items())[:3])
    return f"{len(nodes)} node{'s' if len(nodes) != 1 else ''}: {shown}" + (" ..." if len(nodes) > 3 else "")


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
