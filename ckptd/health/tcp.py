"""Reads how TCP to each peer goes, from the kernel's own figures of every connection. Layer: ``health``, a reader.

TCP_INFO over netlink, so the connections of all processes of this network namespace count, the trainers' too, and none
of another. Loopback is left out. Invariants: at most ``MOST_PEERS`` peers are told, those with the most traffic; what
a peer's counters count never falls when a connection closes. Formats: sock_diag(7), ``struct tcp_info`` of Linux.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from statistics import median
from typing import Any, Final

from ckptd.detect.health import name_of
from ckptd.health.system import PROC

MOST_PEERS: Final = 64
_BULK_SEGMENTS: Final = 1000  # of fewer, the time is that of round trips and not of the rate
_ESTABLISHED: Final = 1 << 1
_UNTOLD: Final = "the kernel does not tell of TCP connections over netlink"
_WITH_INFO: Final = 1 << 1  # INET_DIAG_INFO is attribute 2


@dataclass(frozen=True, slots=True)
class Connection:
    """One established connection. ``id``: the kernel's, never used again. Segments count those with data; ``busy_s``
    is how long data waited to be sent or acknowledged, without the time that the receiver's window was shut."""

    id: int
    peer: str
    segments: int
    retransmits: int
    rtt_s: float
    acked_bytes: int = 0
    busy_s: float = 0.0


@dataclass(slots=True)
class _Peer:
    segments: int = 0
    retransmits: int = 0
    acked_bytes: int = 0
    busy_s: float = 0.0


class PeerTcpSource:
    """By peer address: segments sent, segments sent again, and of connections that sent since the last read the
    median round trip; of those that sent much, what was acknowledged and how long that took. Their quotient is the
    delivery rate over all of the time between two reads: the kernel's own is of one moment, and of some only."""

    name = "tcp peers"

    def __init__(self, proc: Path = PROC) -> None:
        self.unread: dict[str, str] = {}
        self._proc = proc
        self._is_told = False
        self._socket: Any = None
        self._peers: dict[str, _Peer] = {}
        self._known: dict[int, Connection] | None = None

    def read(self) -> dict[str, float]:
        connections = {connection.id: connection for connection in self._connections()}
        before = connections if self._known is None else self._known
        self._known = connections
        active: dict[str, list[Connection]] = {}
        for connection in connections.values():
            peer = self._peers.setdefault(connection.peer, _Peer())
            # One not seen before was opened since the last read: all it sent is new.
            last = before.get(connection.id)
            sent = connection.segments - (last.segments if last else 0)
            if sent > 0:
                peer.segments += sent
                peer.retransmits += max(connection.retransmits - (last.retransmits if last else 0), 0)
                active.setdefault(connection.peer, []).append(connection)
            if sent >= _BULK_SEGMENTS:
                peer.acked_bytes += max(connection.acked_bytes - (last.acked_bytes if last else 0), 0)
                peer.busy_s += max(connection.busy_s - (last.busy_s if last else 0.0), 0.0)
        self._keep_most({connection.peer for connection in connections.values()})
        return self._values(active)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _connections(self) -> list[Connection]:
        # Here, since it takes long to import: the reader's thread has the time, the start of a daemon has not.
        from pyroute2 import DiagSocket  # type: ignore[import-untyped]
        from pyroute2.netlink.exceptions import NetlinkError  # type: ignore[import-untyped]

        before = set() if self._is_told else _established(self._proc)
        try:
            if self._socket is None:
                self._socket = DiagSocket()
                self._socket.bind()
            families = (socket.AF_INET, socket.AF_INET6)
            messages = [
                message
                for family in families
                for message in self._socket.get_sock_stats(family=family, states=_ESTABLISHED, extensions=_WITH_INFO)
            ]
        except NetlinkError as error:
            self.close()
            raise OSError(error.code, f"{_UNTOLD}: {error}") from error
        except OSError:
            self.close()
            raise
        # A kernel without inet_diag refuses, and pyroute2 makes an empty answer of it: one that leaves out a connection
        # which was there before and after.
        self._is_told = self._is_told or bool(messages)
        if not self._is_told and before & _established(self._proc):
            raise OSError(errno.EOPNOTSUPP, _UNTOLD)
        return list(connections_of(messages))

    def _keep_most(self, connected: set[str]) -> None:
        excess = len(self._peers) - MOST_PEERS
        if excess > 0:
            ranked = sorted(self._peers, key=lambda peer: (peer in connected, self._peers[peer].segments))
            for peer in ranked[:excess]:
                del self._peers[peer]

    def _values(self, active: dict[str, list[Connection]]) -> dict[str, float]:
        values: dict[str, float] = {}
        for address, peer in self._peers.items():
            values[name_of("tcp_peer_segments_total", address)] = peer.segments
            values[name_of("tcp_peer_retransmits_total", address)] = peer.retransmits
            values[name_of("tcp_peer_acked_bytes_total", address)] = peer.acked_bytes
            values[name_of("tcp_peer_busy_s_total", address)] = peer.busy_s
            if address in active:
                values[name_of("tcp_peer_rtt_s", address)] = median(one.rtt_s for one in active[address])
        return values


def _established(proc: Path) -> set[tuple[str, ...]]:
    """Addresses and state, 01, of each established connection, loopback too."""
    rows = [line.split()[1:4] for name in ("tcp", "tcp6") for line in _lines_of(proc / "net" / name)]
    return {tuple(row) for row in rows if row[2:] == ["01"]}


def _lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def connections_of(messages: Iterable[Any]) -> Iterable[Connection]:
    """Those of ``messages`` (``inet_diag_msg``) that lead to another address than loopback and carry TCP_INFO."""
    for message in messages:
        address = ip_address(message["idiag_dst"])
        if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        info = message.get_attr("INET_DIAG_INFO")
        if address.is_loopback or info is None:
            continue
        yield Connection(
            id=message["idiag_cookie"],
            peer=str(address),
            segments=info["tcpi_data_segs_out"],
            retransmits=info["tcpi_total_retrans"],
            rtt_s=info["tcpi_rtt"] * 1e-6,
            acked_bytes=info["tcpi_bytes_acked"],
            busy_s=(info["tcpi_busy_time"] - info["tcpi_rwnd_limited"]) * 1e-6,
        )
