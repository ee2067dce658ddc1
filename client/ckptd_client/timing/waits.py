"""The end of operations whose work owns no future, or is waited for at once: when a wait for it returns.

Layer: inside ``ckptd_client.timing``. ``torch.distributed.Work.wait`` is wrapped in Python, and the functional
collectives' ``wait_tensor`` through the dispatcher. gloo's send, receive and reduce-scatter have no future, and their
``is_completed()`` stays false. A done-callback costs more than the operation (the thread that ends it must get the
GIL), so who waits at once is timed here too. A work keeps the tensors of its operation, so it is held, until it is
waited for, at most ``MOST_HELD`` at a time, and not past the first look after it is over or, where a device cannot be
asked, ``_KEPT_NS``: from then on who waits is recognised only as long as the program itself has the work. What is not
over stays pending, as it may hang. Invariant: what a wait returns or raises is what it would have been.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic_ns
from typing import Any, Final

import torch.distributed as dist

from ckptd_client.timing.recorder import Operation

MOST_HELD: Final = 1024
# A device's operation that is over and was not waited for by then is taken to be one whose wait is not seen.
_KEPT_NS: Final = 2_000_000_000
Ended = Callable[[Operation], None]


def ended_on_host(operation: Operation) -> None:
    operation.recorder.end(operation, monotonic_ns())


@dataclass(slots=True)
class _Held:
    """``work``: as long as it is held; then ``released`` finds it while the program has it."""

    operations: list[Operation]
    work: dist.Work | None
    ended: Ended
    output: int
    released: weakref.ref[dist.Work] | None = None
    is_over: bool = False  # its work has said so


class Waits:
    """Operations that end when somebody has waited for them. ``install`` and ``uninstall`` are a pair."""

    def __init__(self) -> None:
        self._held: dict[int, _Held] = {}
        self._by_output: dict[int, int] = {}
        self._raw: tuple[Any, Any] | None = None

    def install(self) -> None:
        # The raw attributes: what getattr() gives cannot be put back. Both are looked for before one is replaced.
        raw = dist.Work.__dict__["wait"], dist.ProcessGroup.__dict__["_end_coalescing"]
        original, pop = dist.Work.wait, self._held.pop

        def wait(work: dist.Work, *args: Any, **kwargs: Any) -> Any:
            held = pop(id(work), None)
            if held is None:
                return original(work, *args, **kwargs)
            try:
                return original(work, *args, **kwargs)
            finally:
                self._settle(id(work), held)

        original_end: Any = dist.ProcessGroup._end_coalescing

        def end_coalescing(group: Any, *args: Any, **kwargs: Any) -> Any:
            work = original_end(group, *args, **kwargs)
            if work is not None:
                self.coalesced(id(group), work)
            return work

        dist.Work.wait = wait  # type: ignore[assignment, method-assign]
        dist.ProcessGroup._end_coalescing = end_coalescing  # type: ignore[assignment, method-assign]
        self._raw = raw

    def uninstall(self) -> None:
        """Does nothing when it is not installed."""
        if self._raw is not None:
            dist.Work.wait, dist.ProcessGroup._end_coalescing = self._raw  # type: ignore[method-assign]
            self._raw = None
        self._held.clear()
        self._by_output.clear()

    def hold(self, operation: Operation, work: dist.Work, output: int, ended: Ended = ended_on_host) -> None:
        """``ended`` is called when ``work``, or the tensor at address ``output`` (0: none), has been waited for."""
        if len(self._held) >= MOST_HELD:
            self._drop(next(iter(self._held)))
        # The Python object of a work lives only as long as someone holds it, and its address must stay its own.
        self._held[id(work)] = _Held([operation], work, ended, output)
        if output:
            self._by_output[output] = id(work)

    def coalesced(self, group: int, work: dist.Work) -> None:
        """The point-to-point operations that the group at address ``group`` has held until now are waited for as one:
        NCCL's batches give one work, and nobody waits for those of their parts."""
        parts: list[Operation] = []
        ended: Ended = ended_on_host
        for key, held in list(self._held.items()):
            of_group = held.operations[0].recorder.communicators.by_address.get(group)
            if held.operations[0].is_pair and held.operations[0].communicator is of_group:
                parts += held.operations
                ended = held.ended
                self._forget(key)
        if parts:
            self._held[id(work)] = _Held(parts, work, ended, 0)

    def tensor_awaited(self, address: int) -> None:
        """A functional collective's result at ``address`` was waited for."""
        key = self._by_output.get(address)
        if key is not None and (held := self._held.pop(key, None)) is not None:
            self._settle(key, held)

    def poll(self, *, may_query_device: bool) -> None:
        """Let go of what is over by its own account, or has ended otherwise. ``may_query_device``: a device's works can
        be asked whether they are over."""
        for key, held in list(self._held.items()):
            first = held.operations[0]
            if first not in first.recorder.pending:
                self._forget(key)
            elif held.ended is not ended_on_host:
                self._look_at_device(key, held, may_query_device)
            elif held.work is not None and held.work.is_completed() and self._held.pop(key, None) is not None:
                self._settle(key, held)

    def _look_at_device(self, key: int, held: _Held, may_query: bool) -> None:
        work = held.work or (held.released() if held.released is not None else None)
        is_old = monotonic_ns() - held.operations[0].start_ns > _KEPT_NS
        if may_query and work is not None:
            held.is_over = held.is_over or work.is_completed()
        if is_old and held.is_over:  # when its device was done is not known any more
            self._drop(key)
        elif held.work is not None and (held.is_over or (is_old and not may_query)):
            held.released = weakref.ref(held.work, lambda _: self._died(key, held))
            held.work = None

    def _died(self, key: int, held: _Held) -> None:
        """The program does not have the released work any more. A collective that may not be over stays pending until a
        later one of its communicator has ended; of point-to-point nothing tells."""
        if self._held.get(key) is held:
            self._forget(key)
            for operation in held.operations:
                if held.is_over or operation.is_pair:
                    operation.recorder.leave(operation)

    def _settle(self, key: int, held: _Held) -> None:
        self._forget_output(key, held)
        for operation in held.operations:
            try:
                held.ended(operation)
            except Exception as error:  # noqa: BLE001  in the user's wait: nothing of ours may reach it
                operation.recorder.fail(error)

    def _drop(self, key: int) -> None:
        held = self._forget(key)
        for operation in held.operations if held is not None else ():
            operation.recorder.leave(operation)

    def _forget(self, key: int) -> _Held | None:
        held = self._held.pop(key, None)
        if held is not None:
            self._forget_output(key, held)
        return held

    def _forget_output(self, key: int, held: _Held) -> None:
        if held.output and self._by_output.get(held.output) == key:
            self._by_output.pop(held.output, None)
