"""Faults over time: one fault however often it is found, resolved when its own judge finds it no more."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from ckptd.detect.faultlog import Family, FaultLog
from ckptd.detect.records import Confidence, Fault, Kind

SLOW = Fault(Kind.SLOW_COMPUTE, (3,), (), Confidence.SUSPECT, 40, {"summary": "rank 3"})


def test_a_fault_found_again_is_one_whose_confidence_grows_and_whose_first_step_stays() -> None:
    log = FaultLog()
    assert log.update(Family.COMPUTE, [SLOW], 1.0)
    again = replace(SLOW, confidence=Confidence.CONFIRMED, since_step=50, evidence={"summary": "rank 3, again"})
    assert log.update(Family.COMPUTE, [again], 2.0)
    assert [(f.fault.confidence, f.fault.since_step, f.first_seen_s) for f in log.open] == [
        (Confidence.CONFIRMED, 40, 1.0)
    ]
    assert log.open[0].fault.evidence["summary"] == "rank 3, again"


def test_a_weaker_look_neither_lowers_confidence_nor_widens_what_was_narrowed_down() -> None:
    log = FaultLog()
    log.update(Family.COMPUTE, [replace(SLOW, confidence=Confidence.CONFIRMED)], 1.0)
    assert not log.update(Family.COMPUTE, [replace(SLOW, ranks=(2, 3))], 2.0)
    assert log.open[0].fault.ranks == (3,)
    assert log.open[0].fault.confidence is Confidence.CONFIRMED


def test_only_the_judge_that_could_have_found_a_fault_resolves_it() -> None:
    log = FaultLog()
    log.update(Family.COMPUTE, [SLOW], 1.0)
    for now_s in range(2, 20):
        log.update(Family.STOP, [], float(now_s))
        log.update(Family.COMMUNICATION, [], float(now_s))
    assert len(log.open) == 1
    for _ in range(Family.COMPUTE.value):
        assert log.open
        log.update(Family.COMPUTE, [], 30.0)
    assert not log.open
    assert [(f.fault, f.resolved_s) for f in log.resolved] == [(SLOW, 30.0)]


def test_a_look_that_finds_it_again_starts_the_count_of_misses_anew() -> None:
    log = FaultLog()
    for _ in range(5):
        log.update(Family.COMPUTE, [SLOW], 1.0)
        for _ in range(Family.COMPUTE.value - 1):
            log.update(Family.COMPUTE, [], 1.0)
    assert len(log.open) == 1


def test_a_hang_is_over_at_the_first_look_that_does_not_find_it() -> None:
    log = FaultLog()
    log.update(Family.STOP, [Fault(Kind.HANG, (1,))], 1.0)
    assert log.update(Family.STOP, [], 2.0)
    assert not log.open


def test_what_a_test_has_shown_is_verified() -> None:
    log = FaultLog()
    log.update(Family.COMPUTE, [SLOW], 1.0)
    assert log.verify(replace(SLOW, confidence=Confidence.VERIFIED))
    assert log.open[0].fault.confidence is Confidence.VERIFIED
    assert not log.verify(Fault(Kind.SLOW_COMPUTE, (9,), (), Confidence.VERIFIED))


RANKS = st.sets(st.integers(0, 5), max_size=3).map(lambda ranks: tuple(sorted(ranks)))
FAULTS = st.builds(Fault, st.sampled_from(list(Kind)), RANKS, st.just(()), st.sampled_from(list(Confidence)))


@given(st.lists(st.tuples(st.sampled_from(list(Family)), st.lists(FAULTS, max_size=3)), max_size=20))
def test_confidence_never_falls_and_what_is_told_as_changed_has_changed(
    looks: list[tuple[Family, list[Fault]]],
) -> None:
    log = FaultLog()
    for now_s, (family, found) in enumerate(looks):
        before = [(f.fault.kind, f.fault.ranks, f.fault.confidence) for f in log.open]
        has_changed = log.update(family, found, float(now_s))
        after = [(f.fault.kind, f.fault.ranks, f.fault.confidence) for f in log.open]
        assert has_changed == (before != after)
        assert all(f.resolved_s is None for f in log.open)
        assert all(f.resolved_s is not None for f in log.resolved)
