"""Whether the tiers answer: asked now and then, and when somebody wants to know at once. Layer: ``serve``.

Invariants: nobody waits longer than the deadline, whatever a tier does: a mount that hangs keeps one thread of its own
and no more; that thread ends with the daemon.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, wait
from typing import Final

import structlog

from ckptd.errors import CkptdError
from ckptd.metrics import Metrics
from ckptd.tiers.tier import Tier

EVERY_S: Final = 30.0
DEADLINE_S: Final = 5.0
log = structlog.get_logger()


class TierWatch:
    """See the module. ``start`` asks at once and every ``EVERY_S``."""

    def __init__(self, tiers: Sequence[Tier], metrics: Metrics, deadline_s: float = DEADLINE_S) -> None:
        self._tiers = list(tiers)
        self._metrics = metrics
        self._deadline_s = deadline_s
        self._asked: dict[str, Future[str | None]] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tiers", daemon=True)

    def start(self) -> None:
        if self._tiers:
            self._thread.start()

    def close(self) -> None:
        self._stop.set()

    def problems(self) -> list[str]:
        """What is wrong with each tier that is not ready, within the deadline; ``[]`` when all are."""
        answers = [(tier, self._ask(tier)) for tier in self._tiers]
        wait([answer for _, answer in answers], self._deadline_s)
        found: list[str] = []
        ready: dict[str, bool] = {}
        for tier, answer in answers:
            late = f"{tier.spec.url}: no answer within {self._deadline_s:g} s (is its file system mounted and alive?)"
            problem = answer.result() if answer.done() else late
            found += [problem] if problem else []
            ready[tier.spec.label] = ready.get(tier.spec.label, True) and problem is None
        for label, is_ready in ready.items():
            self._metrics.tier_ready.labels(label).set(is_ready)
        return found

    def _ask(self, tier: Tier) -> Future[str | None]:
        """The answer to come; that of a question still open serves again."""
        with self._lock:
            answer = self._asked.get(tier.spec.url)
            if answer is None or answer.done():
                answer = self._asked[tier.spec.url] = Future()
                # Not of a pool: those are waited for at the end of the program.
                threading.Thread(target=_answer, args=(tier, answer), name="tier probe", daemon=True).start()
            return answer

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.problems()
            except Exception:  # a thread's boundary: the next round tries again
                log.exception("tiers were not asked")
            self._stop.wait(EVERY_S)


def _answer(tier: Tier, answer: Future[str | None]) -> None:
    try:
        tier.probe()
    except CkptdError as error:
        answer.set_result(str(error))
    except Exception as error:  # noqa: BLE001  a thread's boundary: whoever asked must hear of the end
        answer.set_result(f"{type(error).__name__}: {error}")
    else:
        answer.set_result(None)
