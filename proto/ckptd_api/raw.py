"""Messages that carry bulk data, encoded and decoded by hand: protobuf would copy every payload twice more.

Layer: beside the generated modules; standard library only. The bytes are exactly those of the messages in the protos,
so any protobuf client can send and read them.
"""

from __future__ import annotations

from collections.abc import Mapping

_VARINT, _BYTES = 0, 2
Value = int | str | bytes | memoryview


def encode(fields: Mapping[int, Value]) -> bytes:
    """A message of integer (varint), string and bytes fields by number; zero and empty ones are left out."""
    parts: list[bytes | memoryview] = []
    for number, value in fields.items():
        if isinstance(value, str):
            value = value.encode()
        if isinstance(value, int):
            if value:
                parts.append(_varint(number << 3 | _VARINT) + _varint(value))
        elif len(value):
            parts += [_varint(number << 3 | _BYTES) + _varint(len(value)), value]
    return b"".join(parts)


class Fields(dict[int, int | memoryview]):
    """The fields of a message by number; ValueError when one is not of the kind asked for."""

    def integer(self, number: int) -> int:
        value = self.get(number, 0)
        if not isinstance(value, int):
            raise ValueError(f"field {number} is not a number")  # noqa: TRY004  like every malformed message
        return value

    def data(self, number: int) -> memoryview:
        value = self.get(number, memoryview(b""))
        if isinstance(value, int):
            raise ValueError(f"field {number} is a number")  # noqa: TRY004  like every malformed message
        return value


def decode(message: bytes) -> Fields:
    """The fields of a message, bytes as views of it; ValueError when it is no message of integers and bytes."""
    view, at = memoryview(message), 0
    fields = Fields()
    try:
        while at < len(view):
            key, at = _read_varint(view, at)
            value, at = _read_varint(view, at)
            if key & 7 == _VARINT:
                fields[key >> 3] = value
            elif key & 7 == _BYTES and at + value <= len(view):
                fields[key >> 3], at = view[at : at + value], at + value
            else:
                raise ValueError("not a message of integers and bytes")
    except IndexError as error:
        raise ValueError("the message is cut short") from error
    return fields


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _read_varint(view: memoryview, at: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        byte = view[at]
        result |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return result, at
        shift += 7
