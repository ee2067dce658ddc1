"""When a job stands still, and who of it: nothing moves for long enough, and a side thread is not the job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ckptd.detect.hang import StallAlarm, judge_hang
from ckptd.detect.records import Communicator, Confidence, Count, Pending, RankState
from ckptd.format.timings import Op
from tests.detect.waiting_ranks import FOUR, idle, p2p, waits


def first_alarm(looks: Sequence[RankState], step_p99_s: float = 0.5) -> int | None:
    alarm = StallAlarm()
    return next((at for at, state in enumerate(looks) if alarm.look([state], step_p99_s, float(at))), None)


def test_the_alarm_is_raised_after_ten_seconds_without_progress_seen_twice() -> None:
    assert first_alarm([waits(0)] * 30) == 11


def test_the_alarm_waits_for_five_slow_steps() -> None:
    assert first_alarm([waits(0)] * 60, step_p99_s=8.0) == 41


def test_progress_starts_the_alarm_again() -> None:
    assert first_alarm([waits(0, 5)] * 9 + [waits(0, 6)] * 20) == 20


def test_a_rank_that_is_in_nothing_is_not_stalled() -> None:
    assert first_alarm([idle(0)] * 60) is None


def test_point_to_point_raises_the_alarm_too() -> None:
    assert first_alarm([p2p(0, Op.RECV, 1)] * 30) == 11


def test_a_silent_rank_raises_no_alarm_itself() -> None:
    assert first_alarm([replace(waits(0), silent_s=30.0)] * 60) is None


def test_ranks_that_go_on_while_they_wait_in_a_side_group_are_no_hang() -> None:
    side, alarm = Communicator("side", (0, 1, 2)), StallAlarm()
    for second in range(40):
        states = []
        for rank in range(4):
            done = 10 * second + rank  # heartbeats are not of one moment
            counts = {"w": Count(done + 1, done)}
            pending: tuple[Pending, ...] = (Pending("w", done + 1, Op.ALL_REDUCE, 64),)
            if rank in side.members:
                counts["side"] = Count(1, 0)
                pending = (*pending, Pending("side", 1, Op.SCATTER, 64, for_s=float(second)))
            states.append(RankState(rank, f"n{rank}", counts, pending, step=second))
        assert alarm.look(states, 0.5, float(second)) == []


def test_a_rank_that_goes_on_elsewhere_is_not_absent_and_what_it_waits_in_is_left_out() -> None:
    alarm, still = StallAlarm(), []
    for second in range(20):
        moving = replace(idle(1), counts={"w": Count(7, 7), "own": Count(second, second)})
        still = alarm.look([waits(0), moving, waits(2), waits(3)], 0.5, float(second))
    assert [state.rank for state in still if state.is_moving] == [1]
    assert not [
        fault for fault in judge_hang(still, FOUR) if 1 in fault.ranks and fault.confidence is not Confidence.SUSPECT
    ]
