"""The hand-over of slots: a second Unix socket that gives session tokens and file descriptors (SCM_RIGHTS).

Frames are a 4-byte big-endian length and JSON. ``{"op": "session"}`` answers ``{"token", "instance"}``, the token bound
to the uid the kernel reports (SO_PEERCRED). ``{"op": "slot", "token", "slot", "writable"}`` answers ``{"slot_bytes"}``
with the descriptor. ``{"op": "black_box", "token", "run", "incarnation", "rank"}`` answers ``{}`` and a descriptor of
memory for the rank's last operations. Errors answer ``{"error": {"name", "message", "hint"}}``. Descriptors of slots
are opened afresh for every hand-over, so that locks and offsets are the receiver's own.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import structlog

from ckptd.errors import CkptdError, InvalidRequest
from ckptd.model import Incarnation
from ckptd.serve.sessions import Identity, Sessions

_PEERCRED = struct.Struct("3i")
_LENGTH = struct.Struct(">I")
_MOST_BYTES: Final = 64 * 1024
_IDLE_S: Final = 3600.0
_PAUSE_S: Final = 0.1

OpenSlot = Callable[[Identity, str, bool], tuple[int, int]]
OpenBlackBox = Callable[[Identity, str, Incarnation, int], int]
log = structlog.get_logger()


class FdSocket:
    """Serves the socket at ``path`` on threads of its own. ``open_slot(identity, id, writable)`` gives (fd, bytes),
    ``open_black_box(identity, run, incarnation, rank)`` a fd."""

    def __init__(
        self, path: Path, sessions: Sessions, instance: int, open_slot: OpenSlot, open_black_box: OpenBlackBox
    ) -> None:
        self._path = path
        self._sessions = sessions
        self._instance = instance
        self._open_slot = open_slot
        self._open_black_box = open_black_box
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._is_closed = False

    def start(self) -> None:
        self._path.unlink(missing_ok=True)
        self._listener.bind(str(self._path))
        # Anyone may ask for a session: what it may touch is decided by the uid behind it.
        self._path.chmod(0o666)
        self._listener.listen(128)
        threading.Thread(target=self._accept, name="fd-socket", daemon=True).start()

    def close(self) -> None:
        self._is_closed = True
        self._listener.close()
        self._path.unlink(missing_ok=True)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._converse, args=(connection,), name="fd-peer", daemon=True).start()
            except (OSError, RuntimeError) as error:
                if self._is_closed:
                    return
                # Out of descriptors or threads, for now: whoever connects next must find us here.
                log.warning("fd socket", reason=str(error))
                time.sleep(_PAUSE_S)

    def _converse(self, connection: socket.socket) -> None:
        with connection, suppress(OSError, ValueError):  # a peer that goes away or talks nonsense costs nobody else
            connection.settimeout(_IDLE_S)
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
            pid, uid, _ = _PEERCRED.unpack(credentials)
            identity = Identity(f"uid:{uid}", uid, pid)
            while (request := _receive(connection)) is not None:
                self._answer(connection, identity, request)

    def _answer(self, connection: socket.socket, identity: Identity, request: dict[str, Any]) -> None:
        fds: list[int] = []
        try:
            if request.get("op") == "session":
                reply: dict[str, Any] = {"token": self._sessions.open(identity), "instance": self._instance}
            elif request.get("op") == "slot":
                caller = self._sessions.identify(str(request.get("token")))
                fd, size = self._open_slot(caller, str(request.get("slot")), bool(request.get("writable")))
                fds, reply = [fd], {"slot_bytes": size}
            elif request.get("op") == "black_box":
                caller = self._sessions.identify(str(request.get("token")))
                incarnation = Incarnation.parse(str(request.get("incarnation")))
                rank = request.get("rank")
                if not isinstance(rank, int):
                    raise InvalidRequest(f"rank {rank!r} is not a number")
                fds, reply = [self._open_black_box(caller, str(request.get("run")), incarnation, rank)], {}
            else:
                raise InvalidRequest(f"unknown operation {request.get('op')!r}")
        except CkptdError as error:
            reply = {"error": {"name": type(error).__name__, "message": error.message, "hint": error.hint}}
        body = json.dumps(reply).encode()
        try:
            socket.send_fds(connection, [_LENGTH.pack(len(body)) + body], fds)
        finally:
            for fd in fds:
                os.close(fd)


def _receive(connection: socket.socket) -> dict[str, Any] | None:
    head = _exactly(connection, _LENGTH.size)
    if not head:
        return None
    (length,) = _LENGTH.unpack(head)
    if length > _MOST_BYTES:
        raise ValueError("frame too large")
    value = json.loads(_exactly(connection, length))
    if not isinstance(value, dict):
        raise ValueError("not an object")  # noqa: TRY004  (of the wire, not of a caller)
    return value


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            return b""
        data += part
    return data
