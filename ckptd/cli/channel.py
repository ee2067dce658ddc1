"""The way from a verb to the daemon: find it, get a session, call it, and raise its errors again.

Layer: ``cli``; grpcio and ``errors``. On a Unix socket the session comes from the fd socket beside it, where the kernel
vouches for the uid; over TCP from NodeService, where the client certificate does. Invariants: every call has a
deadline, a stream one between messages; every failure leaves here as a CkptdError.
"""

from __future__ import annotations

import json
import os
import socket as sockets
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # gRPC reads it when imported; its log lines are not for operators

import grpc

from ckptd.config import fd_socket_path, find_socket, parse_host_port
from ckptd.errors import DaemonUnreachable, InvalidRequest, NotPermitted, error_from_wire
from ckptd_api.status import error_from_rpc
from ckptd_api.v1 import node_pb2, node_pb2_grpc, operator_pb2_grpc

DEADLINE_S: Final = 10.0
TIER_DEADLINE_S: Final = 60.0  # a tier on an object store may be slow to list
PRUNE_DEADLINE_S: Final = 3600.0  # deletes what may be thousands of objects
STREAM_IDLE_S: Final = 120.0
_FRAME: Final = struct.Struct(">I")
_LARGEST_FRAME_BYTES: Final = 1 << 20
_OPTIONS: Final = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", 256 << 20),  # `show` of a large run is a row a tensor
)
RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")


class Daemon:
    """An open session with a daemon: call ``stub``'s methods through ``unary`` and ``stream``."""

    def __init__(self, channel: grpc.Channel, where: str, token: str) -> None:
        self.stub = operator_pb2_grpc.OperatorServiceStub(channel)
        self.where = where
        self._metadata = (("ckptd-token", token),)

    def unary(
        self,
        method: grpc.UnaryUnaryMultiCallable[RequestT, ResponseT],
        request: RequestT,
        timeout_s: float = DEADLINE_S,
    ) -> ResponseT:
        try:
            return method(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_from_rpc(error, self.where) from error

    def stream(
        self,
        method: grpc.UnaryStreamMultiCallable[RequestT, ResponseT],
        request: RequestT,
        idle_s: float = STREAM_IDLE_S,
    ) -> Iterator[ResponseT]:
        """The messages of an answer that may take hours; fails when none arrives for ``idle_s``."""
        call = method(request, metadata=self._metadata)
        messages = iter(call)
        silent = threading.Event()

        def give_up() -> None:
            silent.set()
            call.cancel()

        try:
            while True:
                watchdog = threading.Timer(idle_s, give_up)
                watchdog.daemon = True
                watchdog.start()
                try:
                    message = next(messages)
                except StopIteration:
                    return
                finally:
                    watchdog.cancel()
                yield message
        except grpc.RpcError as error:
            if silent.is_set():
                raise DaemonUnreachable(f"the daemon at {self.where} said nothing for {idle_s:g} s") from error
            raise error_from_rpc(error, self.where) from error
        finally:
            call.cancel()


@contextmanager
def connect(daemon: str | None) -> Iterator[Daemon]:
    """A session with the daemon that ``--socket`` (or CKPTD_DAEMON) names, else with the one that is found."""
    named = daemon or os.environ.get("CKPTD_DAEMON") or str(find_socket())
    path = unix_path(named)
    if path is not None:
        token = _session_of(path)
        with grpc.insecure_channel(f"unix:{path}", _OPTIONS) as channel:
            yield Daemon(channel, str(path), token)
        return
    parse_host_port(named)
    with _tcp_channel(named) as channel:
        try:
            session = node_pb2_grpc.NodeServiceStub(channel).OpenSession(
                node_pb2.OpenSessionRequest(), timeout=DEADLINE_S
            )
        except grpc.RpcError as error:
            raise error_from_rpc(error, named) from error
        yield Daemon(channel, named, session.token)


def unix_path(daemon: str) -> Path | None:
    """The socket that ``daemon`` names (a path, or ``unix:///path``), or None when it is HOST:PORT."""
    if daemon.startswith("unix:"):
        return Path(daemon.removeprefix("unix://").removeprefix("unix:")).absolute()
    return Path(daemon).absolute() if "/" in daemon or ":" not in daemon else None


def _tcp_channel(target: str) -> grpc.Channel:
    cert, key, ca = (_pem(f"CKPTD_TLS_{name}") for name in ("CERT", "KEY", "CA"))
    if ca is None and cert is None:
        return grpc.insecure_channel(target, _OPTIONS)
    return grpc.secure_channel(target, grpc.ssl_channel_credentials(ca, key, cert), _OPTIONS)


def _pem(variable: str) -> bytes | None:
    path = os.environ.get(variable)
    try:
        return Path(path).read_bytes() if path else None
    except OSError as error:
        raise InvalidRequest(f"{variable}: {path} cannot be read: {error.strerror}", "name a PEM file") from error


def _session_of(path: Path) -> str:
    """A session token from the fd socket beside the daemon's socket."""
    try:
        with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as connection:
            connection.settimeout(DEADLINE_S)
            connection.connect(str(fd_socket_path(path)))
            body = b'{"op": "session"}'
            connection.sendall(_FRAME.pack(len(body)) + body)
            answer = _receive_frame(connection)
    except PermissionError as error:
        raise NotPermitted(
            f"the socket {path} may not be used by this user", "ask for the daemon's group, or use its user"
        ) from error
    except TimeoutError as error:
        raise DaemonUnreachable(f"the daemon at {path} did not answer within {DEADLINE_S:g} s") from error
    except OSError as error:
        raise DaemonUnreachable(f"no daemon at {path}: {error.strerror or error}") from error
    if "error" in answer:
        wire = answer["error"]
        raise error_from_wire(wire.get("name", ""), wire.get("message", ""), wire.get("hint", ""))
    return str(answer.get("token", ""))


def _receive_frame(connection: sockets.socket) -> dict[str, Any]:
    (length,) = _FRAME.unpack(_receive(connection, _FRAME.size))
    if length > _LARGEST_FRAME_BYTES:
        raise DaemonUnreachable(f"what answers is not ckptd: a frame of {length} bytes")
    try:
        answer = json.loads(_receive(connection, length))
    except ValueError as error:
        raise DaemonUnreachable("what answers is not ckptd: a frame that is not JSON") from error
    if not isinstance(answer, dict):
        raise DaemonUnreachable("what answers is not ckptd: a frame that is not an object")
    return answer


def _receive(connection: sockets.socket, size_bytes: int) -> bytes:
    data = b""
    while len(data) < size_bytes:
        part = connection.recv(size_bytes - len(data))
        if not part:
            raise ConnectionResetError("connection closed by the daemon")
        data += part
    return data
