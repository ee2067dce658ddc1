"""A token bucket: how many bytes a second a daemon may read from its peers for protection, so that training does not
feel it."""

from __future__ import annotations

import threading
import time
from typing import Final

_BURST_S: Final = 0.05


class TokenBucket:
    """``rate_bytes_s`` bytes a second, 0 for no limit. Safe to call from any thread."""

    def __init__(self, rate_bytes_s: int) -> None:
        self.rate_bytes_s = rate_bytes_s
        self._lock = threading.Lock()
        self._free_at_s = 0.0

    def take(self, size_bytes: int) -> None:
        """Wait until ``size_bytes`` more may be moved. Waiters are served in the order in which they came."""
        if not self.rate_bytes_s:
            return
        now = time.monotonic()
        with self._lock:
            # Time not used is kept for a short burst only.
            start = max(self._free_at_s, now - _BURST_S)
            self._free_at_s = start + size_bytes / self.rate_bytes_s
            wait_s = start - now
        if wait_s > 0:
            time.sleep(wait_s)
