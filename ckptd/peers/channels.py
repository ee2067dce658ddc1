"""Connections to other daemons: one channel and session an address, calls with deadlines, streams with a silence limit.

Layer: ``peers``; gRPC. Invariants: every failure leaves as a CkptdError; a daemon that is stopped (its sockets stay
open) ends a stream after ``silence_s`` without a message, and a call after its deadline.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import grpc
from grpc.experimental import ChannelOptions

from ckptd.errors import DaemonUnreachable, SessionExpired
from ckptd_api.status import error_from_rpc
from ckptd_api.v1 import coordinator_pb2_grpc, node_pb2, node_pb2_grpc, peers_pb2, peers_pb2_grpc

PULL: Final = "/ckptd_api.v1.PeerService/Pull"
CALL_S: Final = 5.0
_TICK_S: Final = 0.5
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.enable_http_proxy", 0),
    # The thread that reads a stream drives it: no hand-over to a second thread for every message.
    (ChannelOptions.SingleThreadedUnaryStream, 1),
)


@dataclass(slots=True)
class _Guarded:
    """A stream whose reader waits for a message since ``since_s``; None while the reader is busy with the last one."""

    call: Any
    silence_s: float
    since_s: float | None
    is_cut: bool = False


class _Watchdog:
    """One thread that cancels streams whose reader has waited too long."""

    def __init__(self) -> None:
        self._guarded: dict[int, _Guarded] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, call: Any, silence_s: float) -> _Guarded:
        guarded = _Guarded(call, silence_s, None)
        with self._lock:
            self._guarded[id(guarded)] = guarded
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="peer-watchdog", daemon=True)
                self._thread.start()
        return guarded

    def remove(self, guarded: _Guarded) -> None:
        with self._lock:
            self._guarded.pop(id(guarded), None)

    def close(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(_TICK_S):
            now = time.monotonic()
            with self._lock:
                waiting = list(self._guarded.values())
            for guarded in waiting:
                since = guarded.since_s
                if since is not None and now - since > guarded.silence_s:
                    guarded.is_cut = True
                    guarded.call.cancel()


class Peer:
    """One daemon at ``address``; made by ``Channels``."""

    def __init__(self, address: str, channel: grpc.Channel, watchdog: _Watchdog) -> None:
        self.address = address
        self.coordinator = coordinator_pb2_grpc.CoordinatorServiceStub(channel)
        self.peers = peers_pb2_grpc.PeerServiceStub(channel)
        self._node = node_pb2_grpc.NodeServiceStub(channel)
        self._pull: Any = channel.unary_stream(PULL, peers_pb2.PullRequest.SerializeToString, None)
        self._channel = channel
        self._watchdog = watchdog
        self._token = ""
        self._lock = threading.Lock()

    def call(self, method: Any, request: Any, timeout_s: float = CALL_S) -> Any:
        """Call a unary method of one of the stubs; a CkptdError when it fails or takes longer than ``timeout_s``."""
        return self._with_session(lambda meta: method(request, timeout=timeout_s, metadata=meta), timeout_s)

    def pull(self, request: peers_pb2.PullRequest, silence_s: float) -> Iterator[bytes]:
        """The messages of Pull, undecoded; ends in DaemonUnreachable when none comes for ``silence_s``."""
        for is_last in (False, True):
            call = self._pull(request, metadata=self._meta())
            guarded = self._watchdog.add(call, silence_s)
            got_any = False
            try:
                while True:
                    guarded.since_s = time.monotonic()
                    message = next(call, None)
                    guarded.since_s = None
                    if message is None:
                        return
                    got_any = True
                    yield message
            except grpc.RpcError as error:
                if guarded.is_cut:
                    raise DaemonUnreachable(f"the daemon at {self.address} sent nothing for {silence_s:g} s") from error
                translated = error_from_rpc(error, self.address)
                if is_last or got_any or not isinstance(translated, SessionExpired):
                    raise translated from error
                self._open_session()
            finally:
                self._watchdog.remove(guarded)
                call.cancel()

    def close(self) -> None:
        self._channel.close()

    def _meta(self) -> tuple[tuple[str, str], ...]:
        return (("ckptd-token", self._token),)

    def _open_session(self, timeout_s: float = CALL_S) -> None:
        with self._lock:
            try:
                self._token = self._node.OpenSession(node_pb2.OpenSessionRequest(), timeout=timeout_s).token
            except grpc.RpcError as error:
                raise error_from_rpc(error, self.address) from error

    def _with_session(self, call: Callable[[tuple[tuple[str, str], ...]], Any], timeout_s: float) -> Any:
        session_s = min(timeout_s, CALL_S)
        try:
            if not self._token:
                self._open_session(session_s)
            try:
                return call(self._meta())
            except grpc.RpcError as error:
                if not isinstance(error_from_rpc(error, self.address), SessionExpired):
                    raise
            self._open_session(session_s)
            return call(self._meta())
        except grpc.RpcError as error:
            raise error_from_rpc(error, self.address) from error


class Channels:
    """The peers of a daemon by address. ``credentials`` None: without TLS (loopback only)."""

    def __init__(self, credentials: grpc.ChannelCredentials | None) -> None:
        self._credentials = credentials
        self._peers: dict[str, Peer] = {}
        self._watchdog = _Watchdog()
        self._lock = threading.Lock()

    def peer(self, address: str) -> Peer:
        with self._lock:
            found = self._peers.get(address)
            if found is None:
                channel = (
                    grpc.secure_channel(address, self._credentials, _OPTIONS)
                    if self._credentials
                    else grpc.insecure_channel(address, _OPTIONS)
                )
                found = self._peers[address] = Peer(address, channel, self._watchdog)
            return found

    def renew(self, address: str) -> None:
        """Connect anew at the next call: a connection that failed waits up to seconds before it tries again, and the
        daemon may be back. Calls under way on the old one go on."""
        with self._lock:
            self._peers.pop(address, None)

    def close(self) -> None:
        self._watchdog.close()
        with self._lock:
            for peer in self._peers.values():
                peer.close()
