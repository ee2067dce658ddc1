"""Arguments of ``Checkpointer``, checked: what can never work is refused at construction, with what to pass instead."""

from __future__ import annotations

import os
import uuid
from datetime import timedelta

from ckptd.errors import InvalidRequest
from ckptd.model import Geometry, check_run_name
from ckptd_api.v1 import types_pb2


def resolve_run(run: str | None) -> str:
    """The run's name: the argument, else CKPTD_RUN, else TORCHELASTIC_RUN_ID unless that is torchrun's default (the
    same for every job, or new at each launch); else InvalidRequest."""
    if given := run or os.environ.get("CKPTD_RUN"):
        return check_run_name(given)
    elastic = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if elastic and elastic != "none" and not _is_uuid(elastic):
        return check_run_name(elastic)
    raise InvalidRequest(
        "this training job has no run name", 'pass run="name", or set CKPTD_RUN: it must be the same at every restart'
    )


def _is_uuid(text: str) -> bool:
    try:
        uuid.UUID(text)
    except ValueError:
        return False
    return True


def interval(value: int | timedelta | str, name: str) -> types_pb2.Interval:
    """``value`` (steps, a time, or "auto") of the argument ``name``, for the wire."""
    if value == "auto":
        return types_pb2.Interval(automatic=True)
    if isinstance(value, timedelta) and value > timedelta():
        return types_pb2.Interval(seconds=value.total_seconds())
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return types_pb2.Interval(steps=value)
    raise InvalidRequest(f"{name}={value!r} is not an interval", 'use a number of steps, a timedelta, or "auto"')


def protection(protect: str) -> str:
    """The wished geometry: "off", "auto", or k+m in its one spelling."""
    if protect in ("off", "auto"):
        return protect
    try:
        return str(Geometry.parse(str(protect)))
    except InvalidRequest as error:
        raise InvalidRequest(
            f"protect={protect!r} is not valid", f'use "auto", "off" or "k+m": {error.hint}'
        ) from error
