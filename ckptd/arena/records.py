"""What the arena remembers of a run besides its slots: owner, incarnations, what each restored, the last roster.

One JSON file a run, replaced atomically, so that a restarted daemon knows the order of incarnations and which branch
was abandoned even when nothing of the newest incarnation was ever staged.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ckptd.errors import Corrupt
from ckptd.files import write_atomic
from ckptd.format.manifest import snapshot_from_json, snapshot_to_json
from ckptd.model import Action, Incarnation, Roster, RosterEntry, SnapshotId

_PREFIX = "run-"


@dataclass(frozen=True, slots=True)
class IncarnationRecord:
    """One incarnation: the snapshot it restored (``parent``), whether it decided, and whether every rank left."""

    incarnation: Incarnation
    world_size: int
    is_decided: bool = False
    parent: SnapshotId | None = None
    is_ended: bool = False
    roster: Roster | None = None


@dataclass
class RunRecord:
    """A run as its daemon remembers it; ``incarnations`` by ordinal and id, oldest first; ``actions`` on its nodes that
    this daemon recorded, oldest first."""

    run: str
    owner: str
    incarnations: dict[Incarnation, IncarnationRecord] = field(default_factory=dict)
    actions: tuple[Action, ...] = ()

    @property
    def newest(self) -> IncarnationRecord | None:
        return self.incarnations[max(self.incarnations)] if self.incarnations else None


def incarnation_to_json(record: IncarnationRecord) -> dict[str, Any]:
    return {
        "incarnation": str(record.incarnation),
        "world_size": record.world_size,
        "is_decided": record.is_decided,
        "parent": snapshot_to_json(record.parent),
        "is_ended": record.is_ended,
        "roster": asdict(record.roster) if record.roster else None,
    }


def incarnation_from_json(value: dict[str, Any]) -> IncarnationRecord:
    roster = value.get("roster")
    return IncarnationRecord(
        Incarnation.parse(value["incarnation"]),
        value["world_size"],
        value["is_decided"],
        snapshot_from_json(value["parent"]),
        value["is_ended"],
        _roster_from_json(roster) if roster else None,
    )


def save_record(folder: Path, record: RunRecord) -> None:
    body = {
        "run": record.run,
        "owner": record.owner,
        "incarnations": [incarnation_to_json(r) for _, r in sorted(record.incarnations.items())],
        "actions": [asdict(action) for action in record.actions],
    }
    # Shared memory does not outlive a power cut, so there is nothing to sync.
    write_atomic(folder / f"{_PREFIX}{record.run}.json", json.dumps(body).encode(), sync=False)


def load_records(folder: Path) -> Iterator[RunRecord | Corrupt]:
    """Every run's record in ``folder``; a Corrupt in place of one that cannot be read."""
    for path in sorted(folder.glob(f"{_PREFIX}*.json")):
        try:
            body = json.loads(path.read_bytes())
            records = [incarnation_from_json(value) for value in body["incarnations"]]
            actions = tuple(Action(**value) for value in body.get("actions", ()))
            yield RunRecord(body["run"], body["owner"], {r.incarnation: r for r in records}, actions)
        except (ValueError, KeyError, TypeError) as error:
            yield Corrupt(f"{path.name}: cannot be decoded: {error}")


def delete_record(folder: Path, run: str) -> None:
    (folder / f"{_PREFIX}{run}.json").unlink(missing_ok=True)


def _roster_from_json(value: dict[str, Any]) -> Roster:
    entries = tuple(
        RosterEntry(**{**entry, "domains": tuple((k, v) for k, v in entry["domains"])}) for entry in value["entries"]
    )
    return Roster(
        value["version"],
        value["incarnation_id"],
        value["block_bytes"],
        entries,
        value.get("protect", "off"),
        value.get("from_step", 0),
    )
