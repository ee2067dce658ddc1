"""Ranks without torch: clients that speak NodeService over TCP, with shards of random bytes.

``ShardJob`` is one incarnation of a run over several daemons: it makes the roster, joins every rank, saves, and
restores by the calls that a trainer makes. What a rank saves is a pure function of (run, rank, snapshot), so what comes
back can be compared bit for bit, and the same step of another incarnation is not taken for it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
from crc32c import crc32c
from harness import DaemonProcess, wait_until

from ckptd.errors import CoordinatorUnreachable, RestoreFailed, SlotNotReady
from ckptd.format.blocks import SlotLayout
from ckptd.format.index import encode_index
from ckptd.model import Box, Incarnation, Roster, RosterEntry, Segment, ShardIndex, SnapshotId
from ckptd_api.convert import incarnation_to_pb, roster_entry_to_pb, roster_to_pb, snapshot_from_pb, snapshot_to_pb
from ckptd_api.raw import encode
from ckptd_api.status import error_from_rpc
from ckptd_api.v1 import node_pb2 as pb
from ckptd_api.v1 import node_pb2_grpc, types_pb2

BLOCK_BYTES = 64 * 1024
CALL_S = 60.0
SizeOf = Callable[[int, int], int]


def shard_bytes(run: str, rank: int, snapshot: SnapshotId, size_bytes: int) -> np.ndarray:
    seed = zlib.crc32(f"{run}/{rank}/{snapshot}".encode())
    return np.random.default_rng(seed).integers(0, 256, size_bytes, np.uint8)


class ShardRank:
    """One rank at the daemon that listens at ``address``. Calls that fail raise the daemon's own error."""

    def __init__(self, rank: int, address: str, credentials: grpc.ChannelCredentials | None = None) -> None:
        self.rank = rank
        self.address = address
        options = [("grpc.use_local_subchannel_pool", 1)]
        self.channel = (
            grpc.secure_channel(address, credentials, options)
            if credentials
            else grpc.insecure_channel(address, options)
        )
        self.stub = node_pb2_grpc.NodeServiceStub(self.channel)
        self.token = ""
        self.token = self.call("OpenSession", pb.OpenSessionRequest()).token
        self.about = self.call("Describe", pb.DescribeRequest())

    @property
    def meta(self) -> tuple[tuple[str, str], ...]:
        return (("ckptd-token", self.token),)

    def call(self, method: str, request: Any) -> Any:
        return self._translated(lambda: getattr(self.stub, method)(request, timeout=CALL_S, metadata=self.meta))

    def die(self, job: ShardJob) -> None:
        """Its control stream ends without a goodbye."""
        request = pb.WatchRequest(run=job.run, incarnation=incarnation_to_pb(job.incarnation), rank=self.rank)
        watch = self.stub.Watch(request, metadata=self.meta)
        next(watch)
        watch.cancel()

    def write(self, slot: str, generation: int, payload: np.ndarray) -> None:
        write = self.channel.stream_unary("/ckptd_api.v1.NodeService/Write", None, pb.WriteResponse.FromString)
        parts = (
            encode({1: slot, 2: generation, 3: at, 4: payload[at : at + (1 << 20)].data})
            for at in range(0, len(payload), 1 << 20)
        )
        self._translated(lambda: write(parts, timeout=CALL_S, metadata=self.meta))

    def read(self, lease: int, size_bytes: int) -> np.ndarray:
        request = pb.ReadRequest(lease=lease, offset=0, size_bytes=size_bytes)
        stream = self.stub.Read(request, timeout=CALL_S, metadata=self.meta)
        return np.frombuffer(self._translated(lambda: b"".join(part.data for part in stream)), np.uint8)

    def _translated(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except grpc.RpcError as error:
            raise error_from_rpc(error, self.address) from error

    def entry(self) -> RosterEntry:
        a = self.about
        return RosterEntry(
            self.rank, a.node_id, a.address, self.rank + 1, tuple(sorted(a.domains.items())), a.protect_max, a.slots, 1
        )


class ShardJob:
    """``placement[rank]`` is the daemon of the rank. Joins every rank when made, after a survey by rank 0.

    A shard has ``size_of(rank, step)`` bytes; by default ``sizes[rank]``, else ``size_bytes``. ``is_prepared``: all
    slots are made when ranks join, not one by one as they are needed.
    """

    def __init__(
        self,
        placement: Sequence[DaemonProcess],
        run: str = "shards",
        protect: str = "4+2",
        sizes: Mapping[int, int] | None = None,
        size_bytes: int = 300_000,
        size_of: SizeOf | None = None,
        is_prepared: bool = False,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self.run = run
        self.is_prepared = is_prepared
        self.size_of: SizeOf = size_of or (lambda rank, _step: (sizes or {}).get(rank, size_bytes))
        self.daemons = list(placement)
        self.pool = ThreadPoolExecutor(len(placement))
        self.ranks = list(
            self.pool.map(lambda rank: ShardRank(rank, placement[rank].listen, credentials), range(len(placement)))
        )
        entries = tuple(rank.entry() for rank in self.ranks)
        self.roster = Roster(1, int(np.random.default_rng().integers(1, 1 << 62)), BLOCK_BYTES, entries, protect)
        found = self.ranks[0].call(
            "Survey", pb.SurveyRequest(run=run, entries=[roster_entry_to_pb(e) for e in entries])
        )
        self.incarnation = Incarnation(found.highest_ordinal + 1, self.roster.incarnation_id)
        self.join(self.ranks[0])  # first: its daemon coordinates
        list(self.pool.map(self.join, self.ranks[1:]))

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
                estimated_bytes=self.size_of(rank.rank, 1) if self.is_prepared else 0,
            ),
        )

    def rejoin(self, daemon: DaemonProcess) -> None:
        """The ranks of ``daemon``, which was restarted, join again."""
        for number, place in enumerate(self.daemons):
            if place is daemon:
                self.ranks[number].channel.close()
                self.ranks[number] = ShardRank(number, daemon.listen)
                self.join(self.ranks[number])

    # --- save ----------------------------------------------------------------------------------------------------
    def save(self, step: int, *, persist: bool = False, ranks: Sequence[int] | None = None) -> None:
        """Every rank saves; staged when this returns (unless ``ranks`` are only some)."""
        who = self.ranks if ranks is None else [self.ranks[rank] for rank in ranks]
        list(self.pool.map(lambda rank: self._save(rank, step, persist), who))
        if ranks is None:
            self.wait_staged(step)

    def _save(self, rank: ShardRank, step: int, persist: bool) -> None:
        data = self.bytes_of(rank.rank, SnapshotId(self.incarnation, step))
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
        rank.write(granted.slot, granted.generation, payload)
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
        except (SlotNotReady, CoordinatorUnreachable):
            return None

    def bytes_of(self, rank: int, snapshot: SnapshotId) -> np.ndarray:
        return shard_bytes(self.run, rank, snapshot, self.size_of(rank, snapshot.step))

    # --- what the coordinator says -------------------------------------------------------------------------------
    @property
    def marks(self) -> dict[str, Any]:
        """The watermarks of this incarnation at the daemon of rank 0."""
        return self.marks_at(self.daemons[0])

    def marks_at(self, daemon: DaemonProcess) -> dict[str, Any]:
        runs = [r for r in daemon.status()["runs"] if r["run"] == self.run]
        return next((dict(r["watermarks"]) for r in runs if r["incarnation"] == str(self.incarnation)), {})

    def wait_staged(self, step: int, timeout_s: float = 30.0) -> None:
        wait_until(lambda: (self.marks.get("staged") or -1) >= step, f"step {step} to be staged", timeout_s)

    def wait_protected(self, step: int, timeout_s: float = 60.0) -> None:
        wait_until(lambda: (self.marks.get("protected") or -1) >= step, f"step {step} to be protected", timeout_s)

    def wait_protecting(self, step: int) -> None:
        """Wait until every daemon has been told to protect ``step``."""
        for daemon in self.daemons:
            wait_until(
                lambda daemon=daemon: (self.marks_at(daemon).get("protecting") or {}).get("step") == step,  # type: ignore[misc]
                f"step {step} to be protected by {daemon.folder}",
            )

    def wait_durable(self, step: int, timeout_s: float = 60.0) -> None:
        wait_until(lambda: (self.marks.get("durable") or -1) >= step, f"step {step} to be durable", timeout_s)

    def wait_whole(self, snapshot: SnapshotId, losses: int, timeout_s: float = 60.0) -> None:
        """Wait until ``snapshot``, of this or an older incarnation, is protected and as many nodes may be lost."""
        parity_of = {"incarnation": str(snapshot.incarnation), "step": snapshot.step}
        wait_until(
            lambda: (self.marks.get("parity_of"), self.marks.get("losses_tolerated")) == (parity_of, losses),
            f"parity of {snapshot} to be in place",
            timeout_s,
        )

    def not_protected(self, step: int) -> str:
        """Why the coordinator gave up to protect a step, as "error: reason"; empty when it did not."""
        outcomes = self.marks.get("not_protected", [])
        return next((f"{o['error']}: {o['reason']}" for o in outcomes if o["step"] == step), "")

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
        """Fetch the best candidate that every rank can have, compare every byte, decide. (snapshot, source by rank)."""
        problems = []
        for candidate in self.candidates().candidates:
            snapshot = snapshot_from_pb(candidate.snapshot)
            try:
                sources = dict(self.pool.map(lambda rank: (rank.rank, self.fetch(rank, snapshot)), self.ranks))  # noqa: B023
            except RestoreFailed as error:
                problems.append(error.message)
                continue
            self.decide(snapshot)
            return snapshot, sources
        raise AssertionError(f"no candidate could be restored: {problems}")

    def decide(self, snapshot: SnapshotId) -> None:
        request = pb.DecideRequest(
            run=self.run,
            incarnation=incarnation_to_pb(self.incarnation),
            roster=roster_to_pb(self.roster),
            parent=snapshot_to_pb(snapshot),
        )
        self.ranks[0].call("Decide", request)

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
        payload = rank.read(fetched.lease, layout.payload_bytes)
        expected = self.bytes_of(rank.rank, snapshot)
        start = layout.segment_offsets[0]
        assert segments[0].size_bytes == len(expected), f"rank {rank.rank} has another size"
        assert np.array_equal(payload[start : start + len(expected)], expected), f"rank {rank.rank} differs"
        rank.call("Release", pb.ReleaseRequest(lease=fetched.lease))
        return fetched.source

    def close(self) -> None:
        for rank in self.ranks:
            rank.channel.close()
        self.pool.shutdown(wait=False)
