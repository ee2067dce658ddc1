"""The drain: sealed slots of this node's ranks into the tiers, one shard after the other, on one thread."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import structlog

from ckptd.arena.slot import Slot
from ckptd.errors import CkptdError, Corrupt, DrainFailed
from ckptd.failpoints import failpoint
from ckptd.format.blocks import find_corrupt_block
from ckptd.format.slot import SlotState
from ckptd.metrics import Metrics
from ckptd.model import SnapshotId
from ckptd.serve.commits import NodeCommits
from ckptd.tiers.spec import tiers_for
from ckptd.tiers.tier import Tier
from ckptd_api.v1 import coordinator_pb2 as pb

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Drain:
    """One rank's shard on its way to every tier; ``report`` takes what came of it, ``commits`` what is written in
    tiers of this node's own."""

    run: str
    snapshot: SnapshotId
    rank: int
    slot: Slot
    commits: NodeCommits
    report: Callable[..., None]


class Drainer:
    """A queue of drains. The slot of each is leased by whoever queues it."""

    def __init__(self, tiers: list[Tier], metrics: Metrics) -> None:
        self._tiers = tiers
        self._metrics = metrics
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="drain")
        self._pending: deque[float] = deque()  # since when each waits: one thread ends them in their order
        self._changed = threading.Condition()

    def submit(self, drain: Drain) -> None:
        with self._changed:
            self._pending.append(time.monotonic())
            self._metrics.drains_queued.set(len(self._pending))
        self._pool.submit(self._run, drain)

    @property
    def oldest_s(self) -> float:
        """Age of the oldest drain that has not ended; 0 when there is none."""
        with self._changed:
            return time.monotonic() - self._pending[0] if self._pending else 0.0

    def wait_idle(self, timeout_s: float) -> bool:
        """True once nothing is queued or under way."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._pending, timeout_s)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _run(self, drain: Drain) -> None:
        started = time.monotonic()
        try:
            progress = self._write(drain)
        except CkptdError as error:
            log.warning("drain given up", run=drain.run, rank=drain.rank, step=drain.snapshot.step, reason=str(error))
            progress = [_failed(drain, str(error))]
        except Exception as error:  # a thread's boundary: the drain must end, with its reason
            log.exception("drain failed", run=drain.run, rank=drain.rank, step=drain.snapshot.step)
            progress = [_failed(drain, f"{type(error).__name__}: {error}")]
        self._metrics.drain_seconds.labels(drain.run).observe(time.monotonic() - started)
        try:
            drain.report(*progress)
        finally:
            with self._changed:
                self._pending.popleft()
                self._metrics.drains_queued.set(len(self._pending))
                self._changed.notify_all()

    def _write(self, drain: Drain) -> list[pb.Progress]:
        slot, layout = drain.slot, drain.slot.sealed_header.layout
        if slot.state is not SlotState.SEALED or slot.sealed_header.snapshot != drain.snapshot:
            raise DrainFailed(f"slot {slot.id} holds something else by now")
        failpoint("drain.before")
        block = find_corrupt_block(slot.payload, layout.block_bytes, slot.table)
        if block is not None:
            # Nothing rotten is ever written out as a good copy.
            self._metrics.corrupt_total.labels(drain.run, "memory").inc()
            raise Corrupt(f"slot {slot.id}: {slot.region_of(block)}: block {block} does not match its CRC-32C")
        progress = []
        wanted = tiers_for(drain.snapshot.step, (tier.spec for tier in self._tiers))
        for tier in (tier for tier in self._tiers if tier.spec in wanted):
            record = tier.write_rank(drain.run, drain.snapshot, drain.rank, layout, slot.payload, slot.table)
            self._metrics.bytes_total.labels(drain.run, "drained", tier.spec.label).inc(
                record.index_bytes + sum(array.size_bytes for array in record.arrays)
            )
            if tier.spec.scope == "node":
                drain.commits.written(tier, drain.snapshot, record)
                continue
            progress.append(
                pb.Progress(
                    rank=drain.rank,
                    step=drain.snapshot.step,
                    level=pb.LEVEL_DRAINED,
                    tier=tier.spec.url,
                    arrays=[
                        pb.ArrayWritten(dtype=a.dtype, size_bytes=a.size_bytes, digest=a.digest) for a in record.arrays
                    ],
                    index_bytes=record.index_bytes,
                    index_crc=record.index_crc,
                )
            )
        # Without a tier: all of them are written.
        progress.append(pb.Progress(rank=drain.rank, step=drain.snapshot.step, level=pb.LEVEL_DRAINED))
        failpoint("drain.after")
        return progress


def _failed(drain: Drain, reason: str) -> pb.Progress:
    return pb.Progress(rank=drain.rank, step=drain.snapshot.step, level=pb.LEVEL_DRAIN_FAILED, reason=reason)
