"""What the measurements of several nodes share: daemons on loopback, ranks without torch, what their metrics say."""

from __future__ import annotations

import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from bench.grpc_limit import Stream
from ckptd.erasure.stripes import Stripes
from ckptd.format.blocks import block_bytes_for
from ckptd.format.image import ImageRecord, decode_image
from ckptd.model import SnapshotId
from ckptd_api.convert import incarnation_to_pb, snapshot_to_pb
from ckptd_api.v1 import node_pb2, peers_pb2, peers_pb2_grpc, types_pb2

# Daemons and ranks of several nodes are what the tests are made of: one set of them, not two. tests/ is no package.
sys.path.append(str(Path(__file__).parents[1] / "tests"))

import shard_ranks
from harness import DaemonProcess

__all__ = ["DaemonProcess", "PeerJob", "heard", "peers", "protection_streams", "pulled_bytes", "scrape", "value"]
WAIT_S = 120.0


@contextmanager
def peers(nodes: int, memory_bytes: int, *flags: object) -> Iterator[list[DaemonProcess]]:
    """As many daemons, each listening on loopback for the others and serving its metrics."""
    daemons: list[DaemonProcess] = []
    try:
        for _ in range(nodes):
            memory = str(memory_bytes)
            daemons.append(DaemonProcess(*flags, memory=memory, http=True, listen=True, wait=False))
        for daemon in daemons:
            daemon.wait_ready()
        yield daemons
    finally:
        for daemon in daemons:
            daemon.close()


@cache
def _random(rank: int, size_bytes: int) -> np.ndarray:
    return np.random.default_rng(rank).integers(0, 256, size_bytes, np.uint8)


class PeerJob(shard_ranks.ShardJob):
    """A rank of ``size_bytes`` at each daemon. Blocks have the size that a Checkpointer's would have; a rank saves the
    same bytes at every step, so that making them costs nothing."""

    def __init__(self, placement: Sequence[DaemonProcess], size_bytes: int, protect: str) -> None:
        shard_ranks.BLOCK_BYTES = block_bytes_for(size_bytes)  # where both the roster and a save take it from
        super().__init__(placement, protect=protect, size_bytes=size_bytes, is_prepared=True)

    def bytes_of(self, rank: int, snapshot: SnapshotId) -> np.ndarray:
        return _random(rank, self.size_of(rank, snapshot.step))

    def save_all(self, step: int) -> float:
        """Every rank saves. The Unix time at which the last was sealed: the step is staged once that is reported."""
        self.save(step, ranks=range(len(self.ranks)))
        return time.time()

    def watch(self) -> Iterator[types_pb2.Watermarks]:
        """Watermarks as the daemon of rank 0 tells its rank, when they change. Keep it: its end is the rank's death."""
        rank, incarnation = self.ranks[0], incarnation_to_pb(self.incarnation)
        request = node_pb2.WatchRequest(run=self.run, incarnation=incarnation, rank=rank.rank)
        for answer in rank.stub.Watch(request, metadata=rank.meta):
            yield answer.watermarks

    def image(self, rank: int, snapshot: SnapshotId) -> ImageRecord:
        """The record of the image that ``rank``'s node protects."""
        place = self.ranks[rank]
        request = peers_pb2.DescribeImageRequest(run=self.run, snapshot=snapshot_to_pb(snapshot), ranks=[rank])
        answer = peers_pb2_grpc.PeerServiceStub(place.channel).DescribeImage(request, metadata=place.meta)
        return decode_image(answer.image, f"rank {rank}")


def heard(watch: Iterator[types_pb2.Watermarks], step: int) -> float:
    """The Unix time at which ``watch`` says that ``step`` is protected."""
    until = time.time() + WAIT_S
    for marks in watch:
        if marks.HasField("protected") and marks.protected >= step:
            return time.time()
        if time.time() > until:
            break
    raise RuntimeError(f"step {step} was not protected within {WAIT_S:g} s")


def protection_streams(stripes: Stripes, image_blocks: int, block_bytes: int) -> dict[int, list[Stream]]:
    """What each position of a group reads to make its parity of images of one length: m x k pieces, zeros not sent."""
    plan: dict[int, list[Stream]] = {}
    for position in range(stripes.n):
        pieces = [piece for stripe, _ in stripes.parity_of(position) for piece in stripes.data_of(stripe)]
        for source, piece in pieces:
            first = piece * stripes.piece_blocks
            there = max(0, min(stripes.piece_blocks, image_blocks - first))
            plan.setdefault(position, []).append(Stream(source, first * block_bytes, there * block_bytes))
    return plan


# --- metrics ------------------------------------------------------------------------------------------------------
def scrape(http: str) -> list[Sample]:
    """Everything that /metrics of the daemon at that HOST:PORT says now."""
    with urllib.request.urlopen(f"http://{http}/metrics", timeout=10) as reply:
        families = text_string_to_metric_families(reply.read().decode())
    return [sample for family in families for sample in family.samples]


def value(samples: Sequence[Sample], name: str, **labels: str) -> float:
    """The sum of the samples of that name that have those labels."""
    return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())


def pulled_bytes(http: Sequence[str]) -> int:
    """Bytes that these daemons have read from one another for protection so far."""
    return int(sum(value(scrape(one), "ckptd_bytes_total", direction="protected") for one in http))
