"""What goes when memory is needed: pure. As little as it takes, in a fixed order, and nothing when all of it is not
enough."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Generic, TypeVar

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")


class Order(IntEnum):
    """Lower goes first. Free parity goes before free slots: without a slot a step is dead, without parity its
    protection only waits."""

    OWN = 0  # free, of whoever needs the memory, and of no use to it
    FREE_OF_ENDED_RUN = 1
    FREE_PARITY = 2
    FREE_SLOT = 3
    HELD_BY_ENDED_RUN = 4


@dataclass(frozen=True, slots=True)
class Holding(Generic[T_co]):
    """Memory that may go."""

    order: Order
    size_bytes: int
    item: T_co


def to_drop(holdings: Iterable[Holding[T]], missing_bytes: int) -> list[T] | None:
    """What must go for ``missing_bytes``, the smaller first within an order; None when all is not enough."""
    chosen = []
    for holding in sorted(holdings, key=lambda holding: (holding.order, holding.size_bytes)):
        if missing_bytes <= 0:
            break
        chosen.append(holding.item)
        missing_bytes -= holding.size_bytes
    return chosen if missing_bytes <= 0 else None
