"""Ranks without torch: clients that speak NodeService over TCP, with shards of random bytes.

``ShardJob`` is one incarnation of a run over several daemons: it makes the roster, joins every rank, saves, and
restores by the calls that a trainer makes. What a rank saves is a pure function of (run, rank, step), so what comes back
can be compared bit for bit.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
from crc32c import crc32c
from harness import DaemonProcess, wait_until

from ckptd.format.blocks import SlotLayout
from ckptd.format.index import encode_index
from ckptd.model import Box, Incarnation, Roster, RosterEntry, Segment, ShardIndex, SnapshotId
from ckptd_api.convert import incarnation_to_pb, roster_entry_to_pb, roster_to_pb, snapshot_from_pb, snapshot_to_pb
from ckptd_api.raw import encode
from ckptd_api.v1 import node_pb2 as pb
from ckptd_api.v1 import node_pb2_grpc, types_pb2

BLOCK_BYTES = 64 * 1024
CALL_S = 60.0


def shard_bytes(run: str, rank: int, step: int, size_bytes: int) -> np.ndarray:
    seed = zlib.crc32(f"{run}/{rank}/{step}".encode())
    return np.random.default_rng(seed).integers(0, 256, size_bytes, np.uint8)


class ShardRank:
    """One rank at the daemon that listens at ``address``."""

    def __init__(self, rank: int, address: str) -> None:
        self.rank = rank
        self.channel = grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)])
        self.stub = node_pb2_grpc.NodeServiceStub(self.channel)
        self.token = self.stub.OpenSession(pb.OpenSessionRequest(), timeout=CALL_S).token
        self.about = self.stub.Describe(pb.DescribeRequest(), timeout=CALL_S, metadata=self.meta)

    @property
    def meta(self) -> tuple[tuple[str, str], ...]:
        return (("ckptd-token", self.token),)

    def call(self, method: str, request: Any) -> Any:
        return getattr(self.stub, method)(request, timeout=CALL_S, metadata=self.meta)

    def entry(self) -> RosterEntry:
        a = self.about
        return RosterEntry(
            self.rank, a.node_id, a.address, self.rank + 1, tuple(sorted(a.domains.items())), a.protect_max, a.slots, 1
        )


class ShardJob:
    """``placement[rank]`` is the daemon of the rank. Joins every rank when made, after a survey by rank 0."""

    def __init__(
        self,
        placement: Sequence[DaemonProcess],
        run: str = "shards",
        protect: str = "4+2",
        sizes: Mapping[int, int] | None = None,
        size_bytes: int = 300_000,
    ) -> None:
        self.run = run
        self.sizes = {rank: (sizes or {}).get(rank, size_bytes) for rank in range(len(placement))}
        self.daemons = list(placement)
        self.ranks = [ShardRank(rank, daemon.listen) for rank, daemon in enumerate(placement)]
        entries = tuple(rank.entry() for rank in self.ranks)
        self.roster = Roster(1, int(np.random.default_rng().integers(1, 1 << 62)), BLOCK_BYTES, entries, protect)
        found = self.ranks[0].call(
            "Survey", pb.SurveyRequest(run=run, entries=[roster_entry_to_pb(e) for e in entries])
        )
        self.incarnation = Incarnation(found.highest_ordinal + 1, self.roster.incarnation_id)
        self.pool = ThreadPoolExecutor(len(placement))
        for rank in self.ranks:  # rank 0 first: its daemon coordinates
            self.join(rank)

    def join(self, rank: ShardRank) -> None:
        rank.call(
            "Join",
            pb.JoinRequest(
                run=self.run,
                incarnation=incarnation_to_pb(self.incarnation),
                roster=roster_to_pb(self.roster),
                rank=rank.rank,
                pid=1,
                every=types_pb2.Interval(steps=1),
            ),
        )

    # --- save ----------------------------------------------------------------------------------------------------
    def save(self, step: int, *, persist: bool = False, ranks: Sequence[int] | None = None) -> None:
        """Every rank saves; staged when this returns (unless ``ranks`` are only some)."""
        who = self.ranks if ranks is None else [self.ranks[rank] for rank in ranks]
        list(self.pool.map(lambda rank: self._save(rank, step, persist), who))
        if ranks is None:
            self.daemons[0].wait_mark(self.run, "staged", step)

    def _save(self, rank: ShardRank, step: int, persist: bool) -> None:
        data = shard_bytes(self.run, rank.rank, step, self.sizes[rank.rank])
        box = Box(f"rank{rank.rank}", "uint8", (len(data),), (0,), (len(data),), 0)
        segments = [Segment("uint8", len(data))]
        index = encode_index(ShardIndex.from_boxes([box], segments))
        layout = SlotLayout.plan(len(index), segments, BLOCK_BYTES)
        incarnation = incarnation_to_pb(self.incarnation)
        request = pb.BeginRequest(
            run=self.run,
            incarnation=incarnation,
            rank=rank.rank,
            step=step,
            index_bytes=len(index),
            segments=[types_pb2.Segment(dtype="uint8", size_bytes=len(data))],
            is_persisted=persist,
            instance=rank.about.instance,
            roster_version=self.roster.version,
        )
        granted = wait_until(lambda: self._begin(rank, request), f"a slot for rank {rank.rank}")
        payload = np.zeros(layout.payload_bytes, np.uint8)
        payload[: len(index)] = np.frombuffer(index, np.uint8)
        payload[layout.segment_offsets[0] :][: len(data)] = data
        write = rank.channel.stream_unary("/ckptd_api.v1.NodeService/Write", None, pb.WriteResponse.FromString)
        parts = (
            encode({1: granted.slot, 2: granted.generation, 3: at, 4: payload[at : at + (1 << 20)].data})
            for at in range(0, len(payload), 1 << 20)
        )
        write(parts, timeout=CALL_S, metadata=rank.meta)
        rank.call(
            "Seal",
            pb.SealRequest(
                run=self.run,
                incarnation=incarnation,
                rank=rank.rank,
                step=step,
                slot=granted.slot,
                generation=granted.generation,
                index_crc=crc32c(index),
            ),
        )

    def _begin(self, rank: ShardRank, request: pb.BeginRequest) -> pb.BeginResponse | None:
        try:
            return rank.call("Begin", request)
        except grpc.RpcError as error:
            if "being made" in str(error) or "does not coordinate" in str(error):
                return None
            raise

    def wait_protected(self, step: int, timeout_s: float = 30.0) -> None:
        self.daemons[0].wait_mark(self.run, "protected", step, timeout_s)

    # --- restore -------------------------------------------------------------------------------------------------
    def candidates(self, source: str = "") -> pb.ListCandidatesResponse:
        request = pb.ListCandidatesRequest(
            run=self.run,
            incarnation=incarnation_to_pb(self.incarnation),
            roster=roster_to_pb(self.roster),
            source=source,
        )
        return self.ranks[0].call("ListCandidates", request)

    def restore(self) -> tuple[SnapshotId, dict[int, str]]:
        """Fetch the best candidate on every rank, compare every byte, decide. (snapshot, source by rank)."""
        best = self.candidates().candidates[0]
        snapshot = snapshot_from_pb(best.snapshot)
        sources = dict(self.pool.map(lambda rank: (rank.rank, self.fetch(rank, snapshot)), self.ranks))
        request = pb.DecideRequest(
            run=self.run,
            incarnation=incarnation_to_pb(self.incarnation),
            roster=roster_to_pb(self.roster),
            parent=snapshot_to_pb(snapshot),
        )
        self.ranks[0].call("Decide", request)
        return snapshot, sources

    def fetch(self, rank: ShardRank, snapshot: SnapshotId) -> str:
        """Fetch one shard, check that it is what was saved, release it; the source that served."""
        request = pb.FetchRequest(
            run=self.run,
            incarnation=incarnation_to_pb(self.incarnation),
            snapshot=snapshot_to_pb(snapshot),
            rank=rank.rank,
            world_size=len(self.ranks),
        )
        fetched = rank.call("Fetch", request)
        segments = [Segment(s.dtype, s.size_bytes) for s in fetched.segments]
        layout = SlotLayout.plan(fetched.index_bytes, segments, fetched.block_bytes)
        read = pb.ReadRequest(lease=fetched.lease, offset=0, size_bytes=layout.payload_bytes)
        stream = rank.stub.Read(read, timeout=CALL_S, metadata=rank.meta)
        payload = np.frombuffer(b"".join(part.data for part in stream), np.uint8)
        expected = shard_bytes(self.run, rank.rank, snapshot.step, segments[0].size_bytes)
        start = layout.segment_offsets[0]
        assert np.array_equal(payload[start : start + len(expected)], expected), f"rank {rank.rank} differs"
        rank.call("Release", pb.ReleaseRequest(lease=fetched.lease))
        return fetched.source

    def close(self) -> None:
        for rank in self.ranks:
            rank.channel.close()
        self.pool.shutdown(wait=False)
