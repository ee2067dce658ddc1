"""Roster and incarnation of a job, agreed on over its own store.

(1) Each rank puts its entry with a fresh nonce under ``hello/<rank>``; a rank that reaches no daemon puts one without
node. (2) Rank 0 publishes the roster under ``roster``; a rank acknowledges the one that contains its own entry; rank 0
re-reads the entries and republishes until all have, so keys of an earlier start do no harm. What all have acknowledged
is version 1, and only that is used: an earlier copy may hold what other ranks put in an earlier start. (3) Rank 0 asks
what the daemons and tiers know of the run, with or without a restore, and publishes the ordinal. Later versions are
the business of ``rosters``.
"""

from __future__ import annotations

import secrets
import threading
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

from ckptd.errors import RendezvousTimeout
from ckptd.format.blocks import block_bytes_for
from ckptd.model import Incarnation, Roster, RosterEntry
from ckptd_api.convert import (
    incarnation_from_pb,
    incarnation_to_pb,
    roster_entry_to_pb,
    roster_from_pb,
    roster_to_pb,
)
from ckptd_api.v1 import node_pb2, types_pb2
from ckptd_client.board import Board, Pauses, ranks_text, wait_for
from ckptd_client.daemon import Daemon
from ckptd_client.rosters import Rosters, entry_from_bytes, entry_to_bytes

MEET_S: Final = 300.0
ORDINAL_S: Final = 5.0
_MAX_POLL_S: Final = 0.1
_SURVEY_S: Final = 30.0


@dataclass(frozen=True)
class Membership:
    """What every rank of the incarnation agrees on: all versions of its roster, in order, and its ordinal, None until
    rank 0's daemon has told it."""

    rosters: tuple[Roster, ...]
    ordinal: int | None = None

    @property
    def roster(self) -> Roster:
        """The newest version, which may not be in force yet."""
        return self.rosters[-1]

    @property
    def incarnation(self) -> Incarnation:
        assert self.ordinal is not None
        return Incarnation(self.ordinal, self.roster.incarnation_id)

    def roster_at(self, step: int) -> Roster:
        """The version in force at ``step``: the newest that is for it."""
        return next(roster for roster in reversed(self.rosters) if roster.from_step <= step)

    def extended(self, roster: Roster) -> Membership:
        """With the next version; unchanged when it is known."""
        if roster.version <= self.roster.version:
            return self
        return replace(self, rosters=(*self.rosters, roster))

    def obstacle(self, step: int, rank: int, node_id: str) -> str:
        """Why ``rank``, which is on ``node_id``, cannot take ``step``; "" when it can."""
        roster = self.roster_at(step)
        if absent := self._without_daemon[roster.version]:
            return f"rank {ranks_text(absent)} has no daemon"
        if roster.entries[rank].node_id != node_id:
            return f"version {roster.version} of the roster has rank {rank} on another node"
        return ""

    @cached_property
    def _without_daemon(self) -> dict[int, list[int]]:
        """By version. Every rank skips a step that one cannot take: nothing is copied for it."""
        return {roster.version: [e.rank for e in roster.entries if not e.node_id] for roster in self.rosters}


def entry_of(rank: int, about: node_pb2.DescribeResponse, estimated_bytes: int) -> RosterEntry:
    """A fresh entry from what the rank's daemon says of itself; of an empty answer, that of a rank without daemon."""
    return RosterEntry(
        rank=rank,
        node_id=about.node_id,
        address=about.address,
        nonce=secrets.randbits(63) | 1,
        domains=tuple(sorted(about.domains.items())),
        protect_max=about.protect_max,
        slots=about.slots,
        estimated_bytes=estimated_bytes,
    )


class Meeting:
    """One rank's part in the agreement. ``stop`` ends every wait: a rank that was closed must not lead the next start.

    Each method may be called again after it failed: incarnation and acknowledgements of the first try stay good.
    """

    def __init__(self, board: Board, run: str, rank: int, world_size: int) -> None:
        self.board = board
        self.run = run
        self.rank = rank
        self.world_size = world_size
        self.stop = threading.Event()
        self._prefix = f"ckptd/{run}"
        self._incarnation_id = secrets.randbits(63) | 1
        # One look a second and 1,000 ranks is what one store can serve.
        self._longest_s = max(_MAX_POLL_S, world_size / 1000)

    def rosters(self, incarnation_id: int) -> Rosters:
        return Rosters(self.board, self.run, incarnation_id)

    # --- the first roster ------------------------------------------------------------------------------------------
    def meet(self, entry: RosterEntry, protect: str) -> Roster:
        """Version 1, once all ranks have met; RendezvousTimeout. ``entry`` must be that of the first try. ``protect``
        is the wished geometry; rank 0's counts."""
        self.board.set(f"{self._prefix}/hello/{self.rank}", entry_to_bytes(entry))
        return self._lead(entry, protect) if self.rank == 0 else self._follow(entry)

    def _lead(self, own: RosterEntry, protect: str) -> Roster:
        pauses = Pauses(MEET_S, self._longest_s, self.stop)
        hellos = [(rank, f"{self._prefix}/hello/{rank}") for rank in range(1, self.world_size)]
        found = wait_for(self.board, hellos, MEET_S, "roster", self.stop)
        entries = [own, *(entry_from_bytes(found[rank]) for rank, _ in hellos)]
        waiting = {rank for rank, _ in hellos}
        published: Roster | None = None
        while True:
            block_bytes = block_bytes_for(min(entry.estimated_bytes for entry in entries))
            roster = Roster(1, self._incarnation_id, block_bytes, tuple(entries), protect)
            if roster != published:
                self.board.set(f"{self._prefix}/roster", roster_to_pb(roster).SerializeToString())
                published = roster
            waiting -= {rank for rank in waiting if self.board.get(self._acknowledgement(roster, entries[rank]))}
            if not waiting:
                self.rosters(roster.incarnation_id).publish(roster)
                return roster
            if not pauses.sleep():
                raise RendezvousTimeout(f"roster: no acknowledgement from rank {ranks_text(waiting)} in time")
            for rank in waiting:
                entries[rank] = entry_from_bytes(self.board.get(f"{self._prefix}/hello/{rank}") or found[rank])

    def _follow(self, own: RosterEntry) -> Roster:
        pauses = Pauses(MEET_S, self._longest_s, self.stop)
        invited: Rosters | None = None
        while True:
            invited = invited or self._invitation(own)
            if invited and (versions := invited.after(0)):
                return versions[0]
            if not pauses.sleep():
                what = "rank 0 still waits for other ranks" if invited else "no word from rank 0 in time"
                raise RendezvousTimeout(f"roster: {what}")

    def _invitation(self, own: RosterEntry) -> Rosters | None:
        """The incarnation whose roster has this rank's entry; acknowledged."""
        data = self.board.get(f"{self._prefix}/roster")
        roster = roster_from_pb(types_pb2.Roster.FromString(data)) if data is not None else None
        if roster is None or roster.world_size != self.world_size or roster.entries[self.rank] != own:
            return None
        self.board.set(self._acknowledgement(roster, own), b"1")
        return self.rosters(roster.incarnation_id)

    def _acknowledgement(self, roster: Roster, entry: RosterEntry) -> str:
        return self.rosters(roster.incarnation_id).key(f"ack/{entry.rank}/{entry.nonce:016x}")

    # --- the ordinal -----------------------------------------------------------------------------------------------
    def ordinal(self, daemon: Daemon, roster: Roster) -> int:
        """The ordinal of the incarnation: rank 0 asks its daemon, which asks those of ``roster``; the others wait a
        while for its word. RendezvousTimeout, or the daemon's errors."""
        key = self.rosters(roster.incarnation_id).key("ordinal")
        if self.rank != 0:
            data = wait_for(self.board, [(0, key)], ORDINAL_S, "ordinal of the incarnation", self.stop)[0]
        elif (known := self.board.get(key)) is not None:
            data = known  # put by a try that failed after it: others may have joined with it
        else:
            entries = [roster_entry_to_pb(entry) for entry in roster.entries]
            survey = daemon.call("Survey", node_pb2.SurveyRequest(run=self.run, entries=entries), _SURVEY_S)
            incarnation = Incarnation(survey.highest_ordinal + 1, roster.incarnation_id)
            data = incarnation_to_pb(incarnation).SerializeToString()
            self.board.set(key, data)
        return incarnation_from_pb(types_pb2.Incarnation.FromString(data)).ordinal
