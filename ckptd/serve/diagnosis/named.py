"""Which nodes faults have named, for a restore to ask them last: while a fault lasts, and for a while after.

A job that a fault has stopped is started again, and with that the fault is over and its start forgotten: the node is
the same.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable
from typing import Final

AFTER_S: Final = 600.0


class NamedNodes:
    """By run and start of it. Called under a lock of the caller's."""

    def __init__(self) -> None:
        self._lasting: dict[tuple[str, Hashable], frozenset[str]] = {}
        self._until_s: dict[str, dict[str, float]] = {}

    def tell(self, run: str, start: Hashable, nodes: Collection[str], now_s: float) -> None:
        """``nodes`` are those that open faults of this start of ``run`` name now."""
        over = self._lasting.pop((run, start), frozenset()) - set(nodes)
        if nodes:
            self._lasting[run, start] = frozenset(nodes)
        if over:
            self._until_s.setdefault(run, {}).update(dict.fromkeys(over, now_s + AFTER_S))

    def of(self, run: str, now_s: float) -> frozenset[str]:
        """The nodes to be asked last."""
        recent = {node: until_s for node, until_s in self._until_s.pop(run, {}).items() if until_s > now_s}
        if recent:
            self._until_s[run] = recent
        lasting = (nodes for (known, _), nodes in self._lasting.items() if known == run)
        return frozenset(recent).union(*lasting)
