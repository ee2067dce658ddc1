"""Between the messages of the wire and the values of ``ckptd.model``: the only place that knows both.

Layer: above ``ckptd.model``, used by ``ckptd.serve``, ``ckptd.cli`` and ``ckptd_client``; pure. An absent message is an
absent value: ``from_pb`` of a field that was not set is asked for only after ``HasField``.
"""

from __future__ import annotations

from ckptd.model import Incarnation, Roster, RosterEntry, ScheduleEntry, SnapshotId
from ckptd_api.v1 import types_pb2


def incarnation_to_pb(value: Incarnation) -> types_pb2.Incarnation:
    return types_pb2.Incarnation(ordinal=value.ordinal, id=value.id)


def incarnation_from_pb(message: types_pb2.Incarnation) -> Incarnation:
    return Incarnation(message.ordinal, message.id)


def snapshot_to_pb(value: SnapshotId) -> types_pb2.SnapshotId:
    return types_pb2.SnapshotId(incarnation=incarnation_to_pb(value.incarnation), step=value.step)


def snapshot_from_pb(message: types_pb2.SnapshotId) -> SnapshotId:
    return SnapshotId(incarnation_from_pb(message.incarnation), message.step)


def schedule_entry_to_pb(value: ScheduleEntry) -> types_pb2.ScheduleEntry:
    return types_pb2.ScheduleEntry(
        from_step=value.from_step, every_steps=value.every_steps, persist_steps=value.persist_steps
    )


def schedule_entry_from_pb(message: types_pb2.ScheduleEntry) -> ScheduleEntry:
    return ScheduleEntry(message.from_step, message.every_steps, message.persist_steps)


def roster_entry_to_pb(value: RosterEntry) -> types_pb2.RosterEntry:
    return types_pb2.RosterEntry(
        rank=value.rank,
        node_id=value.node_id,
        address=value.address,
        nonce=value.nonce,
        domains=dict(value.domains),
        protect_max=value.protect_max,
        slots=value.slots,
        estimated_bytes=value.estimated_bytes,
    )


def roster_entry_from_pb(message: types_pb2.RosterEntry) -> RosterEntry:
    """Domains come sorted: a protobuf map has no order, and equal rosters must compare equal on every node."""
    return RosterEntry(
        rank=message.rank,
        node_id=message.node_id,
        address=message.address,
        nonce=message.nonce,
        domains=tuple(sorted(message.domains.items())),
        protect_max=message.protect_max,
        slots=message.slots,
        estimated_bytes=message.estimated_bytes,
    )


def roster_to_pb(value: Roster) -> types_pb2.Roster:
    return types_pb2.Roster(
        version=value.version,
        incarnation_id=value.incarnation_id,
        block_bytes=value.block_bytes,
        entries=[roster_entry_to_pb(entry) for entry in value.entries],
        protect=value.protect,
        from_step=value.from_step,
    )


def roster_from_pb(message: types_pb2.Roster) -> Roster:
    return Roster(
        version=message.version,
        incarnation_id=message.incarnation_id,
        block_bytes=message.block_bytes,
        entries=tuple(roster_entry_from_pb(entry) for entry in message.entries),
        protect=message.protect or "off",
        from_step=message.from_step,
    )
