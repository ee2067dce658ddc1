"""One way of a link, measured: how fast bytes come here from another daemon, and how long a round trip takes.

Layer: ``peers``; gRPC. Invariants: however slow the link, a measurement moves at most ``MOST_BYTES`` and ends by its
deadline; a slow link is measured by what has come until then, and only one on which nothing comes is an error. The
bytes are made up: nothing of a run is read.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from ckptd.errors import CkptdError, DaemonUnreachable, InvalidRequest
from ckptd.failpoints import failpoint
from ckptd.peers.channels import Channels, Peer
from ckptd_api.v1 import peers_pb2 as pb

_MESSAGE_BYTES: Final = 128 << 10
_WARM_BYTES: Final = 1 << 20
_BURST_BYTES: Final = 2 << 20
_BURSTS: Final = 4
_BURST_S: Final = 0.1
_BURSTS_S: Final = 0.15
_TRIPS: Final = 24
_TRIPS_S: Final = 0.1
MOST_BYTES: Final = _WARM_BYTES + _BURSTS * _BURST_BYTES
_PAYLOAD: Final = bytes(range(256)) * (_MESSAGE_BYTES // 256)


@dataclass(frozen=True, slots=True)
class Way:
    """How bytes come from one daemon to another; the round trip is that of an empty call, so it has the time in which
    the other end answers in it."""

    bytes_per_s: float
    round_trip_s: float


def echo(size_bytes: int) -> Iterator[pb.EchoResponse]:
    """The other end of a measurement. InvalidRequest for more than one burst."""
    if size_bytes > _BURST_BYTES:
        raise InvalidRequest(f"at most {_BURST_BYTES} bytes are echoed at once, not {size_bytes}")
    failpoint("probe.echo")
    for left in range(size_bytes, 0, -_MESSAGE_BYTES):
        yield pb.EchoResponse(payload=_PAYLOAD[: min(left, _MESSAGE_BYTES)])


def measure_way(channels: Channels, address: str, deadline_s: float) -> Way:
    """From the daemon at ``address`` to this one, by ``deadline_s`` from now; a CkptdError when it cannot be reached.

    The best of the bursts and the quicker quarter of the round trips count: what disturbs one only slows it.
    """
    until_s = time.monotonic() + deadline_s
    peer = _connected(channels, address, until_s)
    trips = sorted(seconds for _, seconds in _repeated(peer, 0, _TRIPS, _TRIPS_S, until_s))
    bursts = _repeated(peer, _BURST_BYTES, _BURSTS, _BURSTS_S, until_s)
    return Way(max(size_bytes / seconds for size_bytes, seconds in bursts), trips[len(trips) // 4])


def _repeated(peer: Peer, size_bytes: int, times: int, enough_s: float, until_s: float) -> list[tuple[int, float]]:
    """At least one, none begun after ``enough_s``."""
    began_s = time.monotonic()
    found = [_received(peer, size_bytes, until_s)]
    while len(found) < times and time.monotonic() - began_s < enough_s:
        found.append(_received(peer, size_bytes, until_s))
    return found


def _connected(channels: Channels, address: str, until_s: float) -> Peer:
    """The peer, its connection in use already. One that failed before waits for up to seconds, which says nothing of
    now: then it is made anew."""
    peer = channels.peer(address)
    try:
        _received(peer, _WARM_BYTES, until_s)
    except CkptdError as error:
        if not error.is_retryable or time.monotonic() >= until_s:
            raise
        channels.renew(address)
        peer = channels.peer(address)
        _received(peer, _WARM_BYTES, until_s)
    return peer


def _received(peer: Peer, size_bytes: int, until_s: float) -> tuple[int, float]:
    """(bytes, seconds) of one Echo; what has come after ``_BURST_S`` is enough."""

    def read(request: pb.EchoRequest, *, timeout: float, metadata: Any) -> tuple[int, float]:
        started_s = time.monotonic()
        call = peer.peers.Echo(request, timeout=timeout, metadata=metadata)
        got_bytes = 0
        try:
            for part in call:
                got_bytes += len(part.payload)
                if time.monotonic() - started_s > _BURST_S:
                    break
        finally:
            call.cancel()
        return got_bytes, time.monotonic() - started_s

    left_s = until_s - time.monotonic()
    if left_s <= 0:
        raise DaemonUnreachable(f"the daemon at {peer.address} did not answer in time", "")
    got_bytes, seconds = peer.call(read, pb.EchoRequest(size_bytes=size_bytes), left_s)
    if size_bytes and not got_bytes:
        raise DaemonUnreachable(f"the daemon at {peer.address} sent nothing", "")
    return got_bytes, seconds
