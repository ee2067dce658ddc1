"""HTTP for machines: /metrics, /livez, /readyz."""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Page = Callable[[str], tuple[int, bytes, str]]


def serve_http(host: str, port: int, pages: dict[str, Page]) -> ThreadingHTTPServer:
    """Serve ``pages`` on a thread, by path: each makes (status, body, content type) of the request's Accept header. The
    server's ``shutdown`` ends it."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # the base class's name
            page = pages.get(self.path.split("?", 1)[0])
            status, body, kind = page(self.headers.get("Accept", "")) if page else (404, b"not found\n", "text/plain")
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  (the base class's name)
            """Scrapes are not news."""

    server = ThreadingHTTPServer((host, port), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
    return server
