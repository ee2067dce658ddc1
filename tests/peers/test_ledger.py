"""The ledger's rules: what happens once, what is passed over, and that snapshots never stop completing."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from ckptd.peers.ledger import Ledger, Outcome

DEADLINE_S = 10.0
versions = st.sampled_from([1, 1, 1, 1, 2])  # of the roster: seldom another


def ledger(world_size: int = 2, *, has_tier: bool = False) -> Ledger:
    return Ledger(world_size, DEADLINE_S, has_tier=has_tier)


def seal_all(book: Ledger, step: int, *, is_persisted: bool = False) -> None:
    for rank in range(book.world_size):
        book.begun(rank, step, 0.0)
        book.sealed(rank, step, is_persisted, 0.0)
    book.check()


def test_a_step_is_staged_when_the_last_rank_has_sealed_it() -> None:
    book = ledger()
    book.sealed(0, 3, False, 0.0)
    assert book.staged is None
    book.sealed(1, 3, False, 0.0)
    assert book.staged == 3


def test_a_rank_that_goes_on_has_passed_over_what_it_did_not_seal() -> None:
    book = ledger()
    book.begun(0, 1, 0.0)
    book.sealed(0, 1, False, 0.0)
    book.begun(1, 2, 0.0)
    assert "rank 1 went on to step 2" in book.dead[1].reason


def test_a_seal_that_arrives_after_another_rank_went_on_does_not_stage() -> None:
    book = ledger()
    book.sealed(1, 4, False, 0.0)
    book.sealed(0, 3, False, 0.0)
    book.sealed(1, 3, False, 0.0)
    assert book.staged is None
    assert 3 in book.dead


def test_a_dead_step_stays_dead_however_late_its_seals_come() -> None:
    book = ledger()
    book.died(5, Outcome("StepDead", "first"))
    book.died(5, Outcome("StepDead", "second"))
    seal_all(book, 5)
    assert book.staged is None
    assert book.dead[5].reason == "first"


def test_a_dead_step_stays_dead_when_many_have_died_since() -> None:
    book = ledger()
    for step in range(1, 400):
        book.died(step, Outcome("StepDead", "no slot"))
    seal_all(book, 3)
    assert book.staged is None


def test_a_staged_step_cannot_die() -> None:
    book = ledger()
    seal_all(book, 2)
    book.died(2, Outcome("StepDead", "too late"))
    book.tick(1e9)
    assert book.staged == 2
    assert not book.dead


def test_the_deadline_names_the_ranks_that_are_missing() -> None:
    book = ledger(12)
    book.begun(0, 1, 0.0)
    book.sealed(0, 1, False, 1.0)
    book.tick(DEADLINE_S)
    assert not book.dead
    book.tick(DEADLINE_S + 0.1)
    assert book.dead[1].reason == "not sealed by rank 1, 2, 3, 4, 5, 6, 7, 8 and 3 more within 10 s"


def test_one_step_is_drained_at_a_time_and_the_newest_due_one_is_next() -> None:
    book = ledger(has_tier=True)
    for step in (1, 2, 3):
        seal_all(book, step, is_persisted=True)
    assert book.draining == 1
    assert book.not_durable[2].error == "DrainBusy"
    book.drained(1)
    assert (book.durable, book.draining) == (1, 3)
    book.drain_failed(3, "disk full")
    assert (book.durable, book.draining) == (1, None)
    assert book.not_durable[3] == Outcome("DrainFailed", "disk full")


def test_nothing_is_drained_without_a_tier_or_when_not_due() -> None:
    book = ledger()
    seal_all(book, 1, is_persisted=True)
    assert book.draining is None
    book = ledger(has_tier=True)
    seal_all(book, 1)
    assert book.draining is None


def test_a_step_that_waits_for_the_drain_stays_due_when_a_newer_one_is_not() -> None:
    book = ledger(has_tier=True)
    seal_all(book, 1, is_persisted=True)
    seal_all(book, 2, is_persisted=True)
    seal_all(book, 3)
    book.drained(1)
    # Step 2 is no longer the newest staged: its slot may be gone, so it is passed over with that reason.
    assert book.draining is None
    assert 2 in book.not_durable


def test_a_run_is_not_idle_while_a_drain_is_under_way_or_waits() -> None:
    book = ledger(has_tier=True)
    seal_all(book, 1, is_persisted=True)
    seal_all(book, 2, is_persisted=True)
    book.left = {0, 1}
    assert not book.is_idle
    book.drained(1)
    assert not book.is_idle
    book.drained(2)
    assert book.is_idle


# --- a ledger made anew -------------------------------------------------------------------------------------------
def test_what_a_node_was_told_is_staged_stays_so_although_other_nodes_are_silent() -> None:
    book = ledger()
    book.sealed(0, 3, False, 0.0)
    book.known(staged=3, durable=1)
    assert (book.newest_staged, book.durable) == (3, 1)
    book.tick(DEADLINE_S + 1)
    assert not book.dead
    book.known(staged=2, durable=None)
    assert (book.newest_staged, book.durable) == (3, 1)
    book.check()
    seal_all(book, 4)
    assert (book.staged, book.newest_staged, book.dead) == (4, 4, {})


def test_a_step_that_died_before_it_was_known_to_be_staged_is_dead() -> None:
    book = ledger()
    book.sealed(0, 3, False, 0.0)
    book.tick(DEADLINE_S + 1)
    book.known(staged=3, durable=None)
    assert 3 in book.dead
    assert book.newest_staged is None
    book.check()


def test_drains_that_a_restart_interrupted_go_on_once_every_seal_is_told() -> None:
    book = ledger(has_tier=True)
    book.known(staged=2, durable=None)
    for step, is_persisted in ((1, True), (2, False)):
        book.sealed(0, step, is_persisted, 0.0)
    assert book.draining is None
    for step, is_persisted in ((1, True), (2, False)):
        book.sealed(1, step, is_persisted, 0.0)
    assert (book.staged, book.draining) == (2, 1)
    book.check()


def test_what_is_durable_already_is_not_drained_again_after_a_restart() -> None:
    book = ledger(has_tier=True)
    book.known(staged=3, durable=3)
    for rank in range(2):
        book.sealed(rank, 3, True, 0.0)
    assert (book.staged, book.draining) == (3, None)


# --- versions of the roster ---------------------------------------------------------------------------------------
def test_a_step_begun_with_two_versions_of_the_roster_is_dead_and_says_so() -> None:
    book = ledger()
    book.begun(0, 3, 0.0, roster_version=1)
    book.begun(1, 3, 0.0, roster_version=2)
    assert book.dead[3] == Outcome("StepDead", "rank 1 began it with version 2 of the roster, another rank with 1")
    seal_all(book, 3)
    assert book.staged is None


def test_a_shard_sealed_with_another_version_of_the_roster_is_never_part_of_a_snapshot() -> None:
    book = ledger()
    book.sealed(0, 3, False, 0.0, roster_version=2)
    book.sealed(1, 3, False, 0.0, roster_version=1)
    assert book.staged is None
    assert 3 in book.dead
    book.check()


def test_each_step_may_have_a_version_of_its_own() -> None:
    book = ledger()
    for step, version in ((1, 1), (2, 2), (3, 2)):
        for rank in range(2):
            book.begun(rank, step, 0.0, version)
            book.sealed(rank, step, False, 0.0, version)
        assert book.staged == step
    assert not book.dead


@given(versions=st.lists(st.integers(1, 3), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_a_step_is_staged_exactly_when_all_ranks_had_one_version(versions: list[int], seed: int) -> None:
    book = ledger(len(versions))
    events = [(rank, is_seal) for rank in range(len(versions)) for is_seal in (False, True)]
    random.Random(seed).shuffle(events)
    for rank, is_seal in events:
        if is_seal:
            book.sealed(rank, 1, False, 0.0, versions[rank])
        else:
            book.begun(rank, 1, 0.0, versions[rank])
        book.check()
    assert (book.staged == 1) == (len(set(versions)) == 1)
    assert (1 in book.dead) == (len(set(versions)) > 1)


class LedgerMachine(RuleBasedStateMachine):
    """Any order of events, also ones that no honest rank would report: the ledger never contradicts itself."""

    @initialize(world_size=st.integers(1, 4), has_tier=st.booleans())
    def open(self, world_size: int, has_tier: bool) -> None:
        self.book = ledger(world_size, has_tier=has_tier)
        self.now = 0.0
        self.died: set[int] = set()
        self.staged: list[int] = []
        self.durable: int | None = None

    def rank(self, number: int) -> int:
        return number % self.book.world_size

    @rule(rank=st.integers(0, 3), step=st.integers(0, 12), version=versions)
    def begun(self, rank: int, step: int, version: int) -> None:
        self.book.begun(self.rank(rank), step, self.now, version)

    @rule(rank=st.integers(0, 3), step=st.integers(0, 12), is_persisted=st.booleans(), version=versions)
    def sealed(self, rank: int, step: int, is_persisted: bool, version: int) -> None:
        self.book.sealed(self.rank(rank), step, is_persisted, self.now, version)

    @rule(step=st.integers(0, 12))
    def killed(self, step: int) -> None:
        self.book.died(step, Outcome("StepDead", "test"))

    @rule(passed_s=st.floats(0, 20))
    def tick(self, passed_s: float) -> None:
        self.now += passed_s
        self.book.tick(self.now)

    @rule()
    def restart(self) -> None:
        """The coordinator restarts, and hears first from a node that was told all."""
        before, self.book = self.book, ledger(self.book.world_size, has_tier=self.book.has_tier)
        self.book.known(before.newest_staged, before.durable)
        self.died = set()

    @rule(is_well=st.booleans())
    def drain_ends(self, is_well: bool) -> None:
        if self.book.draining is None:
            return
        if is_well:
            self.book.drained(self.book.draining)
        else:
            self.book.drain_failed(self.book.draining, "test")

    @invariant()
    def nothing_is_contradicted(self) -> None:
        if not hasattr(self, "book"):
            return
        self.book.check()
        self.died |= self.book.dead.keys()
        newest = self.book.newest_staged
        if newest is not None and newest not in self.staged:
            self.staged.append(newest)
        assert self.staged == sorted(self.staged), "staged went back"
        assert not self.died & set(self.staged), "a step was staged and dead"
        assert self.died == self.book.dead.keys(), "a dead step came back"
        if self.durable is not None:
            assert self.book.durable is not None
            assert self.book.durable >= self.durable
        self.durable = self.book.durable


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=80, stateful_step_count=40)


@given(
    seed=st.integers(0, 2**32),
    world_size=st.integers(1, 5),
    skips=st.floats(0.0, 0.6),
    slots=st.integers(2, 4),
    has_tier=st.booleans(),
)
@settings(max_examples=60)
def test_ranks_that_skip_at_random_go_on_staging_for_ever(
    seed: int, world_size: int, skips: float, slots: int, has_tier: bool
) -> None:
    """Ranks that run at their own pace, with few slots each, and skip by local decisions (no free slot, a copy still
    under way): once they stop skipping, a later step is always staged."""
    rng = random.Random(seed)
    book = ledger(world_size, has_tier=has_tier)
    at = [0] * world_size
    held: list[dict[int, bool]] = [{} for _ in range(world_size)]  # step -> sealed

    def free(rank: int) -> None:
        for step, is_sealed in list(held[rank].items()):
            is_kept = step in (book.staged, book.draining) or (not is_sealed) or step > (book.staged or -1)
            if step in book.dead or not is_kept:
                del held[rank][step]

    def move(rank: int, chance: float, now_s: float) -> None:
        free(rank)
        writing = [step for step, is_sealed in held[rank].items() if not is_sealed]
        if writing and rng.random() < 0.7:
            held[rank][writing[0]] = True
            book.sealed(rank, writing[0], rng.random() < 0.3, now_s)
            return
        at[rank] += 1
        if writing or len(held[rank]) >= slots or rng.random() < chance or at[rank] in book.dead:
            book.died(at[rank], Outcome("StepDead", f"rank {rank} skips"))
            return
        held[rank][at[rank]] = False
        book.begun(rank, at[rank], now_s)

    for turn in range(400):
        move(rng.randrange(world_size), skips, turn * 0.01)
        if book.draining is not None and rng.random() < 0.1:
            book.drained(book.draining)
        book.tick(turn * 0.01)
        book.check()
    before, now_s = max(at), 4.0
    for _ in range(3000):
        # The job's own collectives keep ranks within a step of each other.
        slowest = min(range(world_size), key=lambda rank: (at[rank], rng.random()))
        move(slowest, 0.0, now_s)
        now_s += 0.05
        book.tick(now_s)
        book.check()
        if book.draining is not None and rng.random() < 0.3:
            book.drained(book.draining)
        if (book.staged or -1) > before:
            return
    pytest.fail(f"nothing after step {before} was staged by step {max(at)}; dead: {list(book.dead.items())[-5:]}")
