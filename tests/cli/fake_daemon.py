"""A daemon that answers with what a test put there: OperatorService over a Unix socket, and the fd socket beside it."""

# ruff: noqa: N802  gRPC names the methods

from __future__ import annotations

import json
import socket as sockets
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from ckptd.errors import CkptdError
from ckptd_api.v1 import node_pb2, operator_pb2, operator_pb2_grpc

CKPTD = Path(sys.executable).with_name("ckptd")
TOKEN = "the-token"
Ckptd = Callable[..., "subprocess.CompletedProcess[str]"]


class FakeOperator(operator_pb2_grpc.OperatorServiceServicer):
    """``answers[method]`` is a message (a list for Verify and Probe), a CkptdError, or a function of the request."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.requests: list[Any] = []

    def _answer(self, method: str, request: Any, context: grpc.ServicerContext) -> Any:
        if dict(context.invocation_metadata()).get("ckptd-token") != TOKEN:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")
        self.requests.append(request)
        if method not in self.answers:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, method)
        answer = self.answers[method]
        if callable(answer):
            answer = answer(request)
        if isinstance(answer, CkptdError):
            context.set_trailing_metadata(
                (("ckptd-error", type(answer).__name__), ("ckptd-hint-bin", answer.hint.encode()))
            )
            context.abort(grpc.StatusCode[answer.grpc_code], answer.message)
        return answer

    def GetStatus(self, request, context):
        return self._answer("GetStatus", request, context)

    def ListCheckpoints(self, request, context):
        return self._answer("ListCheckpoints", request, context)

    def ShowCheckpoint(self, request, context):
        return self._answer("ShowCheckpoint", request, context)

    def Verify(self, request, context):
        yield from self._answer("Verify", request, context)

    def Probe(self, request, context):
        yield from self._answer("Probe", request, context)

    def Prune(self, request, context):
        return self._answer("Prune", request, context)


def _open_session(request: Any, context: grpc.ServicerContext) -> node_pb2.OpenSessionResponse:
    return node_pb2.OpenSessionResponse(token=TOKEN, instance=7)


class FakeDaemon:
    """A running fake; ``operator.answers`` says what it answers, ``frame`` what the fd socket does."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "d.sock"
        self.operator = FakeOperator()
        self.frame: dict[str, Any] = {"token": TOKEN, "instance": 7}
        self._server = grpc.server(ThreadPoolExecutor(2))
        operator_pb2_grpc.add_OperatorServiceServicer_to_server(self.operator, self._server)
        session = grpc.unary_unary_rpc_method_handler(
            _open_session, node_pb2.OpenSessionRequest.FromString, node_pb2.OpenSessionResponse.SerializeToString
        )
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("ckptd_api.v1.NodeService", {"OpenSession": session}),)
        )
        self._server.add_insecure_port(f"unix:{self.socket}")
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()
        self._listener = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)
        self._listener.bind(str(folder / "d.fd.sock"))
        self._listener.listen()
        threading.Thread(target=self._serve_sessions, daemon=True).start()

    def _serve_sessions(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                (length,) = struct.unpack(">I", connection.recv(4, sockets.MSG_WAITALL))
                assert json.loads(connection.recv(length, sockets.MSG_WAITALL)) == {"op": "session"}
                body = json.dumps(self.frame).encode()
                connection.sendall(struct.pack(">I", len(body)) + body)

    def close(self) -> None:
        self._listener.shutdown(sockets.SHUT_RDWR)
        self._listener.close()
        self._server.stop(None)


def row(step: int = 100, source: str = "memory", state: str = "staged", **more: Any) -> operator_pb2.CheckpointRow:
    result = operator_pb2.CheckpointRow(
        run="gpt", source=source, state=state, world_size=2, size_bytes=3 << 29, created_at_s=1.0, **more
    )
    result.snapshot.step = step
    result.snapshot.incarnation.ordinal = 3
    result.snapshot.incarnation.id = 0xAB
    return result
