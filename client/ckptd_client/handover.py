"""How captured bytes reach the daemon: into its memory, mapped here, or as a gRPC stream when memory cannot be shared.

Both are a ``Target``: a payload buffer to copy into, and a mark to publish. ``CKPTD_HANDOVER=shm|grpc|auto`` chooses.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any, Final, Protocol

import numpy as np

from ckptd.errors import CkptdError, InvalidRequest
from ckptd.memory import Bytes
from ckptd_api.raw import encode
from ckptd_client.daemon import Daemon
from ckptd_client.mapping import MappedSlot

ENV: Final = "CKPTD_HANDOVER"
MESSAGE_BYTES: Final = 1024 * 1024
_STREAM_S: Final = 3600.0
_STALLED_S: Final = 120.0


class Target(Protocol):
    """A slot to copy into. ``payload`` may be written until ``finish``; ``publish`` says how far it is, in order, from
    one thread at a time; ``finish`` returns when the daemon has everything that was published, or raises a CkptdError;
    ``abort`` gives up. ``key`` names the memory: equal keys mean that what was copied there before is there still,
    unless ``use`` (the number of uses before) says that somebody else had it in between."""

    payload: Bytes
    key: str
    use: int

    def publish(self, written_bytes: int) -> None: ...

    def finish(self, timeout_s: float) -> None: ...

    def abort(self) -> None: ...


class SharedTarget:
    """The daemon's memory itself."""

    def __init__(self, mapped: MappedSlot, payload_bytes: int, generation: int) -> None:
        self.payload = mapped.payload(payload_bytes)
        self.key = mapped.slot
        self.use = generation
        self._mapped = mapped

    def publish(self, written_bytes: int) -> None:
        self._mapped.publish(written_bytes)

    def finish(self, timeout_s: float) -> None:
        """Nothing is under way: what is published is in the daemon's memory."""

    def abort(self) -> None:
        """Nothing is under way."""


class StreamTarget:
    """A buffer here, streamed to the daemon behind the mark."""

    def __init__(self, daemon: Daemon, slot: str, generation: int, buffer: Bytes, use: int) -> None:
        self.payload = buffer
        self.key = "buffer"
        self.use = use
        self._slot = slot
        self._generation = generation
        self._written = 0
        self._is_over = False
        self._moved = threading.Condition()
        self._daemon = daemon
        self._sent: Future[Any] = Future()
        # A daemon thread: an interpreter that exits must not wait for a stream nobody feeds any more.
        threading.Thread(target=self._send, name="ckptd-stream", daemon=True).start()

    def publish(self, written_bytes: int) -> None:
        with self._moved:
            self._written = written_bytes
            self._moved.notify()

    def finish(self, timeout_s: float) -> None:
        try:
            self._sent.result(timeout_s)
        except TimeoutError as error:
            self.abort()
            raise CkptdError(f"the daemon did not take the stream within {timeout_s:g} s") from error

    def abort(self) -> None:
        with self._moved:
            self._is_over = True
            self._moved.notify()

    def _send(self) -> None:
        try:
            self._sent.set_result(self._daemon.write(self._messages(), _STREAM_S))
        except CkptdError as error:
            self._sent.set_exception(error)

    def _messages(self) -> Iterator[bytes]:
        sent, view = 0, self.payload.data
        while sent < len(view):
            with self._moved:
                is_ready = self._moved.wait_for(
                    lambda sent=sent: self._is_over or self._written >= min(sent + MESSAGE_BYTES, len(view)),  # type: ignore[misc]
                    _STALLED_S,
                )
                if self._is_over or not is_ready:
                    return  # the seal will say how much is missing
            stop = min(sent + MESSAGE_BYTES, len(view))
            yield encode_write(self._slot if sent == 0 else "", self._generation, sent, view[sent:stop])
            sent = stop


class Handover:
    """Opens targets; keeps mappings (and the stream's buffer) from step to step."""

    def __init__(self, daemon: Daemon, most_mapped: int, *, is_pinned: bool) -> None:
        mode = os.environ.get(ENV, "auto")
        if mode not in ("auto", "shm", "grpc"):
            raise InvalidRequest(f"{ENV}={mode!r} is not valid", "use shm, grpc or auto")
        self._daemon = daemon
        self._mode = mode
        self._most_mapped = most_mapped
        self._is_pinned = is_pinned
        self._mapped: OrderedDict[str, MappedSlot] = OrderedDict()
        self._buffer: Bytes = np.empty(0, np.uint8)
        self._uses = 0

    def open(self, slot: str, generation: int, payload_bytes: int) -> Target:
        """The target for a slot that begin() granted."""
        if self._mode != "grpc" and self._daemon.can_share_memory:
            try:
                return SharedTarget(self._map(slot), payload_bytes, generation)
            except OSError:
                # The socket is there but the memory cannot be mapped (another mount, limits): the stream still works.
                if self._mode == "shm":
                    raise
        elif self._mode == "shm":
            raise InvalidRequest("the daemon's memory cannot be shared: its fd socket is not reachable")
        if self._buffer.nbytes < payload_bytes:
            self._buffer = np.empty(payload_bytes, np.uint8)
            self._uses += 2
        self._uses += 1
        buffer = self._buffer[:payload_bytes]
        return StreamTarget(self._daemon, slot, generation, buffer, self._uses)

    def forget(self) -> None:
        """Drop every mapping: at the end, or because the daemon restarted and names may come to mean other files."""
        while self._mapped:
            self._mapped.popitem()[1].close()

    def _map(self, slot: str) -> MappedSlot:
        mapped = self._mapped.get(slot)
        if mapped is None:
            fd, size_bytes = self._daemon.slot_descriptor(slot, is_writable=True)
            mapped = self._mapped[slot] = MappedSlot(slot, fd, size_bytes)
            if self._is_pinned:
                mapped.register()
            while len(self._mapped) > self._most_mapped:
                self._mapped.popitem(last=False)[1].close()
        self._mapped.move_to_end(slot)
        return mapped


def encode_write(slot: str, generation: int, offset: int, data: memoryview) -> bytes:
    """A WriteRequest; slot and generation in the first one only."""
    return encode({1: slot, 2: generation if slot else 0, 3: offset, 4: data})
