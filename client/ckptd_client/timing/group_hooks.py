"""The tap of torch 2.14 and later: hooks that a process group calls before and after it issues an operation.

Layer: inside ``ckptd_client.timing``, beside ``dispatcher``. Written from torch's headers; no torch that has these
hooks has run it. Hooks belong to one group, so groups are looked for at every step and heartbeat; the first operations
of a new group may be missed, which its coverage says nothing of. The other end of a point-to-point operation is taken
from ``root``; where that is not given it is unknown.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from time import monotonic_ns
from typing import Any, Final

import torch.distributed as dist

from ckptd.format.timings import Op
from ckptd_client.timing.endings import Endings
from ckptd_client.timing.recorder import Operation, Recorder
from ckptd_client.timing.tensors import address_of, first_tensor, is_plain, total_bytes

# One id a group: torch keeps hooks by number, and its own begin far above.
HOOK_ID: Final = 0x636B7074
# By the first word of the name; what follows it is a variant ("ALLGATHER_BASE").
_OPS: Final = {
    "ALLREDUCE": Op.ALL_REDUCE,
    "ALLGATHER": Op.ALL_GATHER,
    "REDUCE_SCATTER": Op.REDUCE_SCATTER,
    "ALLTOALL": Op.ALL_TO_ALL,
    "BARRIER": Op.BARRIER,
    "BROADCAST": Op.BROADCAST,
    "REDUCE": Op.REDUCE,
    "GATHER": Op.GATHER,
    "SCATTER": Op.SCATTER,
    "SEND": Op.SEND,
    "RECV": Op.RECV,
}
_IN_PLACE: Final = frozenset({Op.ALL_REDUCE, Op.BROADCAST, Op.REDUCE})


def has_hooks() -> bool:
    return hasattr(dist.ProcessGroup, "register_pre_hook") and hasattr(dist.ProcessGroup, "register_post_hook")


class GroupHooks:
    """``install`` and ``uninstall`` are a pair. ``recorder`` None: operations are let through."""

    source = "hooks"

    def __init__(self, endings: Endings) -> None:
        self.recorder: Recorder | None = None
        self._endings = endings
        # By thread: a group calls both hooks on the thread that issues, and only the first when issuing raises. Of the
        # output its address alone, which keeps no tensor.
        self._issuing: dict[int, tuple[int, Operation, int]] = {}
        self._hooked: weakref.WeakSet[Any] = weakref.WeakSet()

    def install(self) -> None:
        self.see_groups()

    def uninstall(self) -> None:
        for group in list(self._hooked):
            group.unregister_pre_hook(HOOK_ID)
            group.unregister_post_hook(HOOK_ID)
        self._hooked.clear()
        for thread in list(self._issuing):
            self._give_up(thread)

    def see_groups(self) -> None:
        """Hook the groups that were made since."""
        for group in list(dist.distributed_c10d._world.pg_map):
            self.hook(group)

    def hook(self, group: Any) -> None:
        if group not in self._hooked:
            self._hooked.add(group)
            found = weakref.ref(group)  # a hook that held its group would keep it for ever
            group.register_pre_hook(HOOK_ID, self._guarded(lambda args: self._before(found(), args)))
            group.register_post_hook(HOOK_ID, self._guarded(self._after))

    def _guarded(self, hook: Callable[[Any], None]) -> Callable[[Any], None]:
        def guarded(args: Any) -> None:
            if self.recorder is not None:
                self.recorder.guard(lambda: hook(args))

        return guarded

    def _before(self, group: Any, args: Any) -> None:
        self._give_up(threading.get_ident())
        op = op_of(args.name.name)
        tensor = (
            first_tensor(list(args.input_tensors)) if args.input_tensors else first_tensor(list(args.output_tensors))
        )
        recorder, device = self.recorder, self._endings.device
        if recorder is None or op is None or not is_plain(tensor):
            return
        if not tensor.is_cpu and not device.can_time(recorder, tensor):
            return
        if (communicator := recorder.communicators.find(group)) is None:
            return
        size_bytes = 0 if op is Op.BARRIER else total_bytes(list(args.input_tensors or args.output_tensors))
        address = address_of(list(args.output_tensors) or tensor)
        operation = recorder.begin(communicator, op, communicator.global_rank(args.root), size_bytes)
        if not tensor.is_cpu:
            self._endings.begin(operation)
        self._issuing[threading.get_ident()] = (args.op_id, operation, address)

    def _after(self, args: Any) -> None:
        op_id, thread = args.op_id, threading.get_ident()
        if thread not in self._issuing or self._issuing[thread][0] != op_id:
            return
        _, operation, address = self._issuing.pop(thread)
        if args.work is None:
            operation.recorder.end(operation, monotonic_ns())
            return
        try:
            self._endings.follow(operation, args.work, address, bool(args.async_op), operation.op in _IN_PLACE)
        except Exception:
            operation.recorder.leave(operation)
            raise

    def _give_up(self, thread: int) -> None:
        """What ``thread`` was issuing has raised."""
        if (issued := self._issuing.pop(thread, None)) is not None:
            _, operation, _ = issued
            operation.recorder.leave(operation)


def op_of(name: str) -> Op | None:
    """What torch's name of an operation means; None when it is no communication."""
    words = name.split("_")
    return _OPS.get("_".join(words[:2])) or _OPS.get(words[0])
