"""A rank as the daemon of its node knows it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal


@dataclass(slots=True)
class Member:
    """``state`` is "joined", "left" or "dead". ``watch`` is the newest stream of watermarks that it opened: only the
    end of that one is its death. ``gone_s``: when it went, monotonic; ``error``: the exception that ended its loop."""

    pid: int
    state: Literal["joined", "left", "dead"] = "joined"
    watch: object | None = None
    gone_s: float | None = None
    error: str = ""
    watched_pid: int = 0  # by pidfd: then the end of a stream alone is no death
    signal: int = 0  # that ended the process, when it is known
    step_s: float = 0.0  # time of one of its steps, as it last said; 0: not known

    def go(self, state: Literal["left", "dead"], error: str = "") -> None:
        self.state, self.error, self.gone_s = state, error, time.monotonic()
