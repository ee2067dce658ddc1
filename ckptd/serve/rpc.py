"""What every gRPC method shares: identity from the token, errors as status and trailers, seconds by method and code."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import grpc
import structlog

from ckptd.errors import CkptdError, TierFailed
from ckptd.metrics import Metrics
from ckptd.serve.sessions import Identity, Sessions
from ckptd_api.status import HINT_KEY, NAME_KEY

TOKEN_KEY = "ckptd-token"  # noqa: S105  (the name of the header, not a secret)
log = structlog.get_logger()
_caller: ContextVar[Identity] = ContextVar("caller")


def caller() -> Identity:
    """Who made the call that is being served."""
    return _caller.get()


class Boundary(grpc.ServerInterceptor):
    """The one place where exceptions of a method become gRPC errors, and tokens identities. ``streams``: where streams
    run, each on a thread for as long as it lasts, so that however many there are a call finds one."""

    def __init__(self, sessions: Sessions, metrics: Metrics, streams: ThreadPoolExecutor) -> None:
        self._sessions = sessions
        self._streams = streams
        self._metrics = metrics

    def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Any], details: grpc.HandlerCallDetails
    ) -> Any:
        handler = continuation(details)
        if handler is None:
            return None
        method = str(details.method)
        token = next((str(v) for k, v in details.invocation_metadata or () if k == TOKEN_KEY), "")
        is_open = method.startswith("/grpc.health.") or method.endswith("/OpenSession")

        def enter() -> None:
            if not is_open:
                _caller.set(self._sessions.identify(token))

        if handler.request_streaming:
            return grpc.stream_unary_rpc_method_handler(
                self._on_stream_pool(self._unary(handler.stream_unary, method, enter)),
                handler.request_deserializer,
                handler.response_serializer,
            )
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._on_stream_pool(self._stream(handler.unary_stream, method, enter)),
                handler.request_deserializer,
                handler.response_serializer,
            )
        return grpc.unary_unary_rpc_method_handler(
            self._unary(handler.unary_unary, method, enter), handler.request_deserializer, handler.response_serializer
        )

    def _on_stream_pool(self, behaviour: Any) -> Any:
        behaviour.experimental_thread_pool = self._streams
        return behaviour

    def _unary(self, call: Callable[..., Any], method: str, enter: Callable[[], None]) -> Callable[..., Any]:
        def serve(request: Any, context: grpc.ServicerContext) -> Any:
            started = time.monotonic()
            try:
                enter()
                response = call(request, context)
            except Exception as error:  # noqa: BLE001  the boundary: nothing may leave as a traceback
                self._refuse(error, method, started, context)
            self._count(method, "OK", started)
            return response

        return serve

    def _stream(self, call: Callable[..., Any], method: str, enter: Callable[[], None]) -> Callable[..., Any]:
        def serve(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            started = time.monotonic()
            try:
                enter()
                yield from call(request, context)
            except Exception as error:  # noqa: BLE001  the boundary: nothing may leave as a traceback
                self._refuse(error, method, started, context)
            self._count(method, "OK", started)

        return serve

    def _refuse(self, error: Exception, method: str, started: float, context: grpc.ServicerContext) -> None:
        if isinstance(error, OSError):
            known: CkptdError = TierFailed(f"{error.strerror or error}: {error.filename or 'this daemon'}")
            if error.errno == errno.ENOSPC:
                known.hint = "free space"
        elif isinstance(error, CkptdError):
            known = error
        else:
            log.exception("method failed", method=method)
            known = CkptdError(f"{type(error).__name__} in the daemon: {error}", "see the daemon's log")
        self._count(method, known.grpc_code, started)
        context.set_trailing_metadata(((NAME_KEY, type(known).__name__), (HINT_KEY, known.hint.encode())))
        context.abort(grpc.StatusCode[known.grpc_code], known.message)

    def _count(self, method: str, code: str, started: float) -> None:
        name = method.rsplit("/", 1)[-1]
        self._metrics.rpc_seconds.labels(name, code).observe(time.monotonic() - started)
