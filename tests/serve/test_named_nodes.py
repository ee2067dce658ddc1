"""Nodes that faults have named: asked last while the fault lasts and for a while after."""

from __future__ import annotations

from ckptd.serve.diagnosis.named import AFTER_S, NamedNodes


def test_a_node_is_named_while_its_fault_lasts_and_for_a_while_after() -> None:
    named = NamedNodes()
    named.tell("gpt", 1, {"n2"}, 0.0)
    assert named.of("gpt", 10 * AFTER_S) == {"n2"}
    named.tell("gpt", 1, (), 10 * AFTER_S)
    assert named.of("gpt", 11 * AFTER_S - 1) == {"n2"}
    assert named.of("gpt", 11 * AFTER_S) == frozenset()


def test_what_a_new_start_is_told_does_not_clear_the_one_before() -> None:
    named = NamedNodes()
    named.tell("gpt", 1, {"n2"}, 0.0)
    named.tell("gpt", 2, {"n3"}, 1.0)
    named.tell("gpt", 1, (), 2.0)
    assert named.of("gpt", 3.0) == {"n2", "n3"}


def test_a_node_of_another_run_is_not_named() -> None:
    named = NamedNodes()
    named.tell("gpt", 1, {"n2"}, 0.0)
    assert named.of("bert", 0.0) == frozenset()
