"""The coordinator's ledger of protection: which snapshot is being protected, which one is protected everywhere. Pure.

Protection takes the newest staged snapshot whenever it is free; those in between are passed over. A snapshot is
protected once every node has reported its parity in place; parity that a node reports lost withdraws that. An attempt
ends when every node has reported, one way or the other: a node that cannot does not keep the others from finishing. A
failed attempt is repeated while nothing newer is staged: what is in place already is not made again.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final

from ckptd.model import SnapshotId
from ckptd.peers.ledger import Outcome

_REMEMBERED: Final = 128


@dataclass
class Protection:
    """The state. ``nodes`` must all report; none: protection is off. ``retry_s`` after a failure the next attempt;
    ``attempt`` counts them, so that a node that was away between two of the same snapshot tells them apart."""

    nodes: frozenset[str]
    retry_s: float
    attempt: int = 0
    parity_of: SnapshotId | None = None
    protecting: SnapshotId | None = None
    not_protected: dict[SnapshotId, Outcome] = field(default_factory=dict)
    _newest: SnapshotId | None = None
    _done: dict[SnapshotId, set[str]] = field(default_factory=dict)
    _failed: dict[str, str] = field(default_factory=dict)
    _failed_at_s: float | None = None

    # --- events --------------------------------------------------------------------------------------------------
    def staged(self, snapshot: SnapshotId) -> None:
        """``snapshot`` is staged, or was restored by every rank: its images are complete on every node."""
        if self._newest is None or snapshot > self._newest:
            self._newest, self._failed_at_s = snapshot, None
            self._start()

    def protected(self, node: str, snapshot: SnapshotId) -> None:
        """All parity that ``node`` should hold of ``snapshot`` is in place."""
        self._done.setdefault(snapshot, set()).add(node)
        self._failed.pop(node, None)
        self._judge(snapshot)

    def failed(self, node: str, snapshot: SnapshotId, reason: str, now_s: float) -> None:
        """``node`` cannot make its parity of ``snapshot``."""
        if snapshot == self.protecting:
            self._failed[node] = reason
            self._close_attempt(now_s)

    def parity_lost(self, node: str, snapshot: SnapshotId, now_s: float) -> None:
        """``node`` does not hold the parity any more that it reported: protection is withdrawn until it is rebuilt."""
        self._done.get(snapshot, set()).discard(node)
        if snapshot == self.protecting:
            self._failed[node] = "its parity was lost again"  # it has reported already, and would not do so twice
            self._close_attempt(now_s)
        if snapshot == self.parity_of:
            self.parity_of = None
            self._start()

    def renew(self, nodes: Collection[str]) -> None:
        """Another roster: the nodes that must report are ``nodes`` now."""
        self.nodes = frozenset(nodes)
        if self.parity_of is not None and not self.nodes <= self._done.get(self.parity_of, set()):
            self.parity_of = None
        self.protecting, self._failed, self._failed_at_s = None, {}, None
        self._start()

    def tick(self, now_s: float, silent: Collection[str]) -> None:
        """Time passes; nodes not heard of hold no attempt up, and a failed one is repeated."""
        if self.protecting is not None:
            for node in self.nodes.intersection(silent) - self._done.get(self.protecting, set()):
                self._failed.setdefault(node, "not heard of")
            self._close_attempt(now_s)
        elif self._failed_at_s is not None and now_s - self._failed_at_s > self.retry_s:
            self._failed_at_s = None
            self._start()

    # --- inside --------------------------------------------------------------------------------------------------
    def _start(self) -> None:
        is_due = self._newest is not None and (self.parity_of is None or self._newest > self.parity_of)
        if self.nodes and self.protecting is None and is_due and self._failed_at_s is None:
            self.protecting, self._failed = self._newest, {}
            self.attempt += 1
            if self.protecting is not None:
                self._judge(self.protecting)

    def _judge(self, snapshot: SnapshotId) -> None:
        if not self.nodes or not self.nodes <= self._done.get(snapshot, set()):
            return
        if self.parity_of is None or snapshot > self.parity_of:
            self.parity_of = snapshot
            self.not_protected.pop(snapshot, None)
            self._done = {s: done for s, done in self._done.items() if s >= snapshot}
        if self.protecting is not None and snapshot >= self.protecting:
            self.protecting, self._failed = None, {}
            self._start()

    def _close_attempt(self, now_s: float) -> None:
        """End the attempt once every node has said what came of it."""
        snapshot = self.protecting
        if snapshot is None or not self._failed:
            return
        if not self.nodes <= self._done.get(snapshot, set()) | self._failed.keys():
            return
        node, reason = min(self._failed.items())
        more = f" (and {len(self._failed) - 1} more nodes)" if len(self._failed) > 1 else ""
        self.not_protected[snapshot] = Outcome("ProtectFailed", f"node {node}: {reason}{more}")
        while len(self.not_protected) > _REMEMBERED:
            del self.not_protected[min(self.not_protected)]
        is_newest = snapshot == self._newest
        self.protecting, self._failed, self._failed_at_s = None, {}, now_s if is_newest else None
        self._start()

    def check(self) -> None:
        """AssertionError when the ledger contradicts itself; tests run it after every event."""
        assert self.parity_of is None or self.nodes <= self._done.get(self.parity_of, set()), "parity is missing"
        assert self.protecting is None or self.protecting != self.parity_of, "what is protected is being protected"
        assert len(self.not_protected) <= _REMEMBERED
        is_waiting = self.protecting is not None or self._failed_at_s is not None
        assert not self.nodes or is_waiting or self._newest is None or self._newest == self.parity_of, "forgotten"
