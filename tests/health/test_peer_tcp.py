"""TCP by peer: what connections add up to, whatever opens and closes, and that the kernel's answer is understood."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.detect.health import split_name
from ckptd.health.samples import figures_between
from ckptd.health.tcp import MOST_PEERS, Connection, PeerTcpSource, connections_of

A, B = "10.0.0.2", "10.0.0.3"


def connection(
    number: int,
    peer: str,
    segments: int,
    retransmits: int = 0,
    rtt_s: float = 1e-3,
    acked_bytes: int = 0,
    busy_s: float = 0.0,
) -> Connection:
    return Connection(number, peer, segments, retransmits, rtt_s, acked_bytes, busy_s)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, float]]:
    """Reads a source whose kernel tells of the connections given."""
    source = PeerTcpSource()

    def read(*connections: Connection) -> dict[str, float]:
        monkeypatch.setattr(source, "_connections", lambda: list(connections))
        return source.read()

    return read


def test_what_was_sent_before_the_first_read_does_not_count(read: Callable[..., dict[str, float]]) -> None:
    values = read(connection(1, A, segments=500, retransmits=50))
    assert set(values.values()) == {0}
    assert {split_name(name)[1] for name in values} == {A}


def test_connections_to_a_peer_are_one_and_those_opened_since_count_whole(
    read: Callable[..., dict[str, float]],
) -> None:
    read(connection(1, A, 500, 50))
    values = read(connection(1, A, 600, 51, rtt_s=1e-3), connection(2, A, 10, 2, rtt_s=3e-3), connection(3, B, 7))
    assert values[f"tcp_peer_segments_total{{{A}}}"] == 110
    assert values[f"tcp_peer_retransmits_total{{{A}}}"] == 3
    assert values[f"tcp_peer_rtt_s{{{A}}}"] == pytest.approx(2e-3)
    assert values[f"tcp_peer_segments_total{{{B}}}"] == 7


def test_an_idle_connection_says_nothing_of_the_round_trip_now(read: Callable[..., dict[str, float]]) -> None:
    read(connection(1, A, 500), connection(2, A, 10))
    values = read(connection(1, A, 500, rtt_s=9.0), connection(2, A, 11, rtt_s=1e-3))
    assert values[f"tcp_peer_rtt_s{{{A}}}"] == pytest.approx(1e-3)
    assert f"tcp_peer_rtt_s{{{A}}}" not in read(connection(1, A, 500), connection(2, A, 11))


def test_the_delivery_rate_is_of_the_time_in_which_data_was_under_way(read: Callable[..., dict[str, float]]) -> None:
    before = read(connection(1, A, 0))
    after = read(connection(1, A, 2000, acked_bytes=3_000_000, busy_s=0.5), connection(2, B, 999, 0, 1e-3, 9, 0.4))
    figures = figures_between(before, after, 5.0)
    assert figures[f"tcp_peer_delivery_bytes_s{{{A}}}"] == 6e6
    assert f"tcp_peer_delivery_bytes_s{{{B}}}" not in figures


def test_a_connection_with_little_to_send_says_nothing_of_the_rate(read: Callable[..., dict[str, float]]) -> None:
    before = read(connection(1, A, 0))
    after = read(connection(1, A, 999, acked_bytes=1_000_000, busy_s=4.0))
    assert f"tcp_peer_delivery_bytes_s{{{A}}}" not in figures_between(before, after, 5.0)


def test_the_number_of_peers_is_bounded_to_those_with_the_most_traffic(
    read: Callable[..., dict[str, float]],
) -> None:
    read()
    values = read(*(connection(host, f"10.0.1.{host}", segments=host) for host in range(1, 200)))
    told = {name for name in values if name.startswith("tcp_peer_segments_total")}
    assert told == {f"tcp_peer_segments_total{{10.0.1.{host}}}" for host in range(200 - MOST_PEERS, 200)}


@given(
    st.lists(
        st.dictionaries(st.integers(1, 6), st.tuples(st.integers(0, 50), st.integers(0, 5)), max_size=6), min_size=2
    )
)
def test_counters_never_fall_whatever_opens_and_closes(rounds: list[dict[int, tuple[int, int]]]) -> None:
    source = PeerTcpSource()
    sent: dict[int, tuple[int, int]] = {}
    last: dict[str, float] = {}
    for alive in rounds:
        for number, (segments, retransmits) in alive.items():
            before = sent.get(number, (0, 0))
            sent[number] = (before[0] + segments, before[1] + retransmits)
        told = [connection(number, A if number % 2 else B, *sent[number]) for number in alive]
        source._connections = lambda told=told: told  # type: ignore[method-assign]
        values = source.read()
        for name, value in last.items():
            if "_total" in name:
                assert values[name] >= value
        last = values


class Message(dict[str, object]):
    """As pyroute2 gives it."""

    def __init__(self, peer: str, **info: int) -> None:
        super().__init__(idiag_dst=peer, idiag_cookie=7)
        zeros = dict.fromkeys(
            (
                "tcpi_data_segs_out",
                "tcpi_total_retrans",
                "tcpi_rtt",
                "tcpi_bytes_acked",
                "tcpi_busy_time",
                "tcpi_rwnd_limited",
            ),
            0,
        )
        self.info: dict[str, int] | None = zeros | info

    def get_attr(self, name: str) -> dict[str, int] | None:
        return self.info if name == "INET_DIAG_INFO" else None


def test_loopback_is_left_out_and_mapped_addresses_are_those_they_stand_for() -> None:
    messages = [
        Message(peer, tcpi_rtt=250) for peer in ("127.0.0.1", "::1", "::ffff:127.0.0.1", f"::ffff:{A}", "fd00::5")
    ]
    silent = Message(B)
    silent.info = None
    found = list(connections_of([*messages, silent]))
    assert [one.peer for one in found] == [A, "fd00::5"]
    assert found[0].rtt_s == pytest.approx(250e-6)


def test_time_in_which_the_receiver_did_not_take_data_is_not_the_networks() -> None:
    (found,) = connections_of([Message(A, tcpi_busy_time=500_000, tcpi_rwnd_limited=400_000, tcpi_bytes_acked=7)])
    assert (found.busy_s, found.acked_bytes) == (pytest.approx(0.1), 7)


TCP_ROWS = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1
   1: 0200000A:A2C4 0300000A:1F90 {state} 00000000:00000000 00:00000000 00000000     0        0 2
"""


@pytest.mark.parametrize(("state", "is_refused"), [("01", True), ("06", False)])
def test_an_answer_without_a_connection_that_was_there_all_the_time_is_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, is_refused: bool
) -> None:
    class Deaf:
        def bind(self) -> None: ...
        def close(self) -> None: ...
        def get_sock_stats(self, **asked: int) -> tuple[()]:
            return ()

    monkeypatch.setattr("pyroute2.DiagSocket", Deaf)
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "tcp").write_text(TCP_ROWS.format(state=state))
    source = PeerTcpSource(tmp_path)
    if is_refused:
        with pytest.raises(OSError, match="does not tell"):
            source.read()
    else:
        assert source.read() == {}


def test_a_connection_that_was_opened_after_the_answer_is_no_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "net" / "tcp"
    rows.parent.mkdir()
    rows.write_text(TCP_ROWS.format(state="06"))

    class Slow:
        def bind(self) -> None: ...
        def get_sock_stats(self, **asked: int) -> tuple[()]:
            rows.write_text(TCP_ROWS.format(state="01"))
            return ()

    monkeypatch.setattr("pyroute2.DiagSocket", Slow)
    assert PeerTcpSource(tmp_path).read() == {}


def own_address() -> str | None:
    addresses = [
        address.address
        for name, known in psutil.net_if_addrs().items()
        for address in known
        if address.family == socket.AF_INET and not address.address.startswith("127.")
    ]
    return addresses[0] if addresses else None


def test_the_kernel_tells_of_a_real_connection() -> None:
    address = own_address()
    if address is None:
        pytest.skip("this machine has no address but loopback")
    source = PeerTcpSource()
    try:
        source.read()
    except OSError as error:
        pytest.skip(f"the kernel does not tell: {error}")
    with (
        socket.create_server((address, 0)) as server,
        socket.create_connection(server.getsockname()) as client,
        server.accept()[0] as accepted,
    ):
        client.sendall(b"x" * 100_000)
        left = 100_000
        while left:
            left -= len(accepted.recv(left))
        values = source.read()
    source.close()
    assert values[f"tcp_peer_segments_total{{{address}}}"] >= 1
    assert 0 < values[f"tcp_peer_rtt_s{{{address}}}"] < 1
