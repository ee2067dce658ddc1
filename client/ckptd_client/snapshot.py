"""What ``save()`` and ``restore()`` return."""

from __future__ import annotations

from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from ckptd.errors import CkptdError
from ckptd.model import Incarnation

Level = Literal["staged", "protected", "durable"]


class Snapshot:
    """One step's snapshot on its way. ``staged``, ``protected`` and ``durable`` are futures that resolve to the step
    or fail with the reason (``StepDead``, ``Superseded``, ``NoTier``, ...); each of them ends. ``skipped`` is the
    reason when nothing was captured, else None."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.skipped: str | None = None
        self.is_persisted = False
        self.staged: Future[int] = Future()
        self.protected: Future[int] = Future()
        self.durable: Future[int] = Future()

    def wait(self, level: Level = "staged", timeout: float | None = None) -> int:
        """Block until the snapshot is at ``level``; its error when it will never be, TimeoutError after ``timeout``."""
        future: Future[int] = getattr(self, level)
        return future.result(timeout)

    def fail(self, error: CkptdError) -> None:
        """Every future that is still open ends with ``error``."""
        for future in (self.staged, self.protected, self.durable):
            end(future, error)

    def skip(self, error: CkptdError) -> None:
        self.skipped = str(error)
        self.fail(error)

    @property
    def is_staged(self) -> bool:
        return _succeeded(self.staged)

    @property
    def is_settled(self) -> bool:
        return self.staged.done() and self.protected.done() and self.durable.done()

    def __repr__(self) -> str:
        reached = [name for name in ("staged", "protected", "durable") if _succeeded(getattr(self, name))]
        return f"Snapshot(step={self.step}, reached={reached}, skipped={self.skipped!r})"


def _succeeded(future: Future[int]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


def end(future: Future[int], outcome: int | CkptdError) -> None:
    """Give ``future`` its step or its error, unless it has one: several threads may know the end. Runs the callbacks
    that users attached, so no lock may be held."""
    with suppress(InvalidStateError):
        if isinstance(outcome, CkptdError):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore applied: ``source`` is "memory" (of this node), "peer" (another node's memory), "reconstruction"
    (from parity) or a tier's URL; source and ``bytes`` are this rank's."""

    step: int
    incarnation: Incarnation
    source: str
    seconds: float
    bytes: int
