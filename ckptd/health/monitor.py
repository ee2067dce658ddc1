"""Samples the node at even times in a thread of its own and keeps what its health is.

Layer: ``health``, above its readers; judgement is ``detect.health``. Invariants: a snapshot never waits for a read; a
source that fails or is slow costs the others nothing: it is set aside with its reason and tried again later; after a
sample that came late the next ones are not hurried.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import structlog

from ckptd.detect.health import Health, NodeNormal, Resource
from ckptd.health.gpu import GpuSource
from ckptd.health.kernel_log import KernelLogSource
from ckptd.health.samples import Source, figures_between
from ckptd.health.system import CpuSource, DiskSource, MemorySource, PressureSource, TcpSource
from ckptd.health.tcp import PeerTcpSource

INTERVAL_S: Final = 5.0
RETRY_S: Final = 60.0
WINDOW: Final = 120
_SLOW_S: Final = 1.0
_CLOSE_S: Final = 5.0
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One sample judged. ``figures``: by name, see ``detect.health.FIGURES``; one that could not be read is absent.
    ``unread``: by source or family of figures, why it is absent. ``at_s``: of the monotonic clock."""

    health: Health = field(default_factory=Health)
    figures: Mapping[str, float] = field(default_factory=dict)
    unread: Mapping[str, str] = field(default_factory=dict)
    at_s: float = -math.inf

    @property
    def age_s(self) -> float:
        """Infinite before the first sample. Much above the interval: a source does not return, as a driver whose
        device is lost may do."""
        return time.monotonic() - self.at_s


@dataclass(slots=True)
class _Watched:
    source: Source
    values: Mapping[str, float] | None = None
    read_at_s: float = 0.0
    retry_at_s: float = -math.inf
    reason: str = ""


def sources_of_node() -> list[Source]:
    """All that can be known of this node."""
    return [
        CpuSource(),
        PressureSource(),
        MemorySource(),
        DiskSource(),
        TcpSource(),
        PeerTcpSource(),
        GpuSource(),
        KernelLogSource(),
    ]


class Monitor:
    """See the module. ``loaded``: what the daemon itself loads at the moment (disks and network while it drains); it
    is asked at each sample, by the monitor's thread."""

    def __init__(
        self, sources: Sequence[Source], loaded: Callable[[], Collection[Resource]], interval_s: float = INTERVAL_S
    ) -> None:
        self._watched = [_Watched(source) for source in sources]
        self._loaded = loaded
        self._interval_s = interval_s
        self._normal = NodeNormal()
        self._window: deque[Snapshot] = deque([Snapshot()], maxlen=WINDOW)
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="health", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop sampling and close the sources; more than once is harmless."""
        self._is_closed.set()
        if self._thread.is_alive():
            # A thread that is stuck in a driver is left behind: nothing of ours would make it return.
            self._thread.join(_CLOSE_S)

    def snapshot(self) -> Snapshot:
        return self._window[-1]

    def window(self) -> tuple[Snapshot, ...]:
        """The last ``WINDOW`` snapshots, oldest first."""
        return tuple(snapshot for snapshot in self._window.copy() if snapshot.figures)

    def sample(self) -> None:
        """Read every source once and judge. The thread does so; a caller may instead of ``start``."""
        figures: dict[str, float] = {}
        for watched in self._watched:
            if time.monotonic() >= watched.retry_at_s:
                figures.update(self._read(watched))
        unread = {watched.source.name: watched.reason for watched in self._watched if watched.reason}
        for watched in self._watched:
            unread.update(watched.source.unread)
        health = self._normal.observe(figures, self._loaded())
        self._window.append(Snapshot(health, figures, unread, time.monotonic()))

    def _read(self, watched: _Watched) -> dict[str, float]:
        began_s = time.monotonic()
        try:
            values = watched.source.read()
        except OSError as error:
            self._set_aside(watched, _reason_of(error))
            return {}
        except Exception as error:  # a source's boundary: whatever is wrong with one leaves the others
            reason = f"{type(error).__name__}: {error}"
            if watched.reason != reason:
                log.exception("source of health failed", source=watched.source.name)
            self._set_aside(watched, reason)
            return {}
        ended_s = time.monotonic()
        # The first read loads a library and opens a driver, on a busy node for long: the next one tells.
        if ended_s - began_s > _SLOW_S and watched.values is not None:
            self._set_aside(watched, f"takes more than {_SLOW_S:g} s to read: read less often")
        elif watched.reason:
            log.info("source of health is back", source=watched.source.name)
            watched.reason = ""
        before, elapsed_s = watched.values, ended_s - watched.read_at_s
        watched.values, watched.read_at_s = values, ended_s
        return figures_between(before or {}, values, elapsed_s)

    def _set_aside(self, watched: _Watched, reason: str) -> None:
        if watched.reason != reason:
            log.info("source of health set aside", source=watched.source.name, reason=reason)
        watched.reason = reason
        watched.retry_at_s = time.monotonic() + RETRY_S

    def _run(self) -> None:
        due_s = time.monotonic() + self._interval_s  # a start must not wait for drivers
        while not self._is_closed.wait(max(due_s - time.monotonic(), 0.0)):
            try:
                self.sample()
            except Exception:  # a thread's boundary: the next sample tries again
                log.exception("health was not judged")
            due_s = max(due_s + self._interval_s, time.monotonic())
        for watched in self._watched:
            watched.source.close()


def _reason_of(error: OSError) -> str:
    """Without the number, which is for programs."""
    text = error.strerror or str(error)
    return f"{error.filename}: {text}" if error.filename else text
