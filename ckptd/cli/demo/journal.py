"""What the journals of two runs say when they are laid side by side.

Layer: ``cli``; pure. An event is a line of the journal that ``train_gpt`` writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Events = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Comparison:
    """A run against an undisturbed one, bit for bit."""

    final_loss: float
    is_every_loss_equal: bool
    are_weights_equal: bool

    @property
    def is_good(self) -> bool:
        return self.is_every_loss_equal and self.are_weights_equal


def compare(expected: Events, found: Events) -> Comparison:
    """Two journals of runs that came to their end."""
    losses = _losses(expected)
    return Comparison(
        final_loss=float.fromhex(losses[last_step(expected)][0]),
        is_every_loss_equal=losses == _losses(found),
        are_weights_equal=expected[-1]["weights"] == found[-1]["weights"],
    )


def last_step(events: Events) -> int:
    """The newest step that was done; 0 when none was."""
    return max((e["step"] for e in events if e["event"] == "step"), default=0)


def restored(events: Events, rank: int) -> dict[str, Any] | None:
    """The first restore of ``rank``: step, source and seconds."""
    return next((e for e in events if e["event"] == "restored" and e["rank"] == rank), None)


def _losses(events: Events) -> dict[int, list[str]]:
    """Every loss seen at each step, exact: one each, unless a step that was done again came out otherwise."""
    seen: dict[int, list[str]] = {}
    for event in events:
        if event["event"] == "step" and event["loss"] not in seen.setdefault(event["step"], []):
            seen[event["step"]].append(event["loss"])
    return seen
