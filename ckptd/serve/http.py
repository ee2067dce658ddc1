"""HTTP for machines: /metrics, /livez, /readyz.

Invariants: a client that does not ask, or does not read, costs one thread for ``PATIENCE_S`` and nothing else; what
goes wrong with one request is one line of the log, and the server goes on.
"""

from __future__ import annotations

import socket
import socketserver
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

import structlog

from ckptd.errors import InvalidRequest

PATIENCE_S: Final = 10.0
Page = Callable[[str], tuple[int, bytes, str]]
log = structlog.get_logger()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # the base class's 5 are few when several ask at once

    def __init__(self, family: socket.AddressFamily, address: Any, handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = family  # before the base class makes the socket
        super().__init__(address, handler)

    def server_bind(self) -> None:
        """Without the base class's question for this host's name: where no DNS answers, it takes many seconds."""
        socketserver.TCPServer.server_bind(self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        log.info("request not answered", client=client_address[0], reason=f"{type(error).__name__}: {error}")


def serve_http(host: str, port: int, pages: dict[str, Page], patience_s: float = PATIENCE_S) -> ThreadingHTTPServer:
    """Serve ``pages`` on a thread, by path: each makes (status, body, content type) of the request's Accept header. The
    server's ``shutdown`` ends it. InvalidRequest when the address cannot be had."""

    class Handler(BaseHTTPRequestHandler):
        timeout = patience_s  # of every read and write

        def do_GET(self) -> None:  # the base class's name
            self._answer(is_whole=True)

        def do_HEAD(self) -> None:  # the base class's name
            self._answer(is_whole=False)

        def _answer(self, *, is_whole: bool) -> None:
            status, body, kind = self._made()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if is_whole:
                self.wfile.write(body)

        def _made(self) -> tuple[int, bytes, str]:
            page = pages.get(self.path.split("?", 1)[0])
            if page is None:
                return 404, b"not found\n", "text/plain"
            try:
                return page(self.headers.get("Accept", ""))
            except Exception as error:  # a thread's boundary: whoever asks must hear that it failed
                log.exception("page not made", path=self.path)
                return 500, f"{type(error).__name__}: see the daemon's log\n".encode(), "text/plain"

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  (the base class's name)
            """Scrapes are not news."""

    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        server = _Server(family, address, Handler)
    except OSError as error:
        raise InvalidRequest(
            f"cannot serve HTTP at {host}:{port}: {error.strerror or error}",
            "is the address free, and may this user bind it?",
        ) from error
    threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
    return server
