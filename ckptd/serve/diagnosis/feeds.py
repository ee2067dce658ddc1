"""What the ranks of this node have sent of their timings, reduced to steps, on its way to the analyst.

One ``NodeFeed`` an incarnation of a run. Bounded: a rank keeps its last steps, so that an analyst that is new can be
told of them, and what samples were not sent yet. Communicators are numbered anew for the node, as ranks share them, and
forgotten with the last rank whose table names them.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from ckptd.detect.records import Communicator
from ckptd.detect.reduce import Reducer
from ckptd.errors import InvalidRequest
from ckptd.format.timings import OPERATION, SAMPLE, SELF, STEP, Rows, pack, unpack
from ckptd.serve.diagnosis.black_box import BlackBox
from ckptd_api.v1 import coordinator_pb2, node_pb2, timings_pb2

KEPT_STEPS: Final = 192
MOST_ROWS: Final = 65536
MOST_SAMPLES: Final = 8192
MOST_SIGNATURES: Final = 256  # of what a rank that is gone has entered last
MOST_COMMUNICATORS: Final = 4096
MOST_OF_NODE: Final = 4 * MOST_COMMUNICATORS
_MOST_MEMBERS: Final = 1 << 20
_MOST_NAME: Final = 200


@dataclass(slots=True)
class RankFeed:
    """One rank: ``own_rows`` are its numbers of communicators, in the node's; of ``kept`` the newest ``unsent`` steps
    were not sent."""

    reducer: Reducer = field(default_factory=Reducer)
    table: dict[int, Communicator] = field(default_factory=dict)
    own_rows: dict[int, int] = field(default_factory=dict)
    kept: Rows = field(default_factory=lambda: np.empty(0, SELF))
    unsent: int = 0
    samples: Rows = field(default_factory=lambda: np.empty(0, SAMPLE))  # not sent
    heartbeat: timings_pb2.Heartbeat | None = None
    coverage: timings_pb2.Coverage | None = None
    heard_s: float = 0.0
    is_heard: bool = False  # since the last report
    told_positions: frozenset[str] = frozenset()
    black_box: BlackBox | None = None
    last: tuple[timings_pb2.Signature, ...] | None = None  # what it had entered when it went


class NodeTable:
    """The communicators of a node by id, each under a row of the node's for as long as it is held."""

    def __init__(self) -> None:
        self._entries: dict[str, timings_pb2.CommunicatorEntry] = {}
        self._holders: Counter[str] = Counter()
        self._free: list[int] = []
        self._released: list[int] = []
        self._untold: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def hold(self, entry: timings_pb2.CommunicatorEntry) -> int:
        """The node's row of ``entry``, held once more; InvalidRequest when there are too many."""
        known = self._entries.get(entry.id)
        if known is None:
            if len(self) + len(self._released) >= MOST_OF_NODE:
                raise InvalidRequest(f"communicator {entry.id}: a node has at most {MOST_OF_NODE}")
            known = timings_pb2.CommunicatorEntry()
            known.CopyFrom(entry)
            known.row = self._free.pop() if self._free else len(self) + len(self._released)
            self._entries[entry.id] = known
            self._untold[entry.id] = None
        self._holders[entry.id] += 1
        return known.row

    def release(self, id_: str) -> None:
        """Held once less; with the last it is forgotten."""
        self._holders[id_] -= 1
        if not self._holders[id_]:
            del self._holders[id_]
            self._untold.pop(id_, None)
            self._released.append(self._entries.pop(id_).row)

    def recycle(self) -> list[int]:
        """The rows that became free, to be given away again: nothing may name them any more."""
        rows, self._released = self._released, []
        self._free += rows
        return rows

    def news(self) -> list[timings_pb2.CommunicatorEntry]:
        """What was not told before."""
        untold, self._untold = self._untold, {}
        return [self._entries[id_] for id_ in untold]

    def forget_told(self) -> None:
        self._untold = dict.fromkeys(self._entries)


class NodeFeed:
    """See the module. ``take`` is called by services, ``request`` and ``sent`` by the thread that reports."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._ranks: dict[int, RankFeed] = {}
        self._communicators = NodeTable()
        self._mesh: timings_pb2.Mesh | None = None
        self.dropped_total = 0
        self._address = ""
        self._instance = 0
        self._is_mesh_told = False
        self._sampled_s = -math.inf
        self._lock = threading.Lock()

    # --- from the ranks ------------------------------------------------------------------------------------------
    def take(self, request: node_pb2.ReportTimingsRequest, now_s: float) -> bool:
        """A rank's report; False when it names communicators that are not known here: then nothing of it is taken."""
        rank = request.rank
        operations = unpack(request.operations, OPERATION, f"operations of rank {rank}", MOST_ROWS)
        marks = unpack(request.steps, STEP, f"steps of rank {rank}", MOST_ROWS)
        with self._lock:
            feed = self._ranks.setdefault(rank, RankFeed())
            self._learn(feed, request.communicators)
            named = set(np.unique(operations["communicator"]).tolist())
            named |= {item.communicator for item in _items(request.heartbeat)}
            if named - feed.table.keys():
                return False
            feed.heard_s, feed.is_heard = now_s, True
            dropped = feed.coverage.dropped_total if feed.coverage else 0
            self.dropped_total += max(0, request.coverage.dropped_total - dropped)
            feed.heartbeat, feed.coverage = request.heartbeat, request.coverage
            if request.HasField("mesh") and self._mesh is None:
                self._mesh = request.mesh
            steps, samples = feed.reducer.take(operations, marks, feed.table)
            if len(steps):
                feed.kept = np.concatenate([feed.kept, steps])[-KEPT_STEPS:]
                feed.unsent = min(feed.unsent + len(steps), KEPT_STEPS)
            if len(samples):
                feed.samples = np.concatenate([feed.samples, self._renumbered(feed, samples)])[-MOST_SAMPLES:]
        return True

    def _learn(self, feed: RankFeed, entries: Iterable[timings_pb2.CommunicatorEntry]) -> None:
        try:
            for entry in entries:
                self._learn_one(feed, entry)
        finally:
            if gone := self._communicators.recycle():
                for each in self._ranks.values():
                    each.samples = each.samples[~np.isin(each.samples["communicator"], gone)]

    def _learn_one(self, feed: RankFeed, entry: timings_pb2.CommunicatorEntry) -> None:
        members = tuple(entry.members)
        if not members or len(members) > _MOST_MEMBERS or max(members) >= self._world_size:
            raise InvalidRequest(f"communicator {entry.id}: its members are not ranks of {self._world_size}")
        if entry.row >= MOST_COMMUNICATORS:
            raise InvalidRequest(f"communicator {entry.id}: its row {entry.row} is not below {MOST_COMMUNICATORS}")
        own_row = self._communicators.hold(entry)
        before = feed.table.get(entry.row)
        if before is not None:
            self._communicators.release(before.id)
        feed.table[entry.row] = Communicator(entry.id, members, entry.label)
        feed.own_rows[entry.row] = own_row

    @staticmethod
    def _renumbered(feed: RankFeed, samples: Rows) -> Rows:
        own = np.zeros(max(feed.own_rows) + 1, np.uint32)
        own[list(feed.own_rows)] = list(feed.own_rows.values())
        renumbered = samples.copy()
        renumbered["communicator"] = own[samples["communicator"]]
        return renumbered

    def open_black_box(self, rank: int) -> int:
        """A descriptor of memory for the last operations of ``rank``; the caller closes it. OSError without memory."""
        box = BlackBox()
        with self._lock:
            feed = self._ranks.setdefault(rank, RankFeed())
            feed.black_box = box
        return box.descriptor()

    # --- to the analyst ------------------------------------------------------------------------------------------
    def has_news_of(self, ranks: Iterable[int]) -> bool:
        """Every one of ``ranks`` was heard of since the last report."""
        with self._lock:
            return all((feed := self._ranks.get(rank)) and feed.is_heard for rank in ranks)

    def ranks(self) -> list[int]:
        with self._lock:
            return sorted(self._ranks)

    def fill(self, request: coordinator_pb2.ReportRanksRequest, now_s: float) -> None:
        """Add what the analyst has not been told: what each rank does now, its new steps and samples."""
        with self._lock:
            request.communicators.extend(self._communicators.news())
            if self._mesh is not None and not self._is_mesh_told:
                request.mesh.CopyFrom(self._mesh)
            for item in request.ranks:
                feed = self._ranks.get(item.rank)
                if feed is None or feed.heartbeat is None:
                    continue
                # A beat that was under way when its sender went may come after its end was noticed.
                feed.last = (feed.last or _last_of(feed)) if item.is_dead or item.error else None
                item.heartbeat.CopyFrom(self._translated(feed, feed.heartbeat))
                item.coverage.CopyFrom(feed.coverage or timings_pb2.Coverage())
                item.silent_seconds = max(0.0, now_s - feed.heard_s)
                item.steps = pack(feed.kept[len(feed.kept) - feed.unsent :])
                item.samples = pack(feed.samples)
                if feed.unsent and (names := self._news_of_positions(feed)):
                    item.positions.extend(names)
                feed.unsent, feed.is_heard = 0, False
                feed.samples = feed.samples[:0]
            self._is_mesh_told = self._mesh is not None

    @staticmethod
    def _news_of_positions(feed: RankFeed) -> tuple[str, ...]:
        """What its positions are called, when that was not told; their order says nothing new."""
        names = tuple(name[:_MOST_NAME] for name in feed.reducer.position_names)
        before, feed.told_positions = feed.told_positions, frozenset(names)
        return names if feed.told_positions != before else ()

    def is_new_sample(self, at_s: float) -> bool:
        """The sample of the node at ``at_s`` was not told this analyst before."""
        before, self._sampled_s = self._sampled_s, at_s
        return at_s > before

    @staticmethod
    def _translated(feed: RankFeed, heartbeat: timings_pb2.Heartbeat) -> timings_pb2.Heartbeat:
        translated = timings_pb2.Heartbeat()
        translated.CopyFrom(heartbeat)
        known = {(s.communicator, s.seq) for s in heartbeat.signatures} if feed.last else set()
        translated.signatures.extend(s for s in feed.last or () if (s.communicator, s.seq) not in known)
        for item in _items(translated):
            item.communicator = feed.own_rows[item.communicator]
        return translated

    def begin(self, address: str) -> None:
        """The analyst is at ``address`` from now on; another than before is told everything again."""
        with self._lock:
            if address != self._address:
                self._address, self._instance = address, 0
                self._tell_all()

    def answered(self, instance: int) -> None:
        """The analyst took the report; another process than before is told everything again."""
        with self._lock:
            if self._instance not in (0, instance):
                self._tell_all()
            self._instance = instance

    def failed(self) -> None:
        """The report may not have arrived. Samples are lost, steps go again."""
        with self._lock:
            self._address = ""

    def _tell_all(self) -> None:
        self._communicators.forget_told()
        self._is_mesh_told = False
        self._sampled_s = -math.inf
        for feed in self._ranks.values():
            feed.unsent, feed.told_positions = len(feed.kept), frozenset()


def _last_of(feed: RankFeed) -> tuple[timings_pb2.Signature, ...]:
    """What stands in the rank's black box, of communicators that it has told."""
    if feed.black_box is None:
        return ()
    return tuple(
        timings_pb2.Signature(communicator=row, seq=seq, op=op, size_bytes=size_bytes)
        for _, row, op, seq, size_bytes in feed.black_box.read(MOST_SIGNATURES).tolist()
        if row in feed.table
    )


def _items(
    heartbeat: timings_pb2.Heartbeat,
) -> Iterator[timings_pb2.CommunicatorCount | timings_pb2.PendingOperation | timings_pb2.Signature]:
    """Everything of a heartbeat that names a communicator."""
    yield from heartbeat.counts
    yield from heartbeat.pending
    yield from heartbeat.signatures
