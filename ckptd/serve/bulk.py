"""The write stream: WriteRequest messages taken as raw bytes, so that a payload is copied once, into the slot."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from ckptd.arena.slot import Slot
from ckptd.errors import InvalidRequest
from ckptd.failpoints import failpoint
from ckptd.format.slot import write_mark
from ckptd_api.raw import decode

_SLOT, _GENERATION, _OFFSET, _DATA = 1, 2, 3, 4


def receive(messages: Iterator[bytes], slot_of: Callable[[str, int], Slot]) -> int:
    """Put a stream of WriteRequest messages into the slot the first one names; the bytes written.

    InvalidRequest when a message is not one, does not follow the one before, or goes beyond the payload.
    """
    slot: Slot | None = None
    written = 0
    for message in messages:
        slot_id, wanted, offset, data = _decode(message)
        if slot is None:
            slot = slot_of(slot_id, wanted)
            generation = slot.generation
            payload = np.frombuffer(slot.payload, np.uint8)
        failpoint("write.chunk")
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


def _decode(message: bytes) -> tuple[str, int, int, memoryview]:
    """(slot, generation, offset, data) of one message."""
    try:
        fields = decode(message)
        slot = bytes(fields.data(_SLOT)).decode()
        return slot, fields.integer(_GENERATION), fields.integer(_OFFSET), fields.data(_DATA)
    except ValueError as error:
        raise InvalidRequest(f"not a WriteRequest: {error}") from error
