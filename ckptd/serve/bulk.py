"""The write stream, decoded by hand: protobuf would copy every payload twice more than the one copy into the slot.

The bytes are exactly WriteRequest (fields 1 slot, 2 generation, 3 offset, 4 data), so any protobuf client can send
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from ckptd.arena.slot import Slot
from ckptd.errors import InvalidRequest
from ckptd.failpoints import failpoint
from ckptd.format.slot import write_mark

_SLOT, _GENERATION, _OFFSET, _DATA = 1, 2, 3, 4
_VARINT, _BYTES = 0, 2


def receive(messages: Iterator[bytes], slot_of: Callable[[str, int], Slot]) -> int:
    """Put a stream of WriteRequest messages into the slot the first one names; the bytes written.

    InvalidRequest when a message is not one, does not follow the one before, or goes beyond the payload.
    """
    slot: Slot | None = None
    written = 0
    for message in messages:
        fields, data = _decode(message)
        if slot is None:
            slot = slot_of(str(fields.get(_SLOT, "")), int(fields.get(_GENERATION, 0)))
            generation = slot.generation
            payload = np.frombuffer(slot.payload, np.uint8)
        failpoint("write.chunk")
        offset = int(fields.get(_OFFSET, 0))
        if offset != written or offset + len(data) > len(payload):
            raise InvalidRequest(f"write at {offset}: expected {written}, payload is {len(payload)} bytes")
        if slot.generation != generation:
            raise InvalidRequest(f"slot {slot.id} was taken back: its step is dead")
        # NumPy lets other threads run while bytes move; a memoryview would not.
        np.copyto(payload[offset : offset + len(data)], np.frombuffer(data, np.uint8))
        written += len(data)
        write_mark(slot.page, written)
        slot.advance()  # now, while the bytes are in this core's cache
    return written


def _decode(message: bytes) -> tuple[dict[int, int | str], memoryview]:
    """(the fields but data, a view of data)."""
    view, at = memoryview(message), 0
    fields: dict[int, int | str] = {}
    data = view[:0]
    try:
        while at < len(view):
            key, at = _varint(view, at)
            value, at = _varint(view, at)
            if key & 7 == _VARINT:
                fields[key >> 3] = value
            elif key & 7 == _BYTES and at + value <= len(view):
                part, at = view[at : at + value], at + value
                if key >> 3 == _DATA:
                    data = part
                else:
                    fields[key >> 3] = bytes(part).decode()
            else:
                raise InvalidRequest("not a WriteRequest")
    except (IndexError, UnicodeDecodeError) as error:
        raise InvalidRequest("not a WriteRequest") from error
    return fields, data


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        byte = view[at]
        result |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return result, at
        shift += 7
