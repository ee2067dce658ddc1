"""Everything of a daemon that has to do with other daemons, wired: channels, what it gives, what it makes of theirs."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import Protocol

import grpc

from ckptd.arena.arena import Arena, Lease
from ckptd.arena.records import RunRecord
from ckptd.arena.recycle import RunMarks
from ckptd.config import Settings
from ckptd.erasure.holdings import Holder
from ckptd.errors import InvalidRequest
from ckptd.format.image import ImageRecord
from ckptd.metrics import Metrics
from ckptd.model import Roster, SnapshotId
from ckptd.peers.channels import Channels
from ckptd.peers.protect import Protector
from ckptd.peers.rate import TokenBucket
from ckptd.peers.rebuild import Rebuilder
from ckptd.peers.shelf import Shelf
from ckptd.peers.transport import GrpcTransport, LocalTransport, Transport
from ckptd.restore.fetch import Fetcher
from ckptd.restore.inventory import MEMORY
from ckptd.serve.cluster import Cluster
from ckptd.serve.node_run import NodeRun
from ckptd.serve.protecting import Protecting
from ckptd.tiers.tier import Tier


class Hooks(Protocol):
    """What the node tells its peering: see ``Cluster``, ``Protecting`` and ``Fetcher``."""

    def records_of(self, run: str) -> RunRecord | None: ...

    def marks_of(self, run: str) -> RunMarks: ...

    def nodes_at_fault(self, run: str) -> Collection[str]: ...

    def on_corrupt(self, run: str, place: str, problem: str) -> None: ...

    def on_repaired(self, run: str) -> None: ...


class Peering:
    """``shelf`` gives, ``cluster`` asks, ``protecting`` makes parity, ``fetcher`` brings shards here."""

    def __init__(self, settings: Settings, arena: Arena, tiers: Sequence[Tier], metrics: Metrics, node: Hooks) -> None:
        self.channels = Channels(_credentials(settings))
        self.shelf = Shelf(arena)
        self.cluster = Cluster(arena, self.channels, self.shelf, node.records_of, node.nodes_at_fault)
        self._remote = GrpcTransport(self.channels, settings.peer_silence_s)
        self._local = LocalTransport(self.shelf)
        self.protector = Protector(
            arena,
            self._remote,
            self.cluster.describe_image,
            TokenBucket(settings.protect_rate_bytes),
            metrics,
            settings.protect_deadline_s,
        )
        self.protecting = Protecting(arena, self.protector, node.marks_of)
        rebuilder = Rebuilder(self.transport_to, self._describe_image, self.cluster.describe_group, node.on_corrupt)
        self.fetcher = Fetcher(arena, tiers, rebuilder, node.on_corrupt, node.on_repaired)

    def transport_to(self, holder: Holder) -> Transport:
        """The way to what ``holder`` has: none is needed to this node's own arena."""
        return self._local if self._is_here(holder) else self._remote

    def adopt(self, run: NodeRun, snapshot: SnapshotId, rank: int) -> Lease:
        """The shard of a rank whose node is lost, brought here to be drained."""
        lease, _ = self.fetcher.fetch(
            run.run,
            snapshot,
            rank,
            run.roster.world_size,
            MEMORY,
            os.getuid(),
            f"drain/{run.run}/{snapshot}",
            lambda: self.cluster.locate(run.run, run.incarnation, run.roster, snapshot),
        )
        return lease

    def close(self) -> None:
        """End what is under way with peers."""
        self.protector.close()
        self.cluster.close()
        self.channels.close()

    def _is_here(self, holder: Holder) -> bool:
        return holder.node_id == self.cluster.node_id

    def _describe_image(self, holder: Holder, run: str, snapshot: SnapshotId, ranks: Sequence[int]) -> ImageRecord:
        return self.cluster.describe_image(holder.address, run, snapshot, ranks, is_here=self._is_here(holder))


def check_addresses(roster: Roster) -> None:
    """InvalidRequest when the daemons of several nodes could not reach one another."""
    if len(roster.nodes) < 2:
        return
    for entry in roster.nodes.values():
        if not entry.address:
            raise InvalidRequest(
                f"the daemon of rank {entry.rank} (node {entry.node_id}) has no address for its peers",
                "serve with --listen HOST:PORT on every node of a run",
            )


def _credentials(settings: Settings) -> grpc.ChannelCredentials | None:
    """This daemon's certificate, shown to its peers; None without TLS."""
    if not (settings.tls_cert and settings.tls_key and settings.tls_ca):
        return None
    return grpc.ssl_channel_credentials(
        settings.tls_ca.read_bytes(), settings.tls_key.read_bytes(), settings.tls_cert.read_bytes()
    )
