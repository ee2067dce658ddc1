"""Versions of the roster on the job's board, and how an entry changes after the ranks have met.

Everything lies under ``ckptd/<run>/<incarnation id>/``: ``roster/<n>`` is version n, ``version`` the newest of them,
``entry/<rank>`` what a rank put anew, ``changes`` how often any rank did. Invariants: rank 0 alone publishes; a version
is whole before ``version`` names it and never changes; versions count up without gaps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from ckptd.model import Roster, RosterEntry
from ckptd_api.convert import roster_entry_from_pb, roster_entry_to_pb, roster_from_pb, roster_to_pb
from ckptd_api.v1 import types_pb2
from ckptd_client.board import Board

NOTICE_S: Final = 2.0

Progress = Callable[[], tuple[int, float | None]]
"""(the newest step that this rank has seen, -1 for none; seconds a step takes, None when not known)."""


class Rosters:
    """The rosters of one incarnation, as its ranks share them."""

    def __init__(self, board: Board, run: str, incarnation_id: int) -> None:
        self._board = board
        self._prefix = f"ckptd/{run}/{incarnation_id:016x}"

    def key(self, name: str) -> str:
        """A key of this incarnation."""
        return f"{self._prefix}/{name}"

    # --- versions ------------------------------------------------------------------------------------------------
    def publish(self, roster: Roster) -> None:
        """Make ``roster`` known to all. May be repeated with the same roster when the store failed."""
        data = roster_to_pb(roster).SerializeToString()
        self._board.set(self.key(f"roster/{roster.version}"), data)
        self._board.set(self.key("version"), b"%d" % roster.version)

    def after(self, known: int) -> list[Roster]:
        """Every version beyond ``known``, in order. One key is looked at when there is none."""
        found = []
        for version in range(known + 1, self._count("version") + 1):
            data = self._board.get(self.key(f"roster/{version}"))
            assert data is not None, "a version is named before it is whole"
            found.append(roster_from_pb(types_pb2.Roster.FromString(data)))
        return found

    # --- entries -------------------------------------------------------------------------------------------------
    def put(self, entry: RosterEntry) -> None:
        """A rank's entry has changed; the next version has it."""
        self._board.set(self.key(f"entry/{entry.rank}"), entry_to_bytes(entry))
        self._board.add(self.key("changes"), 1)

    def changes(self) -> int:
        """How often entries changed."""
        return self._count("changes")

    def entry(self, rank: int) -> RosterEntry | None:
        """What ``rank`` put last, None when it never did after the meeting."""
        data = self._board.get(self.key(f"entry/{rank}"))
        return None if data is None else entry_from_bytes(data)

    def _count(self, name: str) -> int:
        return int(self._board.get(self.key(name)) or b"0")


class Publisher:
    """Rank 0's part: the next version whenever entries changed. ``notice_s`` is how long before it is in force the
    other ranks are told."""

    def __init__(self, rosters: Rosters, notice_s: float) -> None:
        self._rosters = rosters
        self._notice_s = notice_s
        self._changes = 0
        self._draft: Roster | None = None

    def look(self, newest: Roster, progress: Progress) -> list[Roster]:
        """The version after ``newest``, published, if entries changed since the last look. One key is looked at when
        none did."""
        changes = self._rosters.changes()
        if self._draft is None and changes != self._changes:
            entries = tuple(self._rosters.entry(entry.rank) or entry for entry in newest.entries)
            if entries != newest.entries:
                self._draft = next_version(newest, entries, *progress(), self._notice_s)
            self._changes = changes
        if self._draft is None:
            return []
        # A draft is kept until the store has all of it: a version must not get another content at a second try.
        self._rosters.publish(self._draft)
        published, self._draft = self._draft, None
        return [published]


def next_version(
    newest: Roster, entries: tuple[RosterEntry, ...], newest_step: int, step_s: float | None, notice_s: float
) -> Roster:
    """The version after ``newest``: in force from the first step that is ``notice_s`` away. An unknown step time counts
    as a long one: the next step is far enough."""
    steps = math.ceil(notice_s / step_s) if step_s else 0
    return Roster(
        version=newest.version + 1,
        incarnation_id=newest.incarnation_id,
        block_bytes=newest.block_bytes,
        entries=entries,
        protect=newest.protect,
        from_step=newest_step + steps + 1,
    )


def entry_to_bytes(entry: RosterEntry) -> bytes:
    return roster_entry_to_pb(entry).SerializeToString()


def entry_from_bytes(data: bytes) -> RosterEntry:
    return roster_entry_from_pb(types_pb2.RosterEntry.FromString(data))
