"""Where the training thread is in its Python code, as text."""

from __future__ import annotations

import sys
import traceback
from typing import Final

FRAMES: Final = 20


def stack_of(thread: int | None) -> str:
    """The last frames of ``thread``, innermost last; "" when it is gone."""
    frame = sys._current_frames().get(thread or 0)
    if frame is None:
        return ""
    # Source lines are not read: a file may be on storage that hangs.
    lines = [f"{code.f_code.co_filename}:{line} {code.f_code.co_name}" for code, line in traceback.walk_stack(frame)]
    return "\n".join(reversed(lines[:FRAMES]))
