"""The tap: a kernel on every c10d operation that notes it and goes on to the kernel that does it.

Layer: inside ``ckptd_client.timing``. Key BackendSelect lies above every backend and below autograd, tracing and fake
tensors, so what Python, DDP's reducer, FSDP2, functional and compiled code call passes it once, with real tensors
(other keys miss some, are refused, or are never called). Invariants: what the operation answers or raises is what it
would have been; what goes wrong here is counted, and the operation proceeds; no tensor and no group is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic_ns
from typing import Any, Final

import torch
import torch.distributed as dist

from ckptd.format.timings import Op
from ckptd_client.timing.endings import Endings
from ckptd_client.timing.operations import Spec, usable
from ckptd_client.timing.recorder import Operation, Recorder
from ckptd_client.timing.tensors import address_of, first_tensor, is_plain, total_bytes

_KEY: Final = "BackendSelect"
_BARRIER: Final = Op.BARRIER
Kernel = Callable[..., Any]


class Dispatcher:
    """``install`` and ``uninstall`` are a pair; both make torch look its kernels up anew, so installing belongs before
    training. ``recorder`` may be exchanged while installed; None: operations are let through."""

    source = "dispatcher"

    def __init__(self, endings: Endings) -> None:
        self.recorder: Recorder | None = None
        self._endings = endings
        self._libraries: list[Any] = []

    def install(self) -> None:
        below = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.BackendSelect)
        library: Any = torch.library.Library
        c10d, functional = library("c10d", "IMPL"), library("_c10d_functional", "IMPL")
        self._libraries = [c10d, functional]
        for name, spec in usable().items():
            c10d.impl(name, self._kernel(name, spec, below), _KEY, with_keyset=True)
        functional.impl("wait_tensor", self._wait_tensor(below), _KEY, with_keyset=True)

    def uninstall(self) -> None:
        for library in self._libraries:
            library._destroy()
        self._libraries.clear()

    def see_groups(self) -> None:
        """Nothing to do: operations of every group pass."""

    # --- kernels ---------------------------------------------------------------------------------------------------
    def _kernel(self, name: str, spec: Spec, below: Any) -> Kernel:
        redispatch = getattr(torch.ops.c10d, name).default._handle.redispatch_boxed
        begin, follow = self._begin, self._follow

        def kernel(keys: Any, *args: Any, **kwargs: Any) -> Any:
            recorder = self.recorder
            if recorder is None:
                return redispatch(keys & below, *args, **kwargs)
            try:
                operation = begin(recorder, spec, args)
            except Exception as error:  # noqa: BLE001  the boundary to the training program, which must go on
                recorder.fail(error)
                operation = None
            if operation is None:
                return redispatch(keys & below, *args, **kwargs)
            try:
                answer = redispatch(keys & below, *args, **kwargs)
            except BaseException:
                recorder.leave(operation)
                raise
            try:
                follow(operation, spec, args, answer)
            except Exception as error:  # noqa: BLE001  the same
                recorder.fail(error)
                recorder.leave(operation)
            return answer

        return kernel

    def _wait_tensor(self, below: Any) -> Kernel:
        redispatch = torch.ops._c10d_functional.wait_tensor.default._handle.redispatch_boxed

        def kernel(keys: Any, *args: Any, **kwargs: Any) -> Any:
            answer = redispatch(keys & below, *args, **kwargs)
            recorder = self.recorder
            if recorder is not None and args and is_plain(args[0]):
                recorder.guard(lambda: self._endings.waits.tensor_awaited(args[0].data_ptr()))
            return answer

        return kernel

    def _begin(self, recorder: Recorder, spec: Spec, args: tuple[Any, ...]) -> Operation | None:
        """None: not to be recorded."""
        source = args[spec.source]
        tensor = first_tensor(source)
        if not is_plain(tensor):
            return None
        if not tensor.is_cpu and not self._endings.device.can_time(recorder, tensor):
            return None
        group = dist.ProcessGroup.unbox(args[spec.group])
        communicator = recorder.communicators.by_address.get(id(group)) or recorder.communicators.find(group)
        if communicator is None:
            return None
        peer = communicator.global_rank(args[spec.peer]) if spec.peer >= 0 else -1
        size_bytes = tensor.nbytes if tensor is source else total_bytes(source)
        operation = recorder.begin(communicator, spec.op, peer, 0 if spec.op is _BARRIER else size_bytes)
        if not tensor.is_cpu:
            self._endings.begin(operation)
        return operation

    def _follow(self, operation: Operation, spec: Spec, args: tuple[Any, ...], answer: Any) -> None:
        """See that the operation ends."""
        boxed = (answer[-1] if answer else None) if type(answer) is tuple else answer
        if boxed is None:  # it was synchronous
            operation.recorder.end(operation, monotonic_ns())
            return
        work = dist.Work.unbox(boxed)
        # Trailing arguments that have their default do not come along: absent means asynchronous.
        is_async = len(args) <= spec.is_async or spec.is_async < 0 or bool(args[spec.is_async])
        self._endings.follow(operation, work, address_of(args[0]), is_async, spec.is_in_place)
