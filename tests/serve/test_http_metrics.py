"""The server of /metrics: whatever a client asks, or fails to do, costs one thread for a moment and nothing else."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import ThreadingHTTPServer

import pytest
from harness import DaemonProcess, Stage, wait_until

from ckptd.errors import InvalidRequest
from ckptd.serve.http import Page, serve_http

LARGE = b"x" * (64 << 20)  # more than sockets hold


def broken(accept: str) -> tuple[int, bytes, str]:
    raise TypeError(accept)


PAGES: dict[str, Page] = {
    "/livez": lambda _: (200, b"ok\n", "text/plain"),
    "/large": lambda _: (200, LARGE, "text/plain"),
    "/broken": broken,
}


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    server = serve_http("127.0.0.1", 0, PAGES, patience_s=0.5)
    yield server
    server.shutdown()
    server.server_close()


def ask(server: ThreadingHTTPServer, path: str, method: str = "GET") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=5)  # type: ignore[arg-type]
    try:
        connection.request(method, path)
        reply = connection.getresponse()
        assert method != "HEAD" or reply.headers["Content-Length"] == "3"
        return reply.status, reply.read()
    finally:
        connection.close()


def connect(server: ThreadingHTTPServer) -> socket.socket:
    return socket.create_connection(server.server_address[:2], 5)  # type: ignore[arg-type]


def serving_threads() -> int:
    return sum("process_request_thread" in thread.name for thread in threading.enumerate())


def test_get_and_head_are_answered_and_nothing_else(server: ThreadingHTTPServer) -> None:
    assert ask(server, "/livez?verbose=1") == (200, b"ok\n")
    assert ask(server, "/livez", "HEAD") == (200, b"")
    assert ask(server, "/nothing")[0] == 404
    assert ask(server, "/livez", "POST")[0] == 501


def test_a_page_that_cannot_be_made_is_an_error_and_not_an_end(server: ThreadingHTTPServer) -> None:
    assert ask(server, "/broken") == (500, b"TypeError: see the daemon's log\n")
    assert ask(server, "/livez")[0] == 200


def test_clients_that_do_not_ask_or_do_not_read_are_given_up(server: ThreadingHTTPServer) -> None:
    idle = [connect(server) for _ in range(20)]
    slow = connect(server)
    slow.sendall(b"GET /large HTTP/1.0\r\n\r\n")
    assert ask(server, "/livez") == (200, b"ok\n")
    wait_until(lambda: serving_threads() == 0, "the threads of the others to end")
    for client in (*idle, slow):
        client.close()


def test_a_client_that_is_gone_before_its_answer_leaves_no_traceback(
    server: ThreadingHTTPServer, capfd: pytest.CaptureFixture[str]
) -> None:
    client = connect(server)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.sendall(b"GET /large HTTP/1.0\r\n\r\n")
    client.close()
    wait_until(lambda: serving_threads() == 0, "its thread to end")
    assert "Traceback" not in "".join(capfd.readouterr())


def test_many_at_once_are_all_answered(server: ThreadingHTTPServer) -> None:
    with ThreadPoolExecutor(64) as pool:
        assert set(pool.map(lambda _: ask(server, "/livez"), range(256))) == {(200, b"ok\n")}


def test_an_address_of_ipv6_serves() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    server = serve_http("::1", 0, PAGES)
    try:
        assert ask(server, "/livez")[0] == 200
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1"])
def test_an_address_that_cannot_be_had_is_refused_with_a_hint(host: str) -> None:
    with pytest.raises(InvalidRequest, match=f"cannot serve HTTP at {host}:9400") as refused:
        serve_http(host, 9400, PAGES)
    assert "free" in refused.value.hint


@pytest.mark.slow
def test_a_daemon_whose_port_is_taken_says_so_and_ends(stage: Stage) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        daemon: DaemonProcess = stage.daemon("--http", address, wait=False)
        assert daemon.wait_exit() == InvalidRequest.exit_code
    assert f"cannot serve HTTP at {address}: Address already in use" in daemon.log
    assert "Traceback" not in daemon.log
