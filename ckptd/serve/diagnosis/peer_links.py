"""How TCP to each peer goes, as nodes tell it by peer address, on its way to figures of links between nodes.

Layer: ``serve``, pure; the figures are of ``health.tcp``, the judgement is ``detect.links``. Invariants: a peer counts
only where enough was sent to it that the share of segments sent again is known, so that a connection for control is
not compared with those that carry the job; an address that is not the advertised one of exactly one node is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from ipaddress import ip_address

from ckptd.config import parse_host_port
from ckptd.detect.health import name_of, split_name
from ckptd.detect.kernel_links import PeerLink
from ckptd.errors import InvalidRequest
from ckptd.model import Roster
from ckptd_api.v1 import coordinator_pb2 as pb

_SENT_AGAIN = "tcp_peer_retransmit_share"


def sample_of(figures: Mapping[str, float]) -> pb.PeerSample:
    """The peers of one sample of the node."""
    sample = pb.PeerSample()
    for name, share in sorted(figures.items()):
        family, address = split_name(name)
        if family == _SENT_AGAIN:
            sample.peers.add(
                address=address,
                retransmit_share=share,
                rtt_seconds=figures.get(name_of("tcp_peer_rtt_s", address), 0.0),
                delivery_bytes_per_second=figures.get(name_of("tcp_peer_delivery_bytes_s", address), 0.0),
            )
    return sample


def nodes_by_address(roster: Roster) -> dict[str, str]:
    """By the numeric host of the advertised address; names are not resolved."""
    hosts: dict[str, str] = {}
    for entry in roster.nodes.values():
        with suppress(InvalidRequest, ValueError):
            hosts[entry.node_id] = str(ip_address(parse_host_port(entry.address)[0]))
    used = Counter(hosts.values())
    return {host: node for node, host in hosts.items() if used[host] == 1}


def links_of(node: str, sample: pb.PeerSample, nodes: Mapping[str, str]) -> list[PeerLink]:
    """``sample`` of ``node``; ``nodes`` by address."""
    return [
        PeerLink(
            node,
            nodes[peer.address],
            rtt_s=peer.rtt_seconds or None,
            retransmit_share=peer.retransmit_share,
            delivery_bytes_per_s=peer.delivery_bytes_per_second or None,
        )
        for peer in sample.peers
        if nodes.get(peer.address, node) != node
    ]


class Answers:
    """Joins samples of nodes, which come at different times, into answers with one sample a node at most.

    An answer is there once all nodes of the last one have given a new sample, or any node a second one, so nobody waits
    for a node that is gone or cannot tell.
    """

    def __init__(self) -> None:
        self._fresh: dict[str, list[PeerLink]] = {}
        self._last: frozenset[str] | None = None
        self._done: list[PeerLink] | None = None

    def take(self, node: str, links: Iterable[PeerLink]) -> None:
        if node in self._fresh:
            self._close()
        self._fresh[node] = list(links)
        if self._last is not None and self._fresh.keys() >= self._last:
            self._close()

    def newest(self) -> list[PeerLink] | None:
        """The newest answer, once; None when it was given already."""
        done, self._done = self._done, None
        return done

    def _close(self) -> None:
        self._done = [link for links in self._fresh.values() for link in links]
        self._last = frozenset(self._fresh)
        self._fresh = {}
