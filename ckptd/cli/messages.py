"""Messages of the wire as plain values, for ``--json``: the field names of the .proto files, numbers as numbers.

Layer: ``cli``; pure. An incarnation is its text (as in manifests and folder names), an absent value is null; unlike
protobuf's own JSON mapping, which makes strings of 64-bit numbers and leaves zeros out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf.message import Message

from ckptd_api.convert import incarnation_from_pb
from ckptd_api.v1 import types_pb2


def plain(message: Message) -> Any:
    """``message`` as dicts, lists, numbers, strings and None."""
    if isinstance(message, types_pb2.Incarnation):
        return str(incarnation_from_pb(message))
    return {
        field.name: None
        if field.has_presence and not message.HasField(field.name)
        else _value(getattr(message, field.name))
        for field in message.DESCRIPTOR.fields
    }


def _value(value: Any) -> Any:
    if isinstance(value, Message):
        return plain(value)
    if isinstance(value, bool | int | float | str):
        return value
    return dict(value) if isinstance(value, Mapping) else [_value(item) for item in value]
