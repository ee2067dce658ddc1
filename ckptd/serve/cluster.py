"""What the daemons of a run know together: asked of all of them, by the daemon of rank 0.

A survey asks the daemons of the roster, and of the rosters that those and this node remember, what they hold. A daemon
of the present roster that does not answer leaves the run undecided; one of an older roster is a lost node. The other
daemons of the run ask the coordinator, not everybody, where a shard is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Final

import structlog

from ckptd.arena.arena import Arena
from ckptd.arena.records import IncarnationRecord, RunRecord
from ckptd.erasure.holdings import Holder
from ckptd.errors import CkptdError, RestoreUndecided
from ckptd.format.image import GroupRecord, ImageRecord, decode_group, decode_image
from ckptd.model import Incarnation, Roster, RosterEntry, SnapshotId
from ckptd.peers.channels import Channels
from ckptd.peers.shelf import Shelf
from ckptd.serve.peer_messages import (
    held_here,
    holder_from_inventory,
    holder_from_pb,
    record_from_pb,
)
from ckptd_api.convert import incarnation_to_pb, roster_to_pb, snapshot_to_pb
from ckptd_api.v1 import peers_pb2 as pb

_ASK_S: Final = 5.0
_PATIENCE_S: Final = 10.0
_PAUSE_S: Final = 0.3
_AT_ONCE: Final = 32
_OLD_ROSTERS: Final = 3
_FRESH_S: Final = 5.0
log = structlog.get_logger()


@dataclass(frozen=True)
class Survey:
    """What a run's daemons hold: ``holders``, this node among them; ``records`` of incarnations merged; ``lost`` nodes
    of older rosters that did not answer, by node_id, with the reason."""

    holders: tuple[Holder, ...]
    records: dict[Incarnation, IncarnationRecord] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)


class Cluster:
    """See the module. ``record_of`` gives what this node remembers of a run, ``at_fault`` the nodes that the detector
    has named, as far as it was told here."""

    def __init__(
        self,
        arena: Arena,
        channels: Channels,
        shelf: Shelf,
        record_of: Callable[[str], RunRecord | None],
        at_fault: Callable[[str], Collection[str]],
    ) -> None:
        self._arena = arena
        self._channels = channels
        self._shelf = shelf
        self.address = ""
        self._record_of = record_of
        self._at_fault = at_fault
        self.node_id = ""
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="survey")
        self._surveys: dict[str, tuple[float, Survey]] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    # --- surveys -------------------------------------------------------------------------------------------------
    def survey(self, run: str, entries: Sequence[RosterEntry]) -> Survey:
        """Ask everybody. RestoreUndecided when a daemon of ``entries`` does not answer."""
        return self._keep(run, self._ask_all(run, entries, _PATIENCE_S, must_answer=True))

    def holders(self, run: str, entries: Sequence[RosterEntry]) -> tuple[Holder, ...]:
        """What is held by whoever answers."""
        return self._recent(run, entries).holders

    def _recent(self, run: str, entries: Sequence[RosterEntry]) -> Survey:
        """A survey of the last seconds, or a new one of whoever answers: to find shards, not to tell that there are
        none."""
        with self._lock:
            made_s, known = self._surveys.get(run, (0.0, None))
        if known is not None and time.monotonic() - made_s < _FRESH_S:
            return known
        return self._keep(run, self._ask_all(run, entries, _PAUSE_S, must_answer=False))

    def _keep(self, run: str, found: Survey) -> Survey:
        with self._lock:
            self._surveys[run] = (time.monotonic(), found)
        return found

    def _ask_all(self, run: str, entries: Sequence[RosterEntry], patience_s: float, *, must_answer: bool) -> Survey:
        own = self._record_of(run)
        records = dict(own.incarnations) if own else {}
        holders = [held_here(self._arena, run, self.node_id, self.address)]
        present = {e.address for e in entries if e.node_id and e.node_id != self.node_id and e.address}
        asked: set[str] = {self.address}
        lost: dict[str, str] = {}
        at_fault = set(self._at_fault(run))
        wave = present
        while wave := wave - asked:
            asked |= wave
            answers = self._pool.map(lambda a: self._ask(run, a, patience_s if a in present else 0.0), sorted(wave))
            for address, answer in zip(sorted(wave), answers, strict=True):
                if isinstance(answer, CkptdError):
                    if address in present and must_answer:
                        raise RestoreUndecided(f"the daemon at {address} did not answer: {answer.message}")
                    lost[address] = answer.message
                    continue
                holders.append(holder_from_inventory(answer, address))
                at_fault.update(answer.at_fault)
                for record in map(record_from_pb, answer.incarnations):
                    records[record.incarnation] = _merged(records.get(record.incarnation), record)
            wave = {entry.address for entry in _old_entries(records) if entry.address}
        here = {holder.node_id for holder in holders}
        gone = [entry for entry in _old_entries(records) if entry.node_id not in here]
        reasons = {entry.node_id: lost.get(entry.address, "another daemon answers there") for entry in gone}
        marked = tuple(replace(h, is_at_fault=True) if h.node_id in at_fault else h for h in _distinct(holders))
        return Survey(marked, records, reasons)

    def _ask(self, run: str, address: str, patience_s: float) -> pb.InventoryResponse | CkptdError:
        """One daemon's answer, or why there is none, after asking again for ``patience_s``."""
        asked_s = time.monotonic()
        until = asked_s + patience_s
        is_renewed = False
        while True:
            peer = self._channels.peer(address)
            try:
                answer: pb.InventoryResponse = peer.call(peer.peers.Inventory, pb.InventoryRequest(run=run), _ASK_S)
            except CkptdError as error:
                if not is_renewed and error.is_retryable and time.monotonic() - asked_s < _PAUSE_S:
                    self._channels.renew(address)  # it may only be that it refused a moment ago, and is back
                    is_renewed = True
                    continue
                if not error.is_retryable or time.monotonic() > until:
                    return error
                time.sleep(_PAUSE_S)
            else:
                return answer

    # --- one daemon ----------------------------------------------------------------------------------------------
    def locate(self, run: str, incarnation: Incarnation, roster: Roster, snapshot: SnapshotId) -> list[Holder]:
        """Who holds what of ``snapshot``: from a survey of this daemon's, when it coordinates, else of the
        coordinator's."""
        coordinator = roster.coordinator
        if coordinator.node_id == self.node_id:
            found = self._recent(run, roster.entries).holders
            of_it = [h for h in found if h.ranks.get(snapshot) or any(p.snapshot == snapshot for p in h.parity)]
            return self._own_first(of_it)
        request = pb.LocateRequest(
            run=run, incarnation=incarnation_to_pb(incarnation), snapshot=snapshot_to_pb(snapshot)
        )
        peer = self._channels.peer(coordinator.address)
        answer = peer.call(peer.peers.Locate, request, _PATIENCE_S + 2 * _ASK_S)
        return self._own_first([holder_from_pb(holder, snapshot) for holder in answer.holders])

    def _own_first(self, holders: Sequence[Holder]) -> list[Holder]:
        """This node's own memory, which is behind no link, first, whatever the node is said to suffer from."""
        own = [replace(holder, is_at_fault=False) for holder in holders if holder.node_id == self.node_id]
        return [*own, *(holder for holder in holders if holder.node_id != self.node_id)]

    def describe_image(
        self, address: str, run: str, snapshot: SnapshotId, ranks: Sequence[int], *, is_here: bool = False
    ) -> ImageRecord:
        """The record of the image that ``ranks`` make at the daemon at ``address``."""
        if is_here or address == self.address:
            return self._shelf.image(run, snapshot, ranks)
        peer = self._channels.peer(address)
        request = pb.DescribeImageRequest(run=run, snapshot=snapshot_to_pb(snapshot), ranks=ranks)
        answer = peer.call(peer.peers.DescribeImage, request)
        return decode_image(answer.image, f"image from {address}")

    def describe_group(self, holder: Holder, run: str, snapshot: SnapshotId, key: int) -> GroupRecord:
        """The record of a group of which ``holder`` has parity."""
        if holder.node_id == self.node_id:
            return self._shelf.group(run, snapshot, key)
        peer = self._channels.peer(holder.address)
        request = pb.DescribeGroupRequest(run=run, snapshot=snapshot_to_pb(snapshot), group=key)
        answer = peer.call(peer.peers.DescribeGroup, request)
        return decode_group(answer.group, f"group from {holder.address}")

    def record_decision(self, run: str, incarnation: Incarnation, roster: Roster, parent: SnapshotId | None) -> None:
        """Have every other daemon of the roster record what the incarnation restores; RestoreUndecided when one cannot
        be told."""
        request = _decision(run, incarnation, roster, parent)
        others = sorted({e.address for n, e in roster.nodes.items() if n != self.node_id})
        for address, problem in zip(others, self._pool.map(lambda to: self._tell(to, request), others), strict=True):
            if problem is not None:
                raise RestoreUndecided(f"the daemon at {address} did not record the decision: {problem.message}")

    def tell_left_out(self, run: str, incarnation: Incarnation, roster: Roster, parent: SnapshotId | None) -> None:
        """Have the daemons that had a part in the run, and have none now, know so as far as they answer: else they show
        for ever how their start of it ended. Nobody waits for them."""
        record = self._record_of(run)
        request = _decision(run, incarnation, roster, parent)
        for address in _left_out(record.incarnations, roster) if record else ():
            self._pool.submit(self._tell, address, request)

    def _tell(self, address: str, request: pb.RecordDecisionRequest) -> CkptdError | None:
        peer = self._channels.peer(address)
        try:
            peer.call(peer.peers.RecordDecision, request, _PATIENCE_S)
        except CkptdError as error:
            return error
        return None


def _decision(
    run: str, incarnation: Incarnation, roster: Roster, parent: SnapshotId | None
) -> pb.RecordDecisionRequest:
    return pb.RecordDecisionRequest(
        run=run,
        incarnation=incarnation_to_pb(incarnation),
        roster=roster_to_pb(roster),
        parent=snapshot_to_pb(parent) if parent else None,
    )


def _left_out(records: dict[Incarnation, IncarnationRecord], roster: Roster) -> set[str]:
    """The addresses of nodes that older rosters name and ``roster`` does not."""
    present = {entry.address for entry in roster.nodes.values()}
    return {e.address for e in _old_entries(records) if e.address and e.node_id not in roster.nodes} - present


def _old_entries(records: dict[Incarnation, IncarnationRecord]) -> list[RosterEntry]:
    """The entries, one a node, of the newest rosters that anybody remembers."""
    rosters = [records[i].roster for i in sorted(records, reverse=True)]
    return [entry for roster in [r for r in rosters if r][:_OLD_ROSTERS] for entry in roster.nodes.values()]


def _merged(known: IncarnationRecord | None, other: IncarnationRecord) -> IncarnationRecord:
    """What was decided wins over what was not: a daemon that was away may have missed it."""
    if known is None or (other.is_decided and not known.is_decided):
        return other
    return known


def _distinct(holders: Sequence[Holder]) -> tuple[Holder, ...]:
    """One a node, though it may have been asked at two addresses."""
    return tuple({holder.node_id: holder for holder in reversed(holders)}.values())
