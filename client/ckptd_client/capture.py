"""One snapshot's copy: pieces claimed by the worker and, at a fence, by the training thread itself.

Source of the scheme: DataStates-LLM (Maurya et al., HPDC 2024): between one ``optimizer.step()`` and the next,
parameters and optimizer state do not change, so their copy may run during forward and backward, and only a step that
comes before the copy has ended must wait. While it waits, the training thread copies pieces too: its core would idle
otherwise.

Invariants: the mark is published in payload order; a group (what one fence guards) is checked for tearing after its
last piece is copied and before its fence lets go; once ``failed`` is set nothing more is copied.
"""

from __future__ import annotations

import random
import threading
import time
from typing import Final

import torch
from crc32c import crc32c

from ckptd.errors import CkptdError, DaemonUnreachable, StepDead, Torn
from ckptd.failpoints import failpoint
from ckptd_client.binding import Binding
from ckptd_client.device import DeviceCopies
from ckptd_client.handover import Target
from ckptd_client.plan import Item, Piece, Plan
from ckptd_client.probes import take_probes
from ckptd_client.snapshot import Snapshot
from ckptd_client.state import FenceClass, Leaf
from ckptd_client.state.fill import is_bytes_copy

GRANT_S: Final = 2.0
COPY_S: Final = 60.0
_SAMPLES: Final = 64
_WINDOW_BYTES: Final = 4096
# Of our own: the global generator is the user's, and drawing from it would change the data order.
_chance = random.Random()  # noqa: S311  a sample, not a secret


class Patience:
    """How long fences may still wait for a slot to be granted.

    One account for all captures, refilled when one is sealed: a daemon that hangs, or is still making slots, costs the
    training loop ``GRANT_S`` once, not at every step.
    """

    def __init__(self) -> None:
        self.left_s = GRANT_S

    def spend(self, waited_s: float) -> None:
        self.left_s = max(0.0, self.left_s - waited_s)

    def refill(self) -> None:
        self.left_s = GRANT_S


class Capture:
    """See the module. Made by ``save()``; bound to its slot by the worker once the daemon has granted one.

    Args:
        leaves: the walk of this save.
        sources: per leaf, the tensor to copy from: itself, or for the rest a clone made by save().
        index: the encoded shard index.
        checks_all: compare every byte when looking for torn tensors, not a sample.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        plan: Plan,
        leaves: list[Leaf],
        sources: list[torch.Tensor],
        index: bytes,
        *,
        is_persisted: bool,
        checks_all: bool,
        patience: Patience,
    ) -> None:
        self.snapshot = snapshot
        self.plan = plan
        self.leaves = leaves
        self.sources = sources
        self.index = index
        self.index_crc = crc32c(index)
        self.is_persisted = is_persisted
        self.failed: CkptdError | None = None
        self.postponed: CkptdError | None = None  # why the daemon has granted no slot yet
        self.stall_s = 0.0
        self.devices = DeviceCopies(plan, leaves)
        self.binding: Binding | None = None
        self._checks_all = checks_all
        self._patience = patience
        self._versions = [_version(leaf.outer) for leaf in leaves]
        self._probes = take_probes(plan, sources, is_whole=checks_all)
        self._target: Target | None = None
        self._changed = threading.Condition()
        self._next = 0
        self._copying = 0
        self._done = [False] * len(plan.pieces)
        self._prefix = 0
        self._left = [0] * len(plan.groups)
        self._left_on_host = [0] * len(plan.groups)
        for number, piece in enumerate(plan.pieces):
            self._left[piece.group] += 1
            self._left_on_host[piece.group] += not self.devices.has(number)
        self._is_safe = [left == 0 for left in self._left]
        self._is_checked = list(self._is_safe)
        self._is_over = False

    # --- the worker's side -----------------------------------------------------------------------------------------
    def bind(self, binding: Binding, target: Target) -> None:
        """The slot is granted and mapped: write the index, skip what the slot holds already, start to copy."""
        binding.write_index(self.index)
        target.publish(0)
        with self._changed:
            self._target = target
            frozen = (target.use, self._frozen_versions())
            if binding.frozen == (target.use - 1, frozen[1]):
                for number, piece in enumerate(self.plan.pieces):
                    if self.plan.groups[piece.group].fence is FenceClass.FROZEN:
                        self._finish(number)
            binding.frozen = None
        self.devices.enqueue(binding, self.sources, self._done)
        with self._changed:
            self.binding = binding
            self._changed.notify_all()

    def copy(self) -> None:
        """Copy everything that is left; raises ``failed``."""
        while self._copy_next():
            pass
        for number in self.devices.pieces:
            self.devices.wait(number)
            with self._changed:
                self._finish(number)
            self._check_groups()
        with self._changed:
            self._changed.wait_for(lambda: self.failed or all(self._done), COPY_S)
            if self.failed is None and not all(self._done):
                self.failed = StepDead("the copy did not end in time")
        self._check_groups()
        with self._changed:
            # A check that the training thread has claimed must end too: what is torn is never sealed.
            self._changed.wait_for(lambda: self.failed or all(self._is_safe), COPY_S)
            if self.failed is None and not all(self._is_safe):
                self.failed = StepDead("the check for torn tensors did not end in time")
        if self.failed:
            raise self.failed
        binding, target = self.bound()
        target.publish(binding.layout.payload_bytes)
        binding.frozen = (target.use, self._frozen_versions())

    def bound(self) -> tuple[Binding, Target]:
        assert self.binding is not None
        assert self._target is not None
        return self.binding, self._target

    def fail(self, error: CkptdError) -> None:
        """Stop: nothing more is copied, fences let go."""
        with self._changed:
            self.failed = self.failed or error
            self._changed.notify_all()

    def settle(self) -> None:
        """After a failure: wait until nothing writes to the slot any more, so that it can be given back."""
        with self._changed:
            self._changed.wait_for(lambda: not self._copying, COPY_S)
        self.devices.wait_all()

    def end(self) -> None:
        """Sealed or given up: the sources may go."""
        with self._changed:
            self._is_over = True
            self.sources = []
            self._changed.notify_all()

    @property
    def is_over(self) -> bool:
        return self._is_over

    # --- the training thread's side ----------------------------------------------------------------------------------
    def fence(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Return once the tensors of ``optimizer`` (None: every lazy tensor) may change. Never raises, never hangs:
        when the daemon or the copy does not get on, the capture is given up."""
        wanted = [
            number
            for number, group in enumerate(self.plan.groups)
            if group.fence is not FenceClass.REST and (optimizer is None or group.optimizer is optimizer)
        ]
        if self._is_over or all(self._is_safe[number] for number in wanted):
            return
        started = time.monotonic()
        with self._changed:
            is_granted = self._changed.wait_for(lambda: self.failed or self.binding is not None, self._patience.left_s)
            self._patience.spend(time.monotonic() - started)
            if not is_granted:
                self.failed = self.postponed or DaemonUnreachable("the daemon did not answer before the fence")
        while not self._are_safe(wanted) and time.monotonic() - started < COPY_S:
            if not self._copy_next():
                with self._changed:
                    # The worker has the last pieces: it says when they are done.
                    self._changed.wait_for(lambda: self._are_safe(wanted), 0.05)
        if not self._are_safe(wanted):
            self.fail(StepDead(f"the copy did not end within {COPY_S:g} s of the fence"))
        self.stall_s += time.monotonic() - started

    def _are_safe(self, groups: list[int]) -> bool:
        if self.failed is not None:
            return True
        if self.binding is not None:
            for number in groups:
                if not self._is_safe[number] and not self._left_on_host[number] and self._claim_check(number):
                    # On a device the wait is the stream's: the host goes on as soon as it is enqueued.
                    self._check_versions(number)
                    self.devices.fence(number)
                    with self._changed:
                        self._is_safe[number] = True
                        self._changed.notify_all()
        return all(self._is_safe[number] for number in groups)

    def _claim_check(self, group: int) -> bool:
        """True for the one thread that looks for tearing in this group: a second look could see the next step."""
        with self._changed:
            claimed, self._is_checked[group] = not self._is_checked[group], True
            return claimed

    # --- pieces ------------------------------------------------------------------------------------------------------
    def _copy_next(self) -> bool:
        """Claim and copy one piece of host memory; False when there is none left to claim."""
        with self._changed:
            while self._next < len(self._done) and (self._done[self._next] or self.devices.has(self._next)):
                self._next += 1
            if self.failed or self.binding is None or self._next >= len(self._done):
                return False
            number = self._next
            self._next += 1
            self._copying += 1
        failpoint("copy.piece")
        try:
            self.binding.copy_on_cpu(self.plan.pieces[number], self.sources)
        except Exception as error:  # noqa: BLE001  on the training thread too, where nothing of ours may be raised
            # A source that was freed or changed its form under the copy: the snapshot cannot be right.
            self.fail(StepDead(f"copy failed: {error}"))
            return False
        finally:
            with self._changed:
                self._copying -= 1
                self._changed.notify_all()
        with self._changed:
            self._finish(number)
        self._check_groups()
        return True

    def _finish(self, number: int) -> None:
        """Under the lock: piece ``number`` is in the slot; publish how far the payload is complete."""
        if self._done[number]:
            return
        self._done[number] = True
        group = self.plan.pieces[number].group
        self._left[group] -= 1
        self._left_on_host[group] -= not self.devices.has(number)
        before = self._prefix
        while self._prefix < len(self._done) and self._done[self._prefix]:
            self._prefix += 1
        if self._prefix > before and self._target is not None and self.binding is not None:
            self._target.publish(self.binding.end_of(self.plan.pieces[self._prefix - 1]))
        self._changed.notify_all()

    # --- tearing -----------------------------------------------------------------------------------------------------
    def _check_groups(self) -> None:
        """Look for tearing in every group whose last piece has just been copied, then let its fence go."""
        for number, left in enumerate(self._left):
            if left or not self._claim_check(number):
                continue
            if self.plan.groups[number].fence is not FenceClass.REST:
                self._check_versions(number)
                self._check_bytes(number)
                self._check_probes(number)
            with self._changed:
                self._is_safe[number] = True
                self._changed.notify_all()

    def _check_versions(self, group: int) -> None:
        for number in self.plan.groups[group].leaves:
            leaf = self.leaves[number]
            if _version(leaf.outer) != self._versions[number]:
                self.fail(Torn(f"{leaf.name} was changed while it was copied"))
                return

    def _check_bytes(self, group: int) -> None:
        """`.data` writes raise no version: compare source and slot, a sample of windows or all of them."""
        binding, _ = self.bound()
        sources = self.sources
        pieces = [p for p in self.plan.pieces if p.group == group]
        items = [(item, piece) for piece in pieces for item in piece.items]
        if not self._checks_all and len(items) > _SAMPLES:
            items = _chance.sample(items, _SAMPLES)
        for item, piece in items:
            source = sources[item.leaf] if sources else None
            if source is None or not is_bytes_copy(source):
                torn = self._checks_all and source is not None and not _equal(binding, item, source)
            else:
                torn = binding.differs(item, source, self._window(item, piece))
            if torn:
                self.fail(Torn(f"{self.leaves[item.leaf].name} was changed while it was copied"))
                return

    def _check_probes(self, group: int) -> None:
        """Whether the slot has what was there at save()."""
        binding, _ = self.bound()
        for probe in self._probes.get(group, ()):
            if not probe.matches(binding):
                self.fail(Torn(f"{self.leaves[probe.item.leaf].name} was changed before it was copied"))
                return

    def _window(self, item: Item, piece: Piece) -> slice:
        if self._checks_all:
            return slice(0, item.size_bytes)
        start, stop = (piece.start, piece.stop) if len(piece.items) == 1 else (0, item.size_bytes)
        first = _chance.randrange(start, max(start + 1, stop - _WINDOW_BYTES))
        return slice(first, min(stop, first + _WINDOW_BYTES))

    def _frozen_versions(self) -> tuple[tuple[int, int], ...]:
        return tuple(
            (self.leaves[n].tensor.data_ptr(), self._versions[n])
            for group in self.plan.groups
            if group.fence is FenceClass.FROZEN
            for n in group.leaves
        )


def _version(tensor: torch.Tensor) -> int:
    """The mutation counter; inference tensors have none and cannot be watched."""
    return -1 if tensor.is_inference() else tensor._version


def _equal(binding: Binding, item: Item, source: torch.Tensor) -> bool:
    saved = binding.view(item)
    now = source.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
    return torch.equal(saved.reshape(-1).view(torch.uint8), now.reshape(-1).view(torch.uint8))
