"""Step marks, and why a step says nothing about hardware.

Layer: inside ``ckptd_client.timing``. A mark ends a step; reasons that come up between two marks are those of the
later one's step. Invariants: a step is marked once, however many callers name it; a mark never raises.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic_ns
from typing import Any, Final

from ckptd.errors import InvalidRequest
from ckptd.format.timings import STEP, Mask
from ckptd_client.timing.cuda import DeviceTimer
from ckptd_client.timing.recorder import Recorder
from ckptd_client.timing.ring import Ring

WARM_UP_ENV: Final = "CKPTD_WARM_UP_STEPS"
WARM_UP_STEPS: Final = 20
ROWS: Final = 4096
# A program that names no steps is not warming up for ever.
_UNMARKED_NS: Final = 600_000_000_000
_BY_CALLER: Final = (Mask.CHECKPOINT, Mask.EVALUATION, Mask.COMPILE)


def warm_up_steps() -> int:
    """How many steps after a start are masked WARM_UP, as is the rank meanwhile: CKPTD_WARM_UP_STEPS, else 20; 0:
    none. Raises InvalidRequest when that is no number."""
    text = os.environ.get(WARM_UP_ENV, "")
    if text and not text.isdigit():
        raise InvalidRequest(f"{WARM_UP_ENV}={text!r} is not a number of steps")
    return int(text) if text else WARM_UP_STEPS


class Steps:
    """The marks of this process. ``last``: the last step marked, -1 none. ``thread``: who marked it. ``written`` is set
    by every mark that is in the ring; who waits for the next one clears it."""

    def __init__(self, recorder: Recorder, device: DeviceTimer) -> None:
        self.ring = Ring(STEP, ROWS)
        self.last = -1
        self.written = threading.Event()
        self.thread = threading.main_thread().ident
        self._recorder = recorder
        self._device = device
        self._warm_up = warm_up_steps()
        self._reasons = Mask.NONE
        self._lasting: list[Mask] = []
        self._since_ns = monotonic_ns()
        self._unseen = 0
        self._compiled = _compilations()

    def mark(self, step: int) -> None:
        """Step ``step`` is done. Naming it again changes nothing, nor does what is no number."""
        if step == self.last or not isinstance(step, int):
            return
        mask = self._mask_of(step)
        self.last = step
        self.thread = threading.get_ident()
        if self._device.is_used:
            self._device.mark(step, mask, self._write)
        else:
            self._write(step, monotonic_ns(), mask)

    @property
    def in_force(self) -> Mask:
        """The reasons that hold at this moment, from any thread: blocks that are open, and the first steps."""
        mask = Mask.NONE
        for reason in list(self._lasting):
            mask |= reason
        is_begun = self.last >= 0 or monotonic_ns() - self._since_ns < _UNMARKED_NS
        return mask | Mask.WARM_UP if self._warm_up > 0 and is_begun else mask

    def flag(self, reason: Mask) -> None:
        """``reason`` is one of the step under way."""
        self._reasons |= reason

    @contextmanager
    def during(self, reason: Mask) -> Iterator[None]:
        """``reason`` is in force while the block runs; it is one of a step only when a step ends in the block."""
        self._lasting.append(reason)
        try:
            yield
        finally:
            self._lasting.remove(reason)

    @contextmanager
    def masked(self, kind: str) -> Iterator[None]:
        """Steps in which the block runs are masked as ``kind``: "evaluation", "checkpoint" or "compile"."""
        reason = next((mask for mask in _BY_CALLER if str(mask.name).lower() == kind), None)
        if reason is None:
            raise InvalidRequest(f"{kind!r} is no reason to mask steps", 'use "evaluation", "checkpoint" or "compile"')
        self._reasons |= reason
        with self.during(reason):
            yield

    def _mask_of(self, step: int) -> Mask:
        mask, self._reasons = self._reasons, Mask.NONE
        for reason in self._lasting:
            mask |= reason
            self._reasons |= reason
        if self._warm_up > 0:
            self._warm_up -= 1
            mask |= Mask.WARM_UP
        recorder = self._recorder
        unseen = recorder.ring.dropped + recorder.forgotten + recorder.failures + recorder.communicators.refused
        # More than one step since the last mark, or none that it began at.
        if unseen != self._unseen or step != self.last + 1 or self.last < 0:
            mask |= Mask.INCOMPLETE
        self._unseen = unseen
        compiled = _compilations()
        if compiled != self._compiled:
            mask |= Mask.COMPILE
        self._compiled = compiled
        return mask

    def _write(self, step: int, end_ns: int, mask: Mask) -> None:
        self.ring.write(step, end_ns, mask)
        self.written.set()


def _compilations() -> int:
    """How often torch.compile has compiled anything in this process."""
    counters: Any = getattr(sys.modules.get("torch._dynamo.utils"), "counters", None)
    return int(counters["frames"]["total"]) if counters and "frames" in counters else 0
