"""What ``ckptd doctor`` looks at: a function a check, each of which says what it found and how to mend it.

Layer: ``cli``; no printing, and nothing is changed but a measuring file in a tier, which is removed. Invariants: a
check never raises for what it was sent to find; ``fix`` is empty exactly when the status is ok.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. ``warn``: works, worse than it could; ``fail``: the daemon would refuse, or data is in danger."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    fix: str = ""
