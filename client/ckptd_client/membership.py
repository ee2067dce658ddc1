"""Roster and incarnation of a job, agreed on over its own store.

(1) Each rank puts its entry with a fresh nonce under ``hello/<rank>``. (2) Rank 0 publishes the roster under
``roster``; a rank takes only one that contains its own nonce, and acknowledges it; rank 0 re-reads the entries and
republishes until all have, so keys of an earlier start do no harm. (3) Rank 0 asks what its daemon and tiers know of
the run, with or without a restore, and publishes the ordinal.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import Final

from ckptd.errors import CkptdError, RendezvousTimeout
from ckptd.format.blocks import block_bytes_for
from ckptd.model import Incarnation, Roster, RosterEntry
from ckptd_api.convert import incarnation_from_pb, incarnation_to_pb, roster_from_pb, roster_to_pb
from ckptd_api.v1 import node_pb2, types_pb2
from ckptd_client.board import Board, wait_for
from ckptd_client.daemon import Daemon

MEET_S: Final = 300.0
_POLL_S: Final = 0.01
_CALL_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Membership:
    """What every rank of the incarnation agrees on."""

    roster: Roster
    incarnation: Incarnation


class Meeting:
    """One rank's part in the agreement. ``meet`` may be called again: the next roster has the next version."""

    def __init__(self, board: Board, run: str, rank: int, world_size: int) -> None:
        self._board = board
        self._prefix = f"ckptd/{run}"
        self._run = run
        self.rank = rank
        self.world_size = world_size
        self._version = 0

    def meet(
        self, daemon: Daemon, about: node_pb2.DescribeResponse, estimated_bytes: int, known: Membership | None
    ) -> Membership:
        """Agree on a roster, and on the incarnation unless ``known``; RendezvousTimeout, or the daemon's errors."""
        entry = RosterEntry(
            rank=self.rank,
            node_id=about.node_id,
            address=about.address,
            nonce=secrets.randbits(63) | 1,
            domains=tuple(sorted(about.domains.items())),
            protect_max=about.protect_max,
            slots=about.slots,
            estimated_bytes=estimated_bytes,
        )
        self._version += 1
        self._board.set(f"{self._prefix}/hello/{self.rank}", _entry_to_bytes(entry))
        roster = self._lead(entry, known) if self.rank == 0 else self._follow(entry)
        incarnation = known.incarnation if known else self._incarnation(daemon, roster)
        return Membership(roster, incarnation)

    def key(self, membership: Membership, name: str) -> str:
        """A key of this incarnation."""
        return f"{self._prefix}/{membership.roster.incarnation_id:016x}/{name}"

    def _lead(self, own: RosterEntry, known: Membership | None) -> Roster:
        incarnation_id = known.incarnation.id if known else secrets.randbits(63) | 1
        block_bytes = known.roster.block_bytes if known else 0
        until = time.monotonic() + MEET_S
        published: Roster | None = None
        while True:
            entries = self._entries(own, until)
            block = block_bytes or block_bytes_for(min(entry.estimated_bytes for entry in entries))
            roster = Roster(self._version, incarnation_id, block, entries)
            if roster != published:
                self._board.set(f"{self._prefix}/roster", roster_to_pb(roster).SerializeToString())
                published = roster
            missing = [entry.rank for entry in entries[1:] if not self._has_acknowledged(roster, entry)]
            if not missing:
                return roster
            if time.monotonic() > until:
                raise RendezvousTimeout(f"roster: no acknowledgement from rank {missing[:16]} within {MEET_S:g} s")
            time.sleep(_POLL_S)

    def _entries(self, own: RosterEntry, until: float) -> tuple[RosterEntry, ...]:
        others = [(rank, f"{self._prefix}/hello/{rank}") for rank in range(1, self.world_size)]
        left_s = max(0.0, until - time.monotonic())
        found = wait_for(self._board, others, left_s, "roster")
        return (own, *(_entry_from_bytes(found[rank]) for rank, _ in others))

    def _has_acknowledged(self, roster: Roster, entry: RosterEntry) -> bool:
        return self._board.get(self._acknowledgement(roster.incarnation_id, entry)) is not None

    def _acknowledgement(self, incarnation_id: int, entry: RosterEntry) -> str:
        return f"{self._prefix}/{incarnation_id:016x}/ack/{entry.rank}/{entry.nonce:016x}"

    def _follow(self, own: RosterEntry) -> Roster:
        until = time.monotonic() + MEET_S
        while time.monotonic() < until:
            data = self._board.get(f"{self._prefix}/roster")
            if data is not None:
                roster = roster_from_pb(types_pb2.Roster.FromString(data))
                if roster.world_size == self.world_size and roster.entries[self.rank] == own:
                    self._board.set(self._acknowledgement(roster.incarnation_id, own), b"1")
                    self._version = roster.version
                    return roster
            time.sleep(_POLL_S)
        raise RendezvousTimeout(f"roster: no word from rank 0 within {MEET_S:g} s")

    def _incarnation(self, daemon: Daemon, roster: Roster) -> Incarnation:
        key = f"{self._prefix}/{roster.incarnation_id:016x}/ordinal"
        if self.rank != 0:
            data = wait_for(self._board, [(0, key)], MEET_S, "ordinal of the incarnation")[0]
            return incarnation_from_pb(types_pb2.Incarnation.FromString(data))
        survey = self._survey(daemon)
        incarnation = Incarnation(survey.highest_ordinal + 1, roster.incarnation_id)
        self._board.set(key, incarnation_to_pb(incarnation).SerializeToString())
        return incarnation

    def _survey(self, daemon: Daemon) -> node_pb2.SurveyResponse:
        """What is known of the run; asked again for a while, since the other ranks wait for the ordinal."""
        until = time.monotonic() + MEET_S
        while True:
            try:
                found: node_pb2.SurveyResponse = daemon.call("Survey", node_pb2.SurveyRequest(run=self._run), _CALL_S)
                return found
            except CkptdError as error:
                if not error.is_retryable or self.world_size == 1 or time.monotonic() > until:
                    raise
                time.sleep(1.0)


def _entry_to_bytes(entry: RosterEntry) -> bytes:
    return roster_to_pb(Roster(0, 0, 0, (entry,))).SerializeToString()


def _entry_from_bytes(data: bytes) -> RosterEntry:
    return roster_from_pb(types_pb2.Roster.FromString(data)).entries[0]
