"""What this process collects: one tap, one recorder and one row of step marks, however many ask for them.

Layer: inside ``ckptd_client.timing``, above the taps and below who reports. Invariants: the tap is installed while
somebody uses the collection, once; of several users, the first that can reports, so that nothing is counted twice; a
tap that does not work says so in the coverage and touches nothing.
"""

from __future__ import annotations

import logging
import sys
import threading
from typing import Any, Final

import torch
import torch.distributed as dist

from ckptd_api.v1 import timings_pb2
from ckptd_client.timing import group_hooks
from ckptd_client.timing.communicators import MOST, Communicator
from ckptd_client.timing.dispatcher import Dispatcher
from ckptd_client.timing.endings import Endings
from ckptd_client.timing.group_hooks import GroupHooks
from ckptd_client.timing.mesh import find_mesh
from ckptd_client.timing.operations import missing
from ckptd_client.timing.recorder import Recorder
from ckptd_client.timing.steps import Steps

# They communicate by themselves, past c10d.
_OTHER_LIBRARIES: Final = ("deep_ep", "horovod", "mpi4py", "nvshmem", "torchcomms")
log = logging.getLogger("ckptd_client")


class Collection:
    """See the module. ``tap`` is None when it does not work: ``problem`` says why."""

    def __init__(self) -> None:
        self.recorder = Recorder()
        self.endings = Endings()
        self.steps = Steps(self.recorder, self.endings.device)
        self.tap: Dispatcher | GroupHooks | None = None
        self.problem = ""
        self.reporters: list[object] = []
        self.meshes: list[Any] = []  # DeviceMesh objects that users of the collection know of
        self._mesh: timings_pb2.Mesh | None = None

    def install(self) -> None:
        tap: Dispatcher | GroupHooks | None = None
        try:
            tap = GroupHooks(self.endings) if group_hooks.has_hooks() else Dispatcher(self.endings)
            self.endings.waits.install()
            tap.install()
            if sees_an_operation(tap):
                self.tap = tap
                tap.recorder = self.recorder
                return
            self.problem = "an operation of its own did not pass the tap"
        except Exception as error:  # noqa: BLE001  a torch that is another than what this was written for
            self.problem = f"{type(error).__name__}: {error}"
        if tap is not None:
            tap.uninstall()
        self.endings.waits.uninstall()
        log.warning("collectives are not timed with torch %s: %s", torch.__version__, self.problem)

    def uninstall(self) -> None:
        if self.tap is not None:
            self.tap.uninstall()
            self.endings.waits.uninstall()
            self.tap = None

    def refresh(self) -> None:
        """What has to be done now and then, not on a training thread."""
        recorder = self.recorder
        recorder.guard(self.endings.poll)
        if self.tap is not None:
            recorder.guard(self.tap.see_groups)

    def is_reporter(self, user: object) -> bool:
        return bool(self.reporters) and self.reporters[0] is user

    def mesh(self) -> timings_pb2.Mesh | None:
        """Looked for until there is one."""
        if self._mesh is None:
            self._mesh = find_mesh(self.meshes)
        return self._mesh

    def coverage(self) -> timings_pb2.Coverage:
        return timings_pb2.Coverage(
            source=self.tap.source if self.tap else "none",
            problem="; ".join(self._problems()),
            operations_total=self.recorder.entered,
            dropped_total=self.recorder.ring.dropped + self.recorder.forgotten,
        )

    def _problems(self) -> list[str]:
        if self.tap is None:
            return [self.problem]
        recorder = self.recorder
        problems = sorted(recorder.gaps)
        if isinstance(self.tap, Dispatcher) and (names := missing()):
            problems.append(f"unknown to this version: {', '.join(names)}")
        if unlisted := sorted(recorder.communicators.unlisted):
            problems.append(f"groups that torch does not list are not seen: {', '.join(unlisted[:4])}")
        if recorder.communicators.refused:
            problems.append(f"more than {MOST} groups were made: operations of the later ones are not seen")
        if recorder.failures:
            problems.append(f"{recorder.failures} operations were not recorded: {recorder.last_failure}")
        problems += [f"{name} is loaded: what it sends is not seen" for name in _OTHER_LIBRARIES if name in sys.modules]
        return problems


def sees_an_operation(tap: Dispatcher | GroupHooks) -> bool:
    """Whether an operation of a group of this process alone, which communicates with nobody, passes ``tap``."""
    from torch._C import _distributed_c10d

    c10d: Any = _distributed_c10d  # without stubs for what is needed here
    probe = Recorder(rows=1)
    group = dist.ProcessGroup(c10d.HashStore(), 0, 1)
    backend = c10d.FakeProcessGroup._create_internal(0, 1, c10d.FakeProcessGroup.Options())
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.CUSTOM, backend)
    if isinstance(tap, GroupHooks):
        tap.hook(group)
    probe.communicators.by_address[id(group)] = Communicator(0, "probe", (0,))
    tap.recorder = probe
    try:
        group.allreduce([torch.zeros(1)]).wait()
    finally:
        tap.recorder = None
    return probe.entered == probe.ended == 1 and not probe.failures


_lock = threading.Lock()
_users: list[object] = []
_collection: Collection | None = None


def enter(user: object) -> Collection:
    """The collection of this process, installed; ``leave`` is its pair."""
    global _collection
    with _lock:
        if _collection is None:
            _collection = Collection()
            _collection.install()
        _users.append(user)
        return _collection


def leave(user: object) -> None:
    """The last to leave takes the tap away."""
    global _collection
    with _lock:
        if user in _users:
            _users.remove(user)
        if not _users and _collection is not None:
            _collection.uninstall()
            _collection = None
