"""A job of many nodes in one process: a ``Link`` a rank with its own threads, one store, daemons that are objects."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from processes import wait_until

from ckptd.errors import CkptdError, DaemonUnreachable
from ckptd.model import Incarnation, Roster
from ckptd_api.convert import roster_from_pb
from ckptd_api.v1 import node_pb2, types_pb2
from ckptd_client.board import Board, LocalBoard
from ckptd_client.link import Link
from ckptd_client.membership import Meeting
from ckptd_client.pending import Pending

RUN = "run"
SOON_S = 10.0


class FakeDaemon:
    """A daemon as its ranks see it. ``answers`` are by method; an exception is raised."""

    def __init__(self, node_id: str, is_up: bool = True) -> None:
        self.node_id = node_id
        self.address = f"{node_id}:1"
        self.is_up = is_up
        self.instance = 1
        self.ordinal = 0
        self.marks = types_pb2.Watermarks()
        self.joins: list[node_pb2.JoinRequest] = []
        self.calls: list[Any] = []
        self.answers: dict[str, Any] = {}
        self.watches = 0
        self._changed = threading.Condition()

    # --- what the test does ------------------------------------------------------------------------------------------
    def become(self, node_id: str = "", address: str = "") -> None:
        """Another process, on a node or at an address of its own."""
        with self._changed:
            self.node_id = node_id or self.node_id
            self.address = address or self.address
            self.instance += 1
            self.is_up = True
            self._changed.notify_all()

    def fall(self) -> None:
        with self._changed:
            self.is_up = False
            self._changed.notify_all()

    def say(self, **marks: Any) -> None:
        """New watermarks."""
        with self._changed:
            self.marks = types_pb2.Watermarks(**marks)
            self._changed.notify_all()

    @property
    def known(self) -> Roster | None:
        """The roster that a rank told last."""
        return roster_from_pb(self.joins[-1].roster) if self.joins else None

    # --- what a link calls -------------------------------------------------------------------------------------------
    def open_session(self) -> None:
        self._check()

    def call(self, method: str, request: Any, timeout_s: float) -> Any:
        self._check()
        self.calls.append((method, request))
        answer = self.answers.get(method)
        if isinstance(answer, CkptdError):
            raise answer
        if method == "Join":
            self.joins.append(request)
        defaults = {
            "Describe": node_pb2.DescribeResponse(node_id=self.node_id, address=self.address, instance=self.instance),
            "Survey": node_pb2.SurveyResponse(highest_ordinal=self.ordinal),
            "Join": node_pb2.JoinResponse(instance=self.instance, watermarks=self.marks),
            "Begin": node_pb2.BeginResponse(slot="slot"),
        }
        return answer or defaults.get(method)

    def watch(self, request: Any, silence_s: float) -> Iterator[node_pb2.WatchResponse]:
        self.watches += 1
        instance, said = self.instance, None
        while True:
            with self._changed:
                self._changed.wait_for(lambda said=said: self.marks != said or self.instance != instance, 0.05)
                self._check()
                if self.instance != instance:
                    raise DaemonUnreachable("the daemon restarted")
                said = self.marks
            yield node_pb2.WatchResponse(instance=instance, watermarks=said)

    def black_box(self, run: str, incarnation: Incarnation, rank: int) -> None:
        self._check()

    def close(self) -> None: ...

    def _check(self) -> None:
        if not self.is_up:
            raise DaemonUnreachable(f"no daemon answers at {self.address}")


class Job:
    """One link a rank, each beside its own daemon. ``pace`` is what the training loop of all ranks is at."""

    def __init__(self, daemons: list[FakeDaemon], board: Board | None = None, protect: str = "auto") -> None:
        self.board = board or LocalBoard()
        self.daemons = daemons
        self.pace: tuple[int, float | None] = (-1, None)
        self.restarts: list[int] = []
        self.links = [self._link(rank, protect) for rank in range(len(daemons))]

    def _link(self, rank: int, protect: str) -> Link:
        every = types_pb2.Interval(steps=1)
        meeting = Meeting(self.board, RUN, rank, len(self.daemons))
        on_new_instance = lambda: self.restarts.append(rank)  # noqa: E731
        return Link(
            self.daemons[rank],  # type: ignore[arg-type]
            meeting,
            RUN,
            every,
            every,
            protect,
            1 << 20,
            Pending(),
            lambda: self.pace,
            on_new_instance,
        )

    def start(self) -> None:
        for link in self.links:
            link.start()

    def close(self) -> None:
        for link in self.links:
            link.close(5.0)

    def wait_joined(self, *ranks: int) -> None:
        for rank in ranks or range(len(self.links)):
            assert self.links[rank].wait_joined(SOON_S) is None, f"rank {rank}"

    def wait_version(self, version: int) -> Roster:
        """The version, once every rank knows it and every daemon that is up was told."""

        def is_everywhere() -> bool:
            known = [link.membership for link in self.links]
            told = [daemon.known for daemon in self.daemons if daemon.is_up]
            return all(m and m.roster.version >= version for m in known) and all(
                r and r.version >= version for r in told
            )

        wait_until(is_everywhere, f"version {version} everywhere", SOON_S)
        found = {membership.rosters[version - 1] for link in self.links if (membership := link.membership)}
        assert len(found) == 1
        return found.pop()
