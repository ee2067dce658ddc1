"""The coordinator's ledger of one incarnation: which steps are staged, dead, being drained, durable. Pure.

The rules (each was found necessary by simulation; ``check`` states what they keep):

* A step becomes staged or dead once, whichever is recorded first.
* A rank that reports step t has thereby reported as dead every earlier step it did not seal. Without this, ranks that
  skip by local decisions end up on different steps, and after a few snapshots none ever completes again.
* A step that was begun and is not staged by a deadline is dead. A step that any rank has freed is dead.
* What was staged stays so when the coordinator restarts: a node that was told says it, until every rank's seal is told
  again. Slots that are free must not count as not yet staged meanwhile, nor the newest snapshot die of a silent node.
* One step is drained at a time; a step that was due to become durable and is no longer the newest staged when the drain
  is free is passed over.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from ckptd.errors import few

_REMEMBERED: Final = 128


@dataclass(frozen=True, slots=True)
class Outcome:
    """Why a step did not get there: ``error`` is the name of a class of ``ckptd.errors``."""

    error: str
    reason: str


@dataclass(slots=True)
class _Step:
    first_begin_s: float
    roster_version: int
    sealed: set[int] = field(default_factory=set)
    is_persisted: bool = False


@dataclass
class Ledger:
    """The state; ``world_size`` ranks, steps begun are dead after ``stage_deadline_s`` seconds without being staged."""

    world_size: int
    stage_deadline_s: float
    staged: int | None = None
    durable: int | None = None
    draining: int | None = None
    dead: dict[int, Outcome] = field(default_factory=dict)
    not_durable: dict[int, Outcome] = field(default_factory=dict)
    left: set[int] = field(default_factory=set)
    has_tier: bool = False
    _told: int | None = None  # staged, as a node was told by the coordinator before a restart
    _open: dict[int, _Step] = field(default_factory=dict)
    _reported: dict[int, int] = field(default_factory=dict)
    _drain_due: int | None = None
    _forgotten: int = -1  # the newest dead step whose outcome is no longer remembered: up to it all is settled

    # --- events --------------------------------------------------------------------------------------------------
    def begun(self, rank: int, step: int, now_s: float, roster_version: int = 1) -> None:
        """``rank`` has begun to copy ``step``, placed by that version of the roster."""
        if not self._is_settled(step):
            self._open_step(rank, step, now_s, roster_version)
            self._pass_over(rank, step)

    def sealed(self, rank: int, step: int, is_persisted: bool, now_s: float, roster_version: int = 1) -> None:
        """``rank``'s shard of ``step`` is sealed."""
        self._pass_over(rank, step)
        if self._is_settled(step):
            return
        entry = self._open_step(rank, step, now_s, roster_version)
        if entry is None:
            return
        entry.sealed.add(rank)
        entry.is_persisted |= is_persisted
        late = [r for r, reported in self._reported.items() if reported > step and r not in entry.sealed]
        if late:
            self.died(step, Outcome("StepDead", f"rank {late[0]} went on to step {self._reported[late[0]]}"))
        elif len(entry.sealed) == self.world_size:
            self._stage(step, entry)

    def known(self, staged: int | None, durable: int | None) -> None:
        """What a node was told before: nothing new, unless this ledger is younger than that. Drains go by seals."""
        if durable is not None and (self.durable is None or durable > self.durable):
            self.durable = durable
        if staged is not None and staged not in self.dead:
            self._told = max(staged, self._told if self._told is not None else staged)

    def died(self, step: int, outcome: Outcome) -> None:
        """Some rank cannot take ``step``, or has freed it."""
        if self._is_settled(step):
            return
        self._open.pop(step, None)
        if self._told is not None and step <= self._told:
            return  # it did not die then
        self.dead[step] = outcome
        if len(self.dead) > _REMEMBERED:
            self._forgotten = max(self._forgotten, min(self.dead))
            self._open = {s: entry for s, entry in self._open.items() if s > self._forgotten}
        self._trim(self.dead)

    def tick(self, now_s: float) -> None:
        """Time passes: steps begun too long ago are dead, naming the ranks that are missing."""
        for step, entry in sorted(self._open.items()):
            if now_s - entry.first_begin_s > self.stage_deadline_s:
                missing = sorted(set(range(self.world_size)) - entry.sealed)
                self.died(
                    step,
                    Outcome("StepDead", f"not sealed by rank {few(missing)} within {self.stage_deadline_s:g} s"),
                )

    def drained(self, step: int, *, is_durable: bool = True) -> None:
        """The checkpoint of ``step`` is committed; durable when in a shared tier (a node's own goes with the node)."""
        if is_durable and (self.durable is None or step > self.durable):
            self.durable = step
        self._drain_ended(step)

    def drain_failed(self, step: int, reason: str) -> None:
        """The drain of ``step`` is given up."""
        self.not_durable[step] = Outcome("DrainFailed", reason)
        self._trim(self.not_durable)
        self._drain_ended(step)

    def safeguard(self) -> None:
        """Make the newest staged step durable whatever the schedule says: nothing newer may come."""
        if self.staged is not None and self.staged != self.draining:
            self._make_durable(self.staged)

    # --- questions -----------------------------------------------------------------------------------------------
    @property
    def newest_staged(self) -> int | None:
        """Also when not every rank's seal was told to this ledger."""
        return max((step for step in (self.staged, self._told) if step is not None), default=None)

    @property
    def is_idle(self) -> bool:
        """Every rank has left and nothing is being drained or waits to be."""
        return len(self.left) == self.world_size and self.draining is None

    def check(self) -> None:
        """AssertionError when the ledger contradicts itself; tests run it after every event."""
        assert self.newest_staged is None or self.newest_staged not in self.dead, "a step is staged and dead"
        assert not self._open.keys() & self.dead.keys(), "a dead step is open"
        assert all(step > self._forgotten for step in self._open), "a step that died long ago is open"
        assert self.draining is None or (self.staged is not None and self.draining <= self.staged)
        assert self.staged is None or all(step > self.staged for step in self._open), "an open step was overtaken"
        assert len(self.dead) <= _REMEMBERED
        assert len(self.not_durable) <= _REMEMBERED

    # --- inside --------------------------------------------------------------------------------------------------
    def _open_step(self, rank: int, step: int, now_s: float, roster_version: int) -> _Step | None:
        """The entry of ``step``; None when it died of this: one snapshot never mixes two rosters."""
        entry = self._open.setdefault(step, _Step(now_s, roster_version))
        if entry.roster_version == roster_version:
            return entry
        versions = f"version {roster_version} of the roster, another rank with {entry.roster_version}"
        self.died(step, Outcome("StepDead", f"rank {rank} began it with {versions}"))
        return None

    def _is_settled(self, step: int) -> bool:
        return step in self.dead or step <= self._forgotten or (self.staged is not None and step <= self.staged)

    def _pass_over(self, rank: int, step: int) -> None:
        self._reported[rank] = max(step, self._reported.get(rank, step))
        for earlier in sorted(s for s, entry in self._open.items() if s < step and rank not in entry.sealed):
            self.died(earlier, Outcome("StepDead", f"rank {rank} went on to step {step}"))

    def _stage(self, step: int, entry: _Step) -> None:
        for earlier in sorted(s for s in self._open if s < step):
            self.died(earlier, Outcome("StepDead", f"step {step} was staged first"))
        self._open.pop(step, None)
        if self._drain_due is not None:
            self._give_up(self._drain_due, step)
        self.staged, self._drain_due = step, None
        if entry.is_persisted:
            self._make_durable(step)

    def _make_durable(self, step: int) -> None:
        if self.has_tier and (self.durable is None or step > self.durable):
            self._drain_due = step
            self._start_drain()

    def _start_drain(self) -> None:
        if self.draining is None and self._drain_due is not None:
            self.draining, self._drain_due = self._drain_due, None

    def _drain_ended(self, step: int) -> None:
        if self.draining == step:
            self.draining = None
            self._start_drain()

    def _give_up(self, step: int, newer: int) -> None:
        self.not_durable[step] = Outcome(
            "DrainBusy", f"step {self.draining} was still being drained when step {newer} was staged"
        )
        self._trim(self.not_durable)

    @staticmethod
    def _trim(outcomes: dict[int, Outcome]) -> None:
        while len(outcomes) > _REMEMBERED:
            del outcomes[min(outcomes)]
