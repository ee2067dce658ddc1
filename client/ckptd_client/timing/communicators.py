"""The communicators of this rank: which process group an operation is of, by what name and with which members.

Layer: inside ``ckptd_client.timing``. Invariants: an id is the same on all members, and differs between a group and one
made again with the same name; looking a group up keeps neither it nor its works alive (a group that is kept cannot be
torn down). A group that torch does not list has no members to compare it with, and no communicator. Rows are never used
again, as what was sent may name them, and there are at most ``MOST`` of them: the daemon takes no more of one rank.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import torch.distributed as dist

if TYPE_CHECKING:
    from ckptd_client.timing.recorder import Operation

SIGNATURES: Final = 64
MOST: Final = 4096
_UNNAMED: Final = ("undefined", "default_pg")


class Communicator:
    """A process group, and how far this rank is in it. ``members``: global ranks in group order. ``recent``: the last
    collectives entered."""

    __slots__ = ("backend", "completed", "enqueued", "id", "label", "members", "pairs", "recent", "row")

    def __init__(self, row: int, id: str, members: Sequence[int], label: str = "", backend: str = "") -> None:  # noqa: A002
        self.row = row
        self.id = id
        self.members = tuple(members)
        self.label = label
        self.backend = backend
        self.enqueued = 0
        self.completed = 0
        # Point-to-point counts by themselves: by (peer, operation), so that both ends count alike.
        self.pairs: dict[tuple[int, int], int] = {}
        self.recent: deque[Operation] = deque(maxlen=SIGNATURES)

    def global_rank(self, rank_in_group: int) -> int:
        return self.members[rank_in_group] if 0 <= rank_in_group < len(self.members) else -1


class Communicators:
    """The table. Rows count from 0 in order of first use. Safe to use from any thread."""

    def __init__(self) -> None:
        # By address, because a look-up is on the path of every operation; a group that dies takes its key along.
        self.by_address: dict[int, Communicator] = {}
        self.all: list[Communicator] = []
        self.live: dict[int, Communicator] = {}  # by row: those whose group is not gone
        self.refused = 0  # operations of groups that came after ``MOST`` others
        self._made: dict[str, int] = {}
        self.unlisted: set[str] = set()  # names of groups that torch does not list
        self._references: dict[int, weakref.ref[Any]] = {}
        self._lock = threading.RLock()

    def find(self, group: dist.ProcessGroup) -> Communicator | None:
        """The communicator of ``group``; None when torch does not list it, or ``MOST`` came before it."""
        return self.by_address.get(id(group)) or self._take(group)

    def _take(self, group: dist.ProcessGroup) -> Communicator | None:
        with self._lock:
            address = id(group)
            if group not in dist.distributed_c10d._world.pg_group_ranks:
                self.unlisted.add(_name(group))
                return None
            if len(self.all) >= MOST:
                self.refused += 1
                return None
            found = self._listed(group)
            self._references[address] = weakref.ref(group, lambda _: self._retire(address, found))
            self.by_address[address] = found
            return found

    def _retire(self, address: int, gone: Communicator) -> None:
        """Runs wherever the group is let go: takes no lock."""
        self.by_address.pop(address, None)
        self._references.pop(address, None)
        self.live.pop(gone.row, None)
        gone.recent.clear()

    def _listed(self, group: dist.ProcessGroup) -> Communicator:
        world = dist.distributed_c10d._world
        by_rank = world.pg_group_ranks[group]
        members = sorted(by_rank, key=by_rank.__getitem__)
        name = f"{group.group_name}-{_digest(members)}"
        count = self._made[name] = self._made.get(name, 0) + 1
        unique = name if count == 1 else f"{name}-{count}"
        return self._add(unique, members, _label(group), world.pg_backend_config.get(group, ""))

    def _add(self, id: str, members: Sequence[int], label: str, backend: str) -> Communicator:  # noqa: A002
        made = Communicator(len(self.all), id, members, label, str(backend))
        self.all.append(made)
        self.live[made.row] = made
        return made


def _digest(members: Sequence[int]) -> str:
    return hashlib.blake2b(",".join(map(str, members)).encode(), digest_size=6).hexdigest()


def _name(group: dist.ProcessGroup) -> str:
    try:
        return str(group.group_name)
    except RuntimeError:  # it was never given one
        return "unnamed"


def _label(group: dist.ProcessGroup) -> str:
    """A mesh dimension's name, or what the group was described as."""
    description = str(group.group_desc or "")
    return "" if description in _UNNAMED else description.removeprefix("mesh_")
