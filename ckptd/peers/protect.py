"""Protection of one snapshot on one node: pull the same block of all k pieces, check, encode, again and again.

Layer: ``peers``; threads. Encoding is idempotent: a fragment is computed from its pieces alone, block by block, nothing
is folded into what is there; so a pull that broke goes on from the batch it was at, and an attempt that was given up
costs only time. The new parity lies in memory of its own while the generation before it stays. Memory: one batch of k
pieces a worker. REFT (arXiv 2310.12670) protects in memory the same way; the code is that of ``ckptd.erasure``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, TypeVar

import structlog

from ckptd.arena.arena import Arena
from ckptd.arena.parity import ParityFile
from ckptd.erasure.code import Code
from ckptd.erasure.groups import Group
from ckptd.erasure.holdings import Holder
from ckptd.erasure.stripes import Stripes
from ckptd.errors import CkptdError, Corrupt, ProtectFailed, UnknownStep
from ckptd.failpoints import failpoint
from ckptd.format.blocks import checksum_blocks
from ckptd.format.image import GroupRecord, ImageRecord
from ckptd.format.parity import ParityHeader
from ckptd.metrics import Metrics
from ckptd.model import Roster, SnapshotId
from ckptd.peers.corruption import SLOTS, Corruption
from ckptd.peers.gather import Source, SourceFailed, gather, name_of, source_from
from ckptd.peers.rate import TokenBucket
from ckptd.peers.transport import Piece, Transport, batch_blocks

_BACKOFF_S: Final = (0.1, 0.25, 0.5, 1.0, 2.0)
_ABSENT_S: Final = 3.0
_WORKERS: Final = 2
T = TypeVar("T")
log = structlog.get_logger()


class _Passed(Exception):
    """The run went on to another snapshot."""


@dataclass(frozen=True, slots=True)
class Task:
    """Protect ``snapshot`` of ``run`` on the node at ``position`` of ``group``. ``is_wanted`` says whether still;
    ``report(problem)`` takes the end: None when all parity is in place."""

    run: str
    snapshot: SnapshotId
    roster: Roster
    group: Group
    node_id: str
    is_wanted: Callable[[], bool]
    report: Callable[[str | None], None]

    @property
    def position(self) -> int:
        return self.group.position(self.node_id)

    def holder(self, member: str) -> Holder:
        """Where that member of the group is."""
        return Holder(member, self.roster.nodes[member].address)


DescribeImage = Callable[[str, str, SnapshotId, Sequence[int]], ImageRecord]


class Protector:
    """Works on one task of a run at a time, each on a thread of its own. ``describe_image`` asks the daemon at an
    address for the record of an image; a node that does not get anywhere for ``deadline_s`` ends the task."""

    def __init__(
        self,
        arena: Arena,
        transport: Transport,
        describe_image: DescribeImage,
        bucket: TokenBucket,
        metrics: Metrics,
        deadline_s: float,
    ) -> None:
        self._arena = arena
        self._transport = transport
        self._describe_image = describe_image
        self._bucket = bucket
        self._metrics = metrics
        self._deadline_s = deadline_s
        self._pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="protect")
        self._is_closed = threading.Event()

    def submit(self, task: Task) -> None:
        threading.Thread(target=self._run, args=(task,), name="protection", daemon=True).start()

    def close(self) -> None:
        self._is_closed.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    # --- one task ------------------------------------------------------------------------------------------------
    def _run(self, task: Task) -> None:
        started, problem = time.monotonic(), None
        try:
            self._protect(task)
        except _Passed:
            return
        except CkptdError as error:
            problem = error.message
        except Exception as error:  # a thread's boundary: the coordinator must hear of the end
            if self._is_closed.is_set():
                return
            log.exception("protection failed", run=task.run, snapshot=str(task.snapshot))
            problem = f"{type(error).__name__}: {error}"
        if problem is None:
            self._metrics.protect_seconds.labels(task.run).observe(time.monotonic() - started)
        else:
            log.warning("not protected", run=task.run, snapshot=str(task.snapshot), reason=problem)
        task.report(problem)

    def _protect(self, task: Task) -> None:
        failpoint("protect.before")
        images = tuple(self._image(task, member) for member in task.group.members)
        record = GroupRecord(task.run, task.snapshot, task.group.geometry, task.roster.block_bytes, images)
        stripes = Stripes.plan(record.geometry, record.image_blocks)
        missing = [
            (stripe, row)
            for stripe, row in stripes.parity_of(task.position)
            if self._arena.parity.find(task.run, task.snapshot, record.key, stripe, row) is None
        ]
        pending = [self._submit(task, record, stripes, stripe, row) for stripe, row in missing]
        try:
            for future in pending:
                future.result()
        finally:
            for future in pending:
                future.cancel()

    def _submit(self, task: Task, record: GroupRecord, stripes: Stripes, stripe: int, row: int) -> Future[None]:
        future = self._pool.submit(self._make, task, record, stripes, stripe, row)
        self._metrics.parity_queued.inc()
        future.add_done_callback(lambda _: self._metrics.parity_queued.dec())
        return future

    def _image(self, task: Task, member: str) -> ImageRecord:
        """The record of ``member``'s image, asked for until it answers or the deadline is over."""
        holder, ranks = task.holder(member), task.roster.ranks_of(member)
        attempt = self._attempt(task, name_of(holder))
        while True:
            try:
                image = self._describe_image(holder.address, task.run, task.snapshot, ranks)
                if image.ranks != ranks or any(s.header.snapshot != task.snapshot for s in image.shards):
                    raise Corrupt(f"{attempt.name} described another image than was asked for")
                return image
            except CkptdError as error:
                attempt.failed(error)

    def _make(self, task: Task, record: GroupRecord, stripes: Stripes, stripe: int, row: int) -> None:
        """One parity fragment, from nothing to sealed."""
        self._check_wanted(task)
        file = self._arena.parity.begin(ParityHeader(record, stripe, row, stripes.piece_blocks))
        try:
            self._fill(task, record, stripes, stripe, row, file)
            failpoint("protect.before_seal")
            file.seal()
        except BaseException:
            self._arena.parity.abort(file)
            raise

    def _fill(self, task: Task, record: GroupRecord, stripes: Stripes, stripe: int, row: int, file: ParityFile) -> None:
        code, size, batch = Code(record.geometry), record.block_bytes, batch_blocks(record.block_bytes)
        sources = [self._source(task, record, stripes, position, piece) for position, piece in stripes.data_of(stripe)]
        fragment = file.fragment
        attempt, done = self._attempt(task, f"stripe {stripe}"), 0
        pulled = self._metrics.bytes_total.labels(task.run, "protected", "memory")
        spent, corruption = _Spent(), Corruption(task.run, self._count_corrupt)
        while done < stripes.piece_blocks:
            try:
                parts = gather(sources, done, stripes.piece_blocks - done, batch, size, self._bucket)
                for at, count, columns in spent.timed(parts):
                    self._check_wanted(task)
                    target = fragment[at * size : (at + count) * size]
                    code.encode_row(row, columns, target)
                    checksum_blocks(fragment.data, size, at, at + count, file.table)
                    pulled.inc(size * sum(max(0, min(count, source.blocks - at)) for source in sources))
                    done = at + count
                    attempt.progressed()
                    failpoint("protect.batch")
            except CkptdError as error:
                if isinstance(error, SourceFailed) and error.source:
                    corruption.look(error, SLOTS, error.source.name)
                attempt.failed(error)
        self._metrics.transfer_seconds.labels(task.run).observe(spent.transfer_s)
        self._metrics.encode_seconds.labels(task.run).observe(spent.encode_s)

    def _count_corrupt(self, run: str, place: str, _: str) -> None:
        self._metrics.corrupt_total.labels(run, place).inc()

    def _source(self, task: Task, record: GroupRecord, stripes: Stripes, position: int, piece: int) -> Source:
        image, first = record.images[position], piece * stripes.piece_blocks
        of = Piece(task.run, task.snapshot, image.ranks)
        holder = task.holder(task.group.members[position])
        return source_from(self._transport, holder, of, first, stripes.blocks_there(image.blocks, piece))

    def _check_wanted(self, task: Task) -> None:
        if self._is_closed.is_set() or not task.is_wanted():
            raise _Passed

    def _attempt(self, task: Task, name: str) -> _Attempt:
        def pause(delay_s: float) -> None:
            self._metrics.protect_retries_total.labels(task.run).inc()
            self._is_closed.wait(delay_s)
            self._check_wanted(task)

        return _Attempt(name, self._deadline_s, pause)


@dataclass(slots=True)
class _Spent:
    """Where the time of a fragment went; pauses between attempts are in neither."""

    transfer_s: float = 0.0
    encode_s: float = 0.0

    def timed(self, parts: Iterator[T]) -> Iterator[T]:
        """``parts``; the time to get one is transfer, the time until the next is asked for is encoding."""
        while True:
            began_s = time.monotonic()
            try:
                part = next(parts, None)
            finally:
                got_s = time.monotonic()
                self.transfer_s += got_s - began_s
            if part is None:
                return
            yield part
            self.encode_s += time.monotonic() - got_s


class _Attempt:
    """Repeats with backoff until nothing moved for ``deadline_s``; then ProtectFailed with the last reason."""

    def __init__(self, name: str, deadline_s: float, pause: Callable[[float], None]) -> None:
        self.name = name
        self._deadline_s = deadline_s
        self._pause = pause
        self._failures = 0
        self._since_s = time.monotonic()

    def progressed(self) -> None:
        self._failures, self._since_s = 0, time.monotonic()

    def failed(self, error: CkptdError) -> None:
        """Wait before the next try; ProtectFailed when the deadline is over."""
        # What a daemon says that it does not hold will hardly come back; it may just have restarted, though.
        deadline_s = min(_ABSENT_S, self._deadline_s) if isinstance(error, UnknownStep) else self._deadline_s
        if time.monotonic() - self._since_s > deadline_s:
            raise ProtectFailed(f"{self.name}: {error.message}", error.hint) from error
        log.info("protection is tried again", what=self.name, reason=error.message)
        self._pause(_BACKOFF_S[min(self._failures, len(_BACKOFF_S) - 1)])
        self._failures += 1
