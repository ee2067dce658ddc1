"""The ledger of protection: it never contradicts itself, no node holds the others up, and what can be protected is."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ckptd.model import Incarnation, SnapshotId
from ckptd.peers.ledger import Outcome
from ckptd.peers.protection import Protection

NODES = ("a", "b", "c", "d")
RETRY_S = 10.0
FIRST = Incarnation(1, 7)


def step(number: int) -> SnapshotId:
    return SnapshotId(FIRST, number)


def protection(*nodes: str) -> Protection:
    return Protection(frozenset(nodes or NODES[:2]), RETRY_S)


def all_protect(book: Protection, snapshot: SnapshotId) -> None:
    for node in sorted(book.nodes):
        book.protected(node, snapshot)
        book.check()


# --- rules --------------------------------------------------------------------------------------------------------
def test_a_staged_step_is_protected_once_every_node_has_its_parity() -> None:
    book = protection()
    book.staged(step(1))
    assert book.protecting == step(1)
    book.protected("a", step(1))
    assert book.parity_of is None
    book.protected("b", step(1))
    assert (book.parity_of, book.protecting) == (step(1), None)


def test_steps_staged_while_protection_is_busy_are_passed_over_but_for_the_newest() -> None:
    book = protection()
    for number in (1, 2, 3):
        book.staged(step(number))
    assert book.protecting == step(1)
    all_protect(book, step(1))
    assert (book.parity_of, book.protecting) == (step(1), step(3))


def test_an_older_step_never_takes_the_place_of_a_newer() -> None:
    book = protection()
    book.staged(step(2))
    all_protect(book, step(2))
    book.staged(step(1))
    all_protect(book, step(1))
    assert (book.parity_of, book.protecting) == (step(2), None)


def test_a_node_that_cannot_does_not_keep_the_others_from_finishing() -> None:
    book = protection("a", "b", "c")
    book.staged(step(1))
    book.failed("a", step(1), "memory is full", 0.0)
    assert book.protecting == step(1)  # b and c are still at it: what they make is not made again
    book.protected("b", step(1))
    book.failed("c", step(1), "memory is full", 0.0)
    assert book.protecting is None
    assert book.not_protected[step(1)] == Outcome("ProtectFailed", "node a: memory is full (and 1 more nodes)")


def test_a_failed_attempt_is_repeated_after_a_while_and_its_outcome_taken_back_when_it_works() -> None:
    book = protection()
    book.staged(step(1))
    book.protected("b", step(1))
    book.failed("a", step(1), "no shared memory", 5.0)
    book.tick(5.0 + RETRY_S, ())
    assert book.protecting is None
    book.tick(5.1 + RETRY_S, ())
    assert book.protecting == step(1)
    book.protected("a", step(1))  # b's parity is in place already
    assert book.parity_of == step(1)
    assert step(1) not in book.not_protected


def test_a_newer_step_does_not_wait_for_the_pause_after_a_failure() -> None:
    book = protection()
    book.staged(step(1))
    for node in NODES[:2]:
        book.failed(node, step(1), "full", 0.0)
    book.staged(step(2))
    assert book.protecting == step(2)


def test_a_silent_node_ends_the_attempt_and_is_named() -> None:
    book = protection("a", "b")
    book.staged(step(1))
    book.tick(1.0, ["b"])
    assert book.protecting == step(1)  # a may still finish
    book.protected("a", step(1))
    book.tick(2.0, ["b"])
    assert book.protecting is None
    assert book.not_protected[step(1)] == Outcome("ProtectFailed", "node b: not heard of")


def test_a_silent_node_that_has_reported_is_not_waited_for() -> None:
    book = protection("a", "b")
    book.staged(step(1))
    book.protected("b", step(1))
    book.tick(1.0, ["b"])
    book.protected("a", step(1))
    assert book.parity_of == step(1)


def test_parity_that_is_lost_withdraws_protection_until_it_is_rebuilt() -> None:
    book = protection()
    book.staged(step(1))
    all_protect(book, step(1))
    book.parity_lost("a", step(1), 0.0)
    assert (book.parity_of, book.protecting) == (None, step(1))
    book.protected("a", step(1))
    assert (book.parity_of, book.protecting) == (step(1), None)


def test_another_roster_withdraws_protection_only_for_nodes_that_were_not_in_it() -> None:
    book = protection("a", "b", "c")
    book.staged(step(1))
    all_protect(book, step(1))
    book.renew(["a", "b"])
    assert book.parity_of == step(1)
    book.renew(["a", "b", "d"])
    assert (book.parity_of, book.protecting) == (None, step(1))


def test_without_nodes_nothing_is_protected_and_nothing_is_waited_for() -> None:
    book = Protection(frozenset(), RETRY_S)
    book.staged(step(1))
    book.tick(100.0, NODES)
    book.check()
    assert (book.protecting, book.parity_of) == (None, None)


def test_outcomes_are_remembered_for_the_newest_steps_only() -> None:
    book = protection("a")
    for number in range(300):
        book.staged(step(number))
        book.failed("a", step(number), "full", 0.0)
        book.check()
    assert min(book.not_protected) == step(172)


# --- any order of events ------------------------------------------------------------------------------------------
class ProtectionMachine(RuleBasedStateMachine):
    """Any order of reports about steps that were staged: the ledger never contradicts itself, and nothing is called
    protected that is not in place on every node."""

    @initialize(nodes=st.sets(st.sampled_from(NODES)))
    def open(self, nodes: set[str]) -> None:
        self.book = Protection(frozenset(nodes), RETRY_S)
        self.now = 0.0
        self.staged: list[SnapshotId] = []
        self.in_place: set[tuple[str, SnapshotId]] = set()

    def some_step(self, number: int) -> SnapshotId:
        return self.staged[number % len(self.staged)]

    @rule(ordinal=st.integers(1, 3), number=st.integers(1, 9))
    def stage(self, ordinal: int, number: int) -> None:
        snapshot = SnapshotId(Incarnation(ordinal, 7), number)
        self.staged.append(snapshot)
        self.book.staged(snapshot)

    @precondition(lambda self: self.staged)
    @rule(node=st.sampled_from(NODES), which=st.integers(0, 20))
    def protected(self, node: str, which: int) -> None:
        self.in_place.add((node, self.some_step(which)))
        self.book.protected(node, self.some_step(which))

    @precondition(lambda self: self.staged)
    @rule(node=st.sampled_from(NODES), which=st.integers(0, 20))
    def failed(self, node: str, which: int) -> None:
        self.book.failed(node, self.some_step(which), "test", self.now)

    @precondition(lambda self: self.staged)
    @rule(node=st.sampled_from(NODES), which=st.integers(0, 20))
    def parity_lost(self, node: str, which: int) -> None:
        self.in_place.discard((node, self.some_step(which)))
        self.book.parity_lost(node, self.some_step(which), self.now)

    @rule(nodes=st.sets(st.sampled_from(NODES)))
    def renew(self, nodes: set[str]) -> None:
        self.book.renew(nodes)

    @rule(passed_s=st.floats(0, 20), silent=st.sets(st.sampled_from(NODES)))
    def tick(self, passed_s: float, silent: set[str]) -> None:
        self.now += passed_s
        self.book.tick(self.now, silent)

    @invariant()
    def nothing_is_contradicted(self) -> None:
        if not hasattr(self, "book"):
            return
        book = self.book
        book.check()
        assert book.parity_of is None or {(n, book.parity_of) for n in book.nodes} <= self.in_place
        assert book.protecting is None or book.protecting in self.staged
        assert book.parity_of not in book.not_protected
        assert book.protecting is None or book.parity_of is None or book.protecting > book.parity_of


TestProtectionMachine = ProtectionMachine.TestCase
TestProtectionMachine.settings = settings(max_examples=80, stateful_step_count=40)


class Nodes:
    """Nodes that do as they are told: each works on what is being protected, once an attempt, at its own pace.
    ``fails`` is the share of attempts that end badly; ``gone`` nodes say nothing."""

    def __init__(self, book: Protection, rng: random.Random) -> None:
        self.book, self.rng = book, rng
        self.fails = 0.0
        self.gone: set[str] = set()
        self.now = 0.0
        self._told: dict[str, tuple[SnapshotId | None, int]] = {}
        self._working: set[str] = set()

    def turn(self) -> None:
        """One node hears or reports; half a second passes."""
        self.now += 0.5
        self.book.tick(self.now, self.gone)
        self.book.check()
        for node in sorted(self.book.nodes - self.gone):
            wanted = self.book.protecting
            if (wanted, self.book.attempt) != self._told.get(node):
                self._told[node] = wanted, self.book.attempt
                self._working.discard(node)
                if wanted is not None:
                    self._working.add(node)
            if wanted is not None and node in self._working and self.rng.random() < 0.5:
                self._working.discard(node)
                if self.rng.random() < self.fails:
                    self.book.failed(node, wanted, "test", self.now)
                else:
                    self.book.protected(node, wanted)
                self.book.check()


def disturbed(seed: int, count: int) -> tuple[Protection, Nodes]:
    """A ledger and its nodes after a while of steps, failures, silence and losses."""
    rng = random.Random(seed)
    book = protection(*NODES[:count])
    nodes = Nodes(book, rng)
    nodes.fails = 0.5
    for number in range(60):
        nodes.gone = {node for node in NODES if rng.random() < 0.1}
        if rng.random() < 0.3:
            book.staged(step(number))
        if rng.random() < 0.1 and book.parity_of:
            book.parity_lost(rng.choice(NODES[:count]), book.parity_of, float(number))
        nodes.turn()
    book.staged(step(100))
    return book, nodes


@given(seed=st.integers(0, 2**32), count=st.integers(1, 4))
@settings(max_examples=50)
def test_the_newest_step_is_protected_once_every_node_reports(seed: int, count: int) -> None:
    book, nodes = disturbed(seed, count)
    nodes.fails, nodes.gone = 0.0, set()
    for _ in range(200):
        nodes.turn()
    assert (book.parity_of, book.protecting) == (step(100), None)
    assert step(100) not in book.not_protected


@given(seed=st.integers(0, 2**32), count=st.integers(2, 4))
@settings(max_examples=50)
def test_a_silent_node_never_blocks_and_every_newer_step_gets_its_attempt(seed: int, count: int) -> None:
    book, nodes = disturbed(seed, count)
    silent = nodes.rng.choice(NODES[:count])
    nodes.fails, nodes.gone = 0.0, {silent}
    for number in (101, 102, 103):
        book.staged(step(number))
        for _ in range(60):
            nodes.turn()
        if book.parity_of != step(number):  # unless it reported before it fell silent
            assert book.not_protected[step(number)].reason == f"node {silent}: not heard of"
    nodes.gone = set()
    for _ in range(100):
        nodes.turn()
    assert book.parity_of == step(103)


def test_a_node_that_was_away_between_two_attempts_tells_them_apart() -> None:
    book = protection("a", "b")
    book.staged(step(1))
    first = book.attempt
    book.failed("a", step(1), "full", 0.0)
    book.failed("b", step(1), "full", 0.0)
    book.tick(RETRY_S + 1, ())
    assert book.protecting == step(1)
    assert book.attempt > first


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_attempts_are_repeated_until_one_works_everywhere(share: float) -> None:
    book = protection(*NODES)
    nodes = Nodes(book, random.Random(1))
    nodes.fails = share
    book.staged(step(1))
    for _ in range(2000):
        nodes.turn()
    assert book.parity_of == step(1)
