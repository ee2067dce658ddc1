"""The connection to the node's daemon: session, calls with deadlines, and descriptors of slots.

Every call carries the session token; an expired session (the daemon restarted) is opened again once. Every failure is
an error of ``ckptd.errors``: nothing of gRPC leaves this module.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import grpc

from ckptd.errors import CkptdError, DaemonUnreachable, InvalidRequest, SessionExpired, error_from_wire
from ckptd.model import Incarnation
from ckptd_api.status import error_from_rpc
from ckptd_api.v1 import node_pb2, node_pb2_grpc

_LENGTH = struct.Struct(">I")
_CONNECT_S: Final = 3.0
_WRITE = "/ckptd_api.v1.NodeService/Write"
_OPTIONS: Final = [
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.max_send_message_length", 64 * 1024 * 1024),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
]


def resolve_address(daemon: str | None) -> str:
    """The daemon's address: the argument, else CKPTD_DAEMON, else the first default socket that exists."""
    if given := daemon or os.environ.get("CKPTD_DAEMON"):
        return given
    session = os.environ.get("XDG_RUNTIME_DIR")
    folders = ["/run/ckptd", *([f"{session}/ckptd"] if session else []), f"/tmp/ckptd-{os.getuid()}"]  # noqa: S108
    sockets = [f"{folder}/ckptd.sock" for folder in folders]
    return "unix://" + next((path for path in sockets if os.path.exists(path)), sockets[0])


def _timer(delay_s: float, action: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(delay_s, action)
    timer.daemon = True
    timer.start()
    return timer


class Daemon:
    """One daemon. ``address`` is ``unix:///path``, a path, or ``host:port``. Safe to call from any thread."""

    def __init__(self, address: str) -> None:
        self.address = address
        path = address.removeprefix("unix://").removeprefix("unix:")
        self._socket = Path(path) if path.startswith("/") else None
        if self._socket is None and ":" not in address:
            raise InvalidRequest(f"daemon address {address!r} is not valid", "use unix:///path or host:port")
        self._channel = self._open_channel()
        self._stub = node_pb2_grpc.NodeServiceStub(self._channel)
        self._lock = threading.Lock()
        self._fd_socket: socket.socket | None = None
        self._token = ""
        self.instance = 0

    @property
    def can_share_memory(self) -> bool:
        """True when slots can be handed over as descriptors: the fd socket is there."""
        return self._socket is not None and self._fd_path.exists()

    @property
    def _fd_path(self) -> Path:
        assert self._socket is not None
        return self._socket.with_name(self._socket.name.removesuffix(".sock") + ".fd.sock")

    def _open_channel(self) -> grpc.Channel:
        if self._socket is not None:
            return grpc.insecure_channel(f"unix:{self._socket}", options=_OPTIONS)
        names = [os.environ.get(f"CKPTD_TLS_{part}") for part in ("CA", "KEY", "CERT")]
        if all(names):
            ca, key, cert = (Path(str(name)).read_bytes() for name in names)
            return grpc.secure_channel(self.address, grpc.ssl_channel_credentials(ca, key, cert), options=_OPTIONS)
        return grpc.insecure_channel(self.address, options=_OPTIONS)

    # --- session ---------------------------------------------------------------------------------------------------
    def open_session(self) -> None:
        """Get a token; DaemonUnreachable when nobody answers."""
        with self._lock:
            if self._socket is None:
                try:
                    answer = self._stub.OpenSession(node_pb2.OpenSessionRequest(), timeout=_CONNECT_S)
                except grpc.RpcError as error:
                    raise self._translate(error) from error
                self._token, self.instance = answer.token, answer.instance
                return
            reply, _ = self._ask({"op": "session"})
            self._token, self.instance = str(reply["token"]), int(reply["instance"])

    def slot_descriptor(self, slot: str, *, is_writable: bool) -> tuple[int, int]:
        """(descriptor, bytes) of a slot; the caller closes it."""
        reply, fd = self._descriptor(op="slot", slot=slot, writable=is_writable)
        return fd, int(reply["slot_bytes"])

    def black_box(self, run: str, incarnation: Incarnation, rank: int) -> int | None:
        """A descriptor of memory that the daemon reads when the process of ``rank`` is gone: BLACK_BOX_BYTES of ENTERED
        rows. The caller closes it. None where memory cannot be shared."""
        if not self.can_share_memory:
            return None
        return self._descriptor(op="black_box", run=run, incarnation=str(incarnation), rank=rank)[1]

    def _descriptor(self, **request: Any) -> tuple[dict[str, Any], int]:
        """The answer to ``request``, and the descriptor that comes with it."""
        with self._lock:
            reply, fds = self._ask({"token": self._token, **request})
        if not fds:
            raise DaemonUnreachable("no descriptor came from the daemon", "raise the limit of open files: ulimit -n")
        return reply, fds[0]

    def _ask(self, request: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
        """One exchange on the fd socket, reconnecting once when the daemon closed it."""
        for is_last in (False, True):
            try:
                return self._exchange(request)
            except OSError as error:
                self._drop_fd_socket()
                if is_last:
                    raise DaemonUnreachable(
                        f"no daemon answers at {self.address}: {error.strerror or error}"
                    ) from error
        raise AssertionError("unreachable")

    def _exchange(self, request: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
        if self._fd_socket is None:
            self._fd_socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._fd_socket.settimeout(_CONNECT_S)
            self._fd_socket.connect(str(self._fd_path))
        body = json.dumps(request).encode()
        self._fd_socket.sendall(_LENGTH.pack(len(body)) + body)
        data, fds, _, _ = socket.recv_fds(self._fd_socket, 65536, 1)
        while data and (len(data) < _LENGTH.size or len(data) < _LENGTH.size + _LENGTH.unpack_from(data)[0]):
            part = self._fd_socket.recv(65536)
            data = data + part if part else b""
        if not data:
            raise ConnectionResetError("closed by the daemon")
        reply: dict[str, Any] = json.loads(data[_LENGTH.size :])
        if error := reply.get("error"):
            for fd in fds:
                os.close(fd)
            raise error_from_wire(error["name"], error["message"], error["hint"])
        return reply, list(fds)

    def _drop_fd_socket(self) -> None:
        if self._fd_socket is not None:
            self._fd_socket.close()
            self._fd_socket = None

    # --- calls -----------------------------------------------------------------------------------------------------
    def call(self, method: str, request: Any, timeout_s: float) -> Any:
        """Call a unary method of NodeService by name; a CkptdError when it fails or takes longer than ``timeout_s``."""
        return self._with_session(
            lambda: getattr(self._stub, method)(request, timeout=timeout_s, metadata=self._meta())
        )

    def stream(self, method: str, request: Any, timeout_s: float | None = None) -> Iterator[Any]:
        """The answers of a server stream; it ends in a CkptdError when the stream breaks."""
        call = getattr(self._stub, method)(request, timeout=timeout_s, metadata=self._meta())
        try:
            yield from call
        except grpc.RpcError as error:
            raise self._translate(error) from error
        finally:
            call.cancel()

    def watch(self, request: node_pb2.WatchRequest, silence_s: float) -> Iterator[node_pb2.WatchResponse]:
        """The watch stream; it ends in DaemonUnreachable when nothing came for ``silence_s`` (a stopped daemon keeps
        its sockets open)."""
        call = self._stub.Watch(request, metadata=self._meta())
        last = time.monotonic()
        timer: threading.Timer

        def look() -> None:
            nonlocal timer
            if time.monotonic() - last > silence_s:
                call.cancel()
                return
            timer = _timer(silence_s / 2, look)

        timer = _timer(silence_s / 2, look)
        try:
            for answer in call:
                last = time.monotonic()
                yield answer
        except grpc.RpcError as error:
            raise self._translate(error) from error
        finally:
            timer.cancel()
            call.cancel()

    def write(self, messages: Iterator[bytes], timeout_s: float) -> Any:
        """The write stream, its messages already encoded (see ``handover``)."""
        send: Any = self._channel.stream_unary(_WRITE, None, node_pb2.WriteResponse.FromString)
        try:
            return send(messages, timeout=timeout_s, metadata=self._meta())
        except grpc.RpcError as error:
            raise self._translate(error) from error

    def close(self) -> None:
        self._channel.close()
        self._drop_fd_socket()

    def _meta(self) -> tuple[tuple[str, str], ...]:
        return (("ckptd-token", self._token),)

    def _with_session(self, call: Callable[[], Any]) -> Any:
        try:
            try:
                return call()
            except grpc.RpcError as error:
                translated = self._translate(error)
                if not isinstance(translated, SessionExpired):
                    raise translated from error
            self.open_session()
            return call()
        except grpc.RpcError as error:
            raise self._translate(error) from error

    def _translate(self, error: grpc.RpcError) -> CkptdError:
        return error_from_rpc(error, self.address)
