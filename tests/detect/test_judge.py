"""Everything of one job in one place: what a stop hides, what a snapshot every step must not hide."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from ckptd.detect.faultlog import Family
from ckptd.detect.judge import SETTLE_S, Judge
from ckptd.detect.records import Communicator, Confidence, Count, Fault, Kind, Pending, RankState
from ckptd.format.timings import SAMPLE, SELF, Mask, Op

WORLD = 8
TABLE = {0: Communicator("world", tuple(range(WORLD)))}
COMMUNICATORS = {"world": TABLE[0]}
NONE = np.zeros(0, SAMPLE)


class Told:
    """A judge that is told of steps whose self time is 0.1 s, of ranks in ``slow`` longer."""

    def __init__(self) -> None:
        self.judge = Judge([f"n{rank // 4}" for rank in range(WORLD)])
        self.step = 0
        self._random = np.random.default_rng(3)

    def run(self, steps: int, slow: Mapping[int, float] | None = None, mask: Mask = Mask.NONE) -> None:
        for _ in range(steps // 5):
            for rank in range(WORLD):
                rows = np.zeros(5, SELF)
                rows["step"] = range(self.step, self.step + 5)
                rows["mask"] = int(mask)
                own_s = (slow or {}).get(rank, 0.1) * (1 + 0.01 * self._random.standard_normal(5))
                rows["self_s"], rows["length_s"] = own_s, 0.2
                rows["gaps_s"][:, :4] = own_s[:, None] / 4
                self.judge.take(rank, rows, NONE, TABLE)
            self.step += 5
            self.judge.look(self.states(), COMMUNICATORS, float(self.step))
            self.judge.weigh(self.states(), COMMUNICATORS, float(self.step))

    def states(self) -> list[RankState]:
        count = {"world": Count(self.step, self.step)}
        return [RankState(rank, f"n{rank // 4}", count, step=self.step) for rank in range(WORLD)]

    def open(self) -> list[tuple[Kind, tuple[int, ...], Confidence]]:
        return [(logged.fault.kind, logged.fault.ranks, logged.fault.confidence) for logged in self.judge.log.open]


def test_a_slow_rank_is_confirmed_without_a_layout_being_given() -> None:
    told = Told()
    told.run(40)
    assert told.open() == []
    told.run(30, {5: 0.12})
    assert told.open() == [(Kind.SLOW_COMPUTE, (5,), Confidence.CONFIRMED)]


def test_a_job_that_takes_a_snapshot_every_step_is_judged_all_the_same() -> None:
    told = Told()
    told.run(60, mask=Mask.CHECKPOINT)
    told.run(30, {5: 0.12}, Mask.CHECKPOINT)
    assert told.open() == [(Kind.SLOW_COMPUTE, (5,), Confidence.CONFIRMED)]


def test_steps_of_an_evaluation_say_nothing() -> None:
    told = Told()
    told.run(40)
    told.run(30, {5: 0.2}, Mask.EVALUATION)
    assert told.open() == []


def test_who_goes_after_the_first_is_not_named_and_a_death_is_told_once_it_is_known_who_was_first() -> None:
    told = Told()
    told.run(20)
    gone = {2: 100.0, 0: 100.3, 1: 100.5}
    states = [
        RankState(s.rank, s.node, s.counts, is_dead=s.rank in gone, gone_s=gone.get(s.rank)) for s in told.states()
    ]
    assert not told.judge.look(states, COMMUNICATORS, 100.6)
    assert told.judge.is_unsettled
    assert told.judge.look(states, COMMUNICATORS, 100.0 + SETTLE_S)
    assert [(kind, ranks) for kind, ranks, _ in told.open()] == [(Kind.DEATH, (2,))]


def test_a_job_that_is_ended_because_it_hangs_keeps_the_verdict_of_the_hang() -> None:
    told = Told()
    told.run(20)
    states = []
    for state in told.states():
        if state.rank == 6:
            states.append(state)
            continue
        pending = (Pending("world", told.step + 1, Op.ALL_REDUCE, 4096),)
        count = {"world": Count(told.step + 1, told.step)}
        states.append(RankState(state.rank, state.node, count, pending, step=told.step))
    for second in range(20):
        told.judge.look(states, COMMUNICATORS, 100.0 + second)
    assert [(kind, ranks) for kind, ranks, _ in told.open()] == [(Kind.HANG, (6,))]
    dead = [RankState(s.rank, s.node, s.counts, s.pending, is_dead=True, gone_s=130.0) for s in states]
    told.judge.look(dead, COMMUNICATORS, 140.0)
    assert [(kind, ranks) for kind, ranks, _ in told.open()] == [(Kind.HANG, (6,))]


@pytest.mark.parametrize(
    ("number", "told_of"),
    [
        (0, (Kind.DESYNC, (3,))),
        (signal.SIGABRT, (Kind.DESYNC, (3,))),
        (signal.SIGKILL, (Kind.DEATH, (0,))),  # what others enter on their way out is no mismatch of the program
    ],
)
def test_a_mismatch_that_kills_an_innocent_rank_is_told_as_what_it_is(
    number: int, told_of: tuple[Kind, tuple[int, ...]]
) -> None:
    told = Told()
    told.run(20)
    past = {("world", seq): (Op.ALL_REDUCE, 4096) for seq in range(1, 20)}
    states = []
    for state in told.states():
        entered = {**past, ("world", 20): (Op.ALL_REDUCE, 8 if state.rank == 3 else 4096)}
        is_dead = state.rank == 0  # it got too much, and gloo ended it before it could say what it had entered
        signatures = past if is_dead else entered
        gone_s = 100.0 if is_dead else 100.1
        error = "" if is_dead else "RuntimeError: Connection closed by peer"
        states.append(
            RankState(
                state.rank,
                state.node,
                state.counts,
                (),
                signatures,
                is_dead=is_dead,
                gone_s=gone_s,
                error=error,
                signal=number if is_dead else 0,
            )
        )
    told.judge.look(states, COMMUNICATORS, 102.0)
    assert [(kind, ranks) for kind, ranks, _ in told.open()] == [told_of]


def test_a_rank_that_left_because_of_its_network_does_not_hide_that_others_wait_for_it() -> None:
    told = Told()
    told.run(20)
    states = []
    for state in told.states():
        if state.rank == 6:
            error = "RuntimeError: NCCL timed out"
            states.append(RankState(6, state.node, state.counts, has_left=True, gone_s=100.0, error=error))
            continue
        pending = (Pending("world", told.step + 1, Op.ALL_REDUCE, 4096),)
        states.append(RankState(state.rank, state.node, {"world": Count(told.step + 1, told.step)}, pending))
    for second in range(20):
        told.judge.look(states, COMMUNICATORS, 100.0 + second)
    assert [ranks for _, ranks, _ in told.open()] == [(6,)]


def test_a_second_phase_whose_steps_count_from_the_start_is_judged_as_the_first_was() -> None:
    told = Told()
    told.run(150)
    told.step = 0
    told.run(60)
    told.run(30, {5: 0.12})
    assert told.open() == [(Kind.SLOW_COMPUTE, (5,), Confidence.CONFIRMED)]


def test_a_hang_among_all_is_put_down_to_the_link_that_was_slow_before_it() -> None:
    told = Told()
    told.run(40)
    slow_link = Fault(Kind.SLOW_LINK, (3, 6), ("n0", "n1"), Confidence.CONFIRMED, told.step)
    told.judge.log.update(Family.COMMUNICATION, [slow_link], float(told.step))
    stuck = Count(told.step + 1, told.step)
    waits = [
        replace(
            state,
            counts={"world": stuck},
            pending=(Pending("world", told.step + 1, Op.ALL_REDUCE, 64, for_s=60.0),),
        )
        for state in told.states()
    ]
    for second in range(120):
        told.judge.look(waits, COMMUNICATORS, told.step + 1.0 + second)
    assert (Kind.COMM_HANG, (3, 6), Confidence.SUSPECT) in told.open()
