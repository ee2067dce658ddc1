"""Rows of checkpoints as people read them; shared by ``ls``, ``show`` and ``prune``. Layer: ``cli``; pure."""

from __future__ import annotations

from ckptd_api.convert import incarnation_from_pb
from ckptd_api.v1 import operator_pb2


def incarnation_text(row: operator_pb2.CheckpointRow) -> str:
    return str(incarnation_from_pb(row.snapshot.incarnation))


def parent_text(row: operator_pb2.CheckpointRow) -> str | None:
    """Where the incarnation started from: ``step@ordinal``; None when from scratch."""
    return f"{row.parent.step}@{row.parent.incarnation.ordinal}" if row.HasField("parent") else None
