"""Timing as user code sees it: step marks and masks, and ``watch()`` for programs without a Checkpointer.

Layer: the top of ``ckptd_client.timing``. Invariants: nothing here changes what the program computes or blocks it; a
process has one tap and reports over one connection, and a Checkpointer's goes before a watch's: two connections of one
run would be two starts of the job.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Final

import torch

from ckptd.errors import InvalidRequest
from ckptd.format.timings import Mask
from ckptd_api.v1 import types_pb2
from ckptd_client.arguments import resolve_run
from ckptd_client.board import find_board
from ckptd_client.daemon import Daemon, resolve_address
from ckptd_client.link import Link
from ckptd_client.membership import Meeting
from ckptd_client.pending import Pending
from ckptd_client.timing import collection as process
from ckptd_client.timing.collection import Collection
from ckptd_client.timing.heartbeat import FLUSH_S, Connection, Heartbeat
from ckptd_client.timing.mesh import meshes_of

CLOSE_S: Final = 5.0
log = logging.getLogger("ckptd_client")
_watches: list[Watch] = []
_untimed: list[str] = []  # runs that have a Checkpointer whose timing is off


class Timing:
    """A Checkpointer's or a watch's part in what its process collects. Without ``is_on`` every call does nothing;
    ``untimed`` names the run of its Checkpointer then."""

    def __init__(self, is_on: bool = True, untimed: str = "") -> None:
        self._collection: Collection | None = process.enter(self) if is_on else None
        self._heartbeat: Heartbeat | None = None
        self._untimed = untimed
        if untimed:
            _untimed.append(untimed)

    @property
    def is_reported(self) -> bool:
        """Whether somebody in this process reports."""
        return self._collection is not None and bool(self._collection.reporters)

    @property
    def last_step(self) -> int:
        return self._collection.steps.last if self._collection is not None else -1

    def report(self, link: Connection, tensors: Iterable[torch.Tensor] = ()) -> None:
        """Report over ``link`` from now on, unless another in this process does; with the mesh of ``tensors``."""
        if (collection := self._collection) is not None:
            collection.recorder.guard(lambda: collection.meshes.extend(meshes_of(tensors)))
            self._heartbeat = Heartbeat(collection, link)
            self._heartbeat.start()

    def mark(self, step: int) -> None:
        """Step ``step`` is done; naming it again changes nothing."""
        if (collection := self._collection) is not None:
            collection.recorder.guard(lambda: collection.steps.mark(step))
            if collection.tap is not None:
                collection.recorder.guard(collection.tap.see_groups)

    def masked(self, kind: str) -> AbstractContextManager[None]:
        """Steps that run in the block, even in part, say nothing about hardware. ``kind``: "evaluation", "checkpoint"
        or "compile"."""
        return self._collection.steps.masked(kind) if self._collection is not None else nullcontext()

    def during(self, reason: Mask) -> AbstractContextManager[None]:
        """``reason`` is in force while the block runs, though no step need be masked for it."""
        return self._collection.steps.during(reason) if self._collection is not None else nullcontext()

    def flag(self, reason: Mask) -> None:
        """The step under way says nothing about hardware."""
        if self._collection is not None:
            self._collection.steps.flag(reason)

    def stop_reporting(self, flush_s: float = FLUSH_S) -> None:
        """Send what is left within ``flush_s`` (0: do not), and leave the rest to another."""
        if self._heartbeat is not None:
            self._heartbeat.close(flush_s)
            self._heartbeat = None

    def close(self, flush_s: float = FLUSH_S) -> None:
        """Stop reporting, and take the tap away when nobody else uses it."""
        self.stop_reporting(flush_s)
        if self._untimed in _untimed:
            _untimed.remove(self._untimed)
        if self._collection is not None:
            self._collection = None
            process.leave(self)


class Watch:
    """Timing alone: nothing is saved. Made by ``watch()``."""

    def __init__(self, run: str, daemon: str | None) -> None:
        self._timing = Timing()
        self._link: Link | None = None
        if self._timing.is_reported:
            return  # by a Checkpointer, or another watch
        board, rank, world_size = find_board()
        self._link = Link(
            Daemon(resolve_address(daemon)),
            Meeting(board, run, rank, world_size),
            run,
            types_pb2.Interval(steps=0),  # never
            types_pb2.Interval(steps=0),
            "off",
            0,
            Pending(),
            lambda: (self._timing.last_step, None),
            lambda: None,
        )
        self._link.start()
        self._timing.report(self._link)
        _watches.append(self)

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._link is not None:
            self._link.note_failure(error)
        self.close()

    def step(self, step: int) -> None:
        """Say that training step ``step`` is done."""
        self._timing.mark(step)

    def masked(self, kind: str) -> AbstractContextManager[None]:
        """Steps that run in the block, even in part, say nothing about hardware. ``kind``: "evaluation", "checkpoint"
        or "compile"."""
        return self._timing.masked(kind)

    def close(self) -> None:
        """Send what is left, within two seconds, and leave the run."""
        self._timing.close()
        self._leave()

    def give_way(self) -> None:
        """A Checkpointer reports from now on; steps and masks of this watch still count."""
        self._timing.stop_reporting()
        self._leave()

    def _leave(self) -> None:
        if self in _watches:
            _watches.remove(self)
        if self._link is not None:
            self._link.close(CLOSE_S)
            self._link = None


def watch(run: str | None = None, daemon: str | None = None) -> Watch:
    """Time this rank's collectives and report them to the node's daemon, which tells a slow or stuck rank from its
    victims. Every rank of the job calls it, after ``init_process_group``. A program that has a Checkpointer needs it
    not.

    Name each step with ``Watch.step``: the first CKPTD_WARM_UP_STEPS (20; 0: none) after the start say nothing about
    hardware, and of a rank that is absent during them it is not certain that it hangs. At the end ``close()`` it, leave
    its ``with`` block or just end the program: all say goodbye; a program that is killed, or a process of
    ``multiprocessing`` that does neither of the first two, counts as dead.

    Args:
        run: the training job across its restarts; default CKPTD_RUN, then TORCHELASTIC_RUN_ID when that names a job.
        daemon: ``unix:///path`` or ``host:port``; default CKPTD_DAEMON, then the default sockets.

    Raises:
        InvalidRequest: no run name, or the run has a Checkpointer in this process whose timing is off.
    """
    name = resolve_run(run)
    if name in _untimed:
        raise InvalidRequest(f"run {name} has a Checkpointer in this process", "leave its timing on, and drop watch()")
    return Watch(name, daemon)


def checkpointer_timing(run: str, is_on: bool) -> Timing:
    """The timing of a Checkpointer of ``run`` that is about to connect: watches give way to it."""
    for other in _watches[:]:  # each takes itself off the list
        other.give_way()
    return Timing() if is_on else Timing(is_on=False, untimed=run)
