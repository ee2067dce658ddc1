"""Sealed copies read again: every block against its CRC-32C, parity against the data it was made of.

The scrubber reads slowly and compares samples, `ckptd verify` at once and all of it. Nothing is leased: a lease could
leave a due step without a slot. So a file may be reused while it is read, and whoever finds damage first asks the copy
whether it ``is_current``. Nothing is mended here: what is found in memory goes to the scrubber.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from ckptd.arena.arena import Arena
from ckptd.arena.parity import ParityFile
from ckptd.arena.slot import Slot
from ckptd.erasure.code import Code
from ckptd.erasure.groups import group_of
from ckptd.erasure.holdings import Holder, holder_of_image
from ckptd.erasure.stripes import Stripes
from ckptd.errors import CkptdError, Corrupt, FormatTooNew
from ckptd.format.blocks import find_corrupt_block
from ckptd.format.slot import SlotState
from ckptd.memory import Bytes
from ckptd.model import SnapshotId
from ckptd.peers.gather import Source, gather, source_from
from ckptd.peers.rate import TokenBucket
from ckptd.peers.transport import Piece, Transport, batch_blocks
from ckptd.restore.inventory import MEMORY
from ckptd.serve.node_run import NodeRun
from ckptd.serve.peer_messages import held_here
from ckptd.serve.run_metrics import tier_label
from ckptd_api.convert import snapshot_from_pb, snapshot_to_pb
from ckptd_api.v1 import operator_pb2 as pb

if TYPE_CHECKING:
    from ckptd.serve.node import Node

PARITY: Final = "parity"
_PART_BYTES: Final = 4 << 20  # between two signs of progress
_SPAN_BYTES: Final = 64 << 20  # of a piece, in one pull
TransportTo = Callable[[Holder], Transport]
_Part = tuple[int, int, list[Bytes | None]]  # of ``gather``


class NotCompared(Exception):
    """The data that parity was made of cannot be had now: nothing is known to be wrong."""


# --- copies in memory ---------------------------------------------------------------------------------------------
class SlotCopy:
    """A sealed slot as it was when this was made, under the arena's lock. Keep it only while it is read: it keeps the
    memory of a slot that is dropped meanwhile."""

    place: Final = MEMORY

    def __init__(self, arena: Arena, slot: Slot) -> None:
        self.file = slot
        self.header = slot.sealed_header
        self.use = slot.generation
        self.run, self.snapshot = self.header.run, self.header.snapshot
        self.block_bytes = self.header.layout.block_bytes
        self.data, self.table = slot.payload, slot.table
        self.name = f"rank {self.header.rank}"
        self._arena = arena

    def is_current(self) -> bool:
        """The slot still holds this copy, sealed."""
        with self._arena.lock:
            is_here = self.file in self._arena.slots_of(self.run, self.header.rank)
            return is_here and self.file.state is SlotState.SEALED and self.file.generation == self.use

    def as_adopted(self) -> SlotState:
        """The state that a daemon started now would find; Corrupt when header or CRC table do not hold."""
        fresh = Slot(self.file.path, self.file.capacity_bytes)
        fresh.adopt()
        return fresh.state

    def region_of(self, block: int) -> str:
        return self.file.region_of(block)


class ParityCopy:
    """The same of a sealed parity fragment."""

    place: Final = PARITY

    def __init__(self, arena: Arena, file: ParityFile) -> None:
        self.file = file
        self.header = file.held
        self.use = file.use
        self.run, self.snapshot = self.header.group.run, self.header.group.snapshot
        self.block_bytes = self.header.group.block_bytes
        self.data, self.table = file.fragment.data, file.table
        self.name = f"stripe {self.header.stripe} row {self.header.row} of {self.header.group.geometry}"
        self._arena = arena

    def is_current(self) -> bool:
        with self._arena.lock:
            return self.file.state is SlotState.SEALED and self.file.use == self.use

    def as_adopted(self) -> SlotState:
        fresh = ParityFile(self.file.path, self.file.capacity_bytes, self._arena.lock)
        fresh.adopt()
        return fresh.state

    def region_of(self, block: int) -> str:
        return "fragment"


Copy = SlotCopy | ParityCopy


class Damage(NamedTuple):
    """What is wrong with a copy."""

    copy: Copy
    problem: str


def find_copy(arena: Arena, run: str, file_id: str) -> Copy | None:
    """The sealed copy of ``run`` that the file of that name holds now."""
    with arena.lock:
        for slot in arena.sealed(run):
            if slot.id == file_id:
                return SlotCopy(arena, slot)
        for file in arena.parity.sealed(run):
            if file.id == file_id:
                return ParityCopy(arena, file)
    return None


def check(copy: Copy) -> Iterator[int]:
    """Read a copy against its checksums, as a daemon that is started now would; the bytes read after each part.

    Raises:
        Corrupt: what differs, or the file was reused meanwhile: ask ``is_current``.
    """
    name = copy.file.id
    try:
        state = copy.as_adopted()
    except FileNotFoundError as error:
        raise Corrupt(f"{name}: the file is gone") from error
    except FormatTooNew as error:  # this daemon sealed it: so it is no later version
        raise Corrupt(error.message) from error
    except ValueError as error:
        raise Corrupt(f"{name}: header: {error}") from error
    if state is not SlotState.SEALED:
        raise Corrupt(f"{name}: header: state is {state.name}")
    step = max(1, _PART_BYTES // copy.block_bytes)
    for first in range(0, len(copy.table), step):
        last = min(first + step, len(copy.table))
        block = find_corrupt_block(copy.data, copy.block_bytes, copy.table, first, last)
        if block is not None:
            raise Corrupt(f"{name}: {copy.region_of(block)}: block {block} does not match its CRC-32C")
        yield (last - first) * copy.block_bytes


# --- parity against data ------------------------------------------------------------------------------------------
def run_here(node: Node, run: str) -> NodeRun | None:
    """The newest incarnation of ``run``, when this daemon has taken it up."""
    record = node.records.get(run)
    return node.find_run(run, record.newest.incarnation) if record and record.newest else None


def is_protected(run: NodeRun, snapshot: SnapshotId) -> bool:
    """Its parity is in place, or being made: so every node keeps its slots."""
    return snapshot in (run.parity_id(), run.protecting_id())


def expected_holders(node: Node, run: NodeRun, snapshot: SnapshotId) -> list[Holder]:
    """This node as it is, and the others of its parity group with what they hold if nothing was lost: nobody is asked.
    Empty when the group of this roster has no parity of ``snapshot`` here."""
    here, group = held_here(node.arena, run.run, node.node_id, node.address), group_of(run.groups, node.node_id)
    images = tuple(run.roster.ranks_of(member) for member in group.members) if group else ()
    known = next((p for p in here.parity if p.snapshot == snapshot and p.images == images), None)
    if group is None or known is None:
        return []
    stripes, holders = Stripes(known.geometry, 1), [here]
    for position, member in enumerate(group.members):
        if member != node.node_id:
            parity = replace(known, fragments=frozenset(stripes.parity_of(position)))
            ranks = {snapshot: frozenset(images[position])}
            holders.append(Holder(member, run.roster.nodes[member].address, ranks, {}, (parity,)))
    return holders


def located_holders(node: Node, run: NodeRun, snapshot: SnapshotId) -> list[Holder]:
    """Who holds what of ``snapshot``, as the coordinator knew it some seconds ago, else as those do who answer; this
    node as it is."""
    try:
        found: Sequence[Holder] = node.peering.cluster.locate(run.run, run.incarnation, run.roster, snapshot)
    except CkptdError:
        found = node.peering.cluster.holders(run.run, run.roster.entries)
    here = held_here(node.arena, run.run, node.node_id, node.address)
    return [here, *(holder for holder in found if holder.node_id != node.node_id)]


def match(
    copy: ParityCopy,
    holders: Sequence[Holder],
    transport_to: TransportTo,
    spans: Iterable[tuple[int, int]],
) -> Iterator[int]:
    """Pull the same blocks of all k pieces, encode them, and hold the parity against it; the bytes compared after each
    part. ``spans`` are (first block, blocks): while one is pulled, the slots it comes from are leased by their daemons.

    Raises:
        Corrupt: it is not the parity of this data, though both match their checksums; or see ``check``.
        NotCompared: a piece cannot be had, or comes corrupt.
    """
    record, size, row = copy.header.group, copy.block_bytes, copy.header.row
    sources, code = _sources(copy, holders, transport_to), Code(record.geometry)
    batch = batch_blocks(size)
    for first, blocks in spans:
        with closing(_pulled(gather(sources, first, blocks, batch, size, TokenBucket(0)))) as pulled:
            for at, count, columns in pulled:
                made = np.empty(count * size, np.uint8)
                code.encode_row(row, columns, made)
                differs = made != np.frombuffer(copy.data, np.uint8, count * size, at * size)
                if differs.any():
                    block = at + int(differs.argmax()) // size
                    raise Corrupt(f"{copy.file.id}: fragment: block {block} is not the parity of its data")
                yield count * size


def _pulled(parts: Iterator[_Part]) -> Generator[_Part, None, None]:
    try:
        yield from parts
    except CkptdError as error:
        raise NotCompared(error.message) from error


def _sources(copy: ParityCopy, holders: Sequence[Holder], transport_to: TransportTo) -> list[Source | None]:
    record, stripes = copy.header.group, Stripes(copy.header.group.geometry, copy.header.piece_blocks)
    sources: list[Source | None] = []
    for position, piece in stripes.data_of(copy.header.stripe):
        image = record.images[position]
        there = stripes.blocks_there(image.blocks, piece)
        if not there:
            sources.append(None)
            continue
        holder = holder_of_image(holders, record.snapshot, image.ranks)
        if holder is None:
            raise NotCompared(f"nobody holds the shards of ranks {', '.join(map(str, image.ranks))}")
        what = Piece(copy.run, record.snapshot, image.ranks)
        sources.append(source_from(transport_to(holder), holder, what, piece * stripes.piece_blocks, there))
    return sources


# --- on demand ----------------------------------------------------------------------------------------------------
class _Copies(NamedTuple):
    """One line of what is verified: ``read`` yields bytes done and findings."""

    run: str
    tier: str
    size_bytes: int
    read: Callable[[], Iterator[int | pb.Finding]]


def verify(node: Node, rows: list[pb.CheckpointRow]) -> Iterator[pb.VerifyResponse]:
    """Progress as it grows, findings as they are made; copies that are not complete are not copies and are passed.

    With the copies of ``rows`` goes the parity that this node holds of their snapshots. A finding without a snapshot is
    a note: nothing is wrong, but something could not be checked.
    """
    work = [_of_row(node, row) for row in rows if row.state != "uncommitted"]
    snapshots = dict.fromkeys((row.run, snapshot_from_pb(row.snapshot)) for row in rows)
    work += [parity for run, snapshot in snapshots if (parity := _of_parity(node, run, snapshot))]
    answer = pb.VerifyResponse(bytes_total=sum(copies.size_bytes for copies in work))
    yield answer
    begin = 0
    for copies in work:
        done, end = begin, begin + copies.size_bytes
        for event in copies.read():
            answer.ClearField("findings")
            if isinstance(event, int):
                done = answer.bytes_done = min(done + event, end)
            else:
                answer.findings.append(event)
            yield answer
        node.metrics.bytes_total.labels(copies.run, "verified", copies.tier).inc(copies.size_bytes)
        answer.ClearField("findings")
        answer.copies_checked += 1
        answer.bytes_done = begin = end
    yield answer


def _of_row(node: Node, row: pb.CheckpointRow) -> _Copies:
    read = _read_memory if row.source == MEMORY else _read_tier
    tier = tier_label(row.source, node.tiers)
    return _Copies(row.run, tier, row.size_bytes, partial(read, node, row))


def _of_parity(node: Node, run: str, snapshot: SnapshotId) -> _Copies | None:
    files = [
        file for file in node.arena.parity.sealed(run) if (held := file.header) and held.group.snapshot == snapshot
    ]
    size_bytes = sum(held.fragment_bytes for file in files if (held := file.header))
    ids = [file.id for file in files]
    return _Copies(run, MEMORY, size_bytes, partial(_read_parity, node, run, snapshot, ids)) if ids else None


def _read_memory(node: Node, row: pb.CheckpointRow) -> Iterator[int | pb.Finding]:
    snapshot = snapshot_from_pb(row.snapshot)
    for file_id in [slot.id for slot in node.arena.sealed(row.run)]:
        copy = find_copy(node.arena, row.run, file_id)
        if copy is not None and copy.snapshot == snapshot:
            yield from _found(node, copy, check(copy))


def _read_parity(node: Node, run: str, snapshot: SnapshotId, file_ids: list[str]) -> Iterator[int | pb.Finding]:
    joined = run_here(node, run)
    holders = (expected_holders(node, joined, snapshot) or located_holders(node, joined, snapshot)) if joined else []
    for file_id in file_ids:
        copy = find_copy(node.arena, run, file_id)
        if not isinstance(copy, ParityCopy) or copy.snapshot != snapshot:
            continue  # recycled meanwhile
        if not (yield from _found(node, copy, check(copy))):
            continue
        if joined is None:
            continue
        try:
            compared = match(copy, holders, node.peering.transport_to, _spans(joined, copy))
            yield from _found(node, copy, (0 for _ in compared))  # its bytes are counted
        except NotCompared as why:
            if copy.is_current():
                yield pb.Finding(source=PARITY, problem=f"{snapshot}, {copy.name}: not held against its data: {why}")


def _spans(run: NodeRun, copy: ParityCopy) -> Iterator[tuple[int, int]]:
    """All of a fragment, as long as the slots of its data are kept anyway: no due step must wait for them."""
    step = max(1, _SPAN_BYTES // copy.block_bytes)
    for first in range(0, copy.header.piece_blocks, step):
        if is_protected(run, copy.snapshot):
            yield first, min(step, copy.header.piece_blocks - first)


def _found(node: Node, copy: Copy, reading: Iterator[int]) -> Generator[int | pb.Finding, None, bool]:
    """What ``reading`` yields and, when that ends in Corrupt, the finding, of which the scrubber hears too; whether the
    copy is whole."""
    try:
        yield from reading
    except Corrupt as error:
        if copy.is_current():
            node.scrubber.found(Damage(copy, error.message))
            problem = f"{copy.name}: {error.message}"
            yield pb.Finding(source=copy.place, snapshot=snapshot_to_pb(copy.snapshot), problem=problem)
        return False
    return True


def _read_tier(node: Node, row: pb.CheckpointRow) -> Iterator[int | pb.Finding]:
    """The tier's verify runs on a thread, so that its progress can be passed on while it reads."""
    tier = next(t for t in node.tiers if t.spec.url == row.source)
    events: queue.Queue[int | list[str]] = queue.Queue()

    def read() -> None:
        try:
            problems = tier.verify(row.run, snapshot_from_pb(row.snapshot), events.put)
            node.metrics.corrupt_total.labels(row.run, "tier").inc(len(problems))
            events.put(problems)
        except CkptdError as error:
            events.put([error.message])
        except Exception as error:  # noqa: BLE001  a thread's boundary: the reader must hear of the end
            events.put([f"{type(error).__name__}: {error}"])

    threading.Thread(target=read, name="verify", daemon=True).start()
    while isinstance(event := events.get(), int):
        yield event
    for problem in event:
        yield pb.Finding(source=row.source, snapshot=row.snapshot, problem=problem)
