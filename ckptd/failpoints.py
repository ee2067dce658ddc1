"""Named places where a test may break the process: ``CKPTD_FAILPOINTS="seal.before_flip=kill;drain.array=stop@2"``.

Layer: the bottom; pure but for the failure it was asked for. An action is ``kill`` (SIGKILL), ``stop`` (SIGSTOP),
``raise`` (OSError ENOSPC) or ``sleep:SECONDS``; ``@n`` fires at the n-th passage only, else at each. Without the
variable, passing a failpoint is one dictionary look-up.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time

ENV = "CKPTD_FAILPOINTS"


def _parse(text: str) -> dict[str, tuple[str, int]]:
    points = {}
    for item in filter(None, (part.strip() for part in text.split(";"))):
        name, _, action = item.partition("=")
        action, _, nth = action.partition("@")
        points[name] = (action, int(nth or 0))
    return points


_points = _parse(os.environ.get(ENV, ""))
_passed: dict[str, int] = {}
_lock = threading.Lock()


def failpoint(name: str) -> None:
    """Do what ``CKPTD_FAILPOINTS`` asks for at ``name``, usually nothing."""
    if name not in _points:
        return
    action, nth = _points[name]
    with _lock:
        _passed[name] = _passed.get(name, 0) + 1
        if nth and _passed[name] != nth:
            return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "raise":
        raise OSError(errno.ENOSPC, f"failpoint {name}")
    elif action.startswith("sleep:"):
        time.sleep(float(action.removeprefix("sleep:")))
