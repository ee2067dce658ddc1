"""Corrupt copies that peers give, each told once. Layer: ``peers``."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from ckptd.errors import CkptdError, Corrupt

SLOTS: Final = "memory"
PARITY: Final = "parity"
OnCorrupt = Callable[[str, str, str], None]


class Corruption:
    """What one piece of work comes upon, told once however often it is asked for. ``tell(run, place, problem)``; place
    is SLOTS or PARITY. Safe to use from any thread."""

    def __init__(self, run: str, tell: OnCorrupt) -> None:
        self._run = run
        self._tell = tell
        self._told: set[tuple[str, str]] = set()
        self._lock = threading.Lock()

    def look(self, error: CkptdError, place: str, where: str) -> None:
        """``error`` came of what is in ``place`` at ``where``."""
        if not isinstance(error, Corrupt) and not isinstance(error.__cause__, Corrupt):
            return
        with self._lock:
            is_known = (place, where) in self._told
            self._told.add((place, where))
        if not is_known:
            self._tell(self._run, place, f"{where}: {error.message}")
