"""Recordings are judged in their order, as they would have been live."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from timeline_files import write_layout

from ckptd.detect.layout import Layout
from ckptd.detect.records import Communicator, Confidence, Count, Kind, Pending, RankState, Timings
from ckptd.errors import Corrupt, InvalidRequest
from ckptd.format.timings import POSITIONS, SAMPLE, SELF, Op, Rows
from ckptd.replay.judging import judge_file, judge_recording, judge_timings
from ckptd.replay.recording import Recording, write_recording

RANKS = 16
LAYOUT = Layout.from_sizes(RANKS, 1, 1)
NODES = tuple(f"node{rank}" for rank in range(RANKS))
WORLD = Communicator("world", tuple(range(RANKS)))


def steps_of(self_s: np.ndarray, first: int = 0) -> dict[int, Rows]:
    """SELF rows by rank of seconds (steps, ranks), a step of 2 s each, spread over all positions."""
    steps = {}
    for rank, seconds in enumerate(self_s.T):
        rows = np.zeros(len(seconds), SELF)
        rows["step"] = first + np.arange(len(seconds))
        rows["length_s"] = 2.0
        rows["self_s"] = seconds
        rows["gaps_s"] = seconds[:, None] / POSITIONS
        steps[rank] = rows
    return steps


def noise(steps: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(1.0, 0.01, (steps, RANKS))


def recording(self_s: np.ndarray, states: tuple[RankState, ...] = ()) -> Recording:
    return Recording(Timings(RANKS, NODES, steps_of(self_s)), LAYOUT, states, {"world": WORLD}, "run")


def stuck(rank: int, for_s: float) -> RankState:
    pending = Pending("world", 41, Op.ALL_REDUCE, 1 << 20, for_s=for_s)
    return RankState(rank, NODES[rank], {"world": Count(41, 40)}, (pending,), step=9)


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_recording_has_no_fault(seed: int) -> None:
    assert judge_recording(recording(noise(60, seed))) == []


def test_a_slow_rank_is_told_once_with_the_step_it_was_first_seen_in() -> None:
    self_s = noise(100)
    self_s[40:, 5] *= 1.3
    (fault,) = judge_recording(recording(self_s))
    assert (fault.kind, fault.ranks, fault.confidence) == (Kind.SLOW_COMPUTE, (5,), Confidence.CONFIRMED)
    # The windows that found it may begin before.
    assert 0 <= fault.since_step <= 45


def test_a_fault_that_was_over_before_the_end_is_told_all_the_same() -> None:
    self_s = noise(190)
    self_s[20:60, 5] *= 1.3
    faults = judge_recording(recording(self_s))
    assert [(fault.ranks, fault.confidence) for fault in faults] == [((5,), Confidence.CONFIRMED)]
    assert faults[0].evidence["window"][1] < 190


def test_a_recording_longer_than_what_is_kept_live_is_judged_from_its_begin() -> None:
    self_s = noise(500)
    self_s[20:100, 5] *= 1.3
    assert [fault.ranks for fault in judge_recording(recording(self_s))] == [(5,)]


def test_what_stood_still_when_it_was_recorded_is_judged_by_how_long_it_had() -> None:
    waiting = tuple(stuck(rank, 60.0) for rank in range(RANKS) if rank != 3)
    absent = RankState(3, NODES[3], {"world": Count(40, 40)}, step=9)
    (fault,) = judge_recording(recording(noise(30), (*waiting, absent)))
    assert (fault.kind, fault.ranks) == (Kind.HANG, (3,))


def test_operations_in_flight_are_no_hang() -> None:
    assert judge_recording(recording(noise(30), tuple(stuck(rank, 0.5) for rank in range(RANKS)))) == []


def test_a_rank_that_had_died_is_named_and_not_those_that_followed() -> None:
    lost = "RuntimeError: Connection closed by peer"
    states = tuple(
        RankState(
            rank, NODES[rank], is_dead=rank == 7, gone_s=100.0 if rank == 7 else 100.1, error="" if rank == 7 else lost
        )
        for rank in range(RANKS)
    )
    (fault,) = judge_recording(recording(noise(30), states))
    assert (fault.kind, fault.ranks) == (Kind.DEATH, (7,))


def test_samples_of_a_slow_communicator_are_judged_too() -> None:
    """Two groups of eight nodes each; the second one takes twice as long from step 100 on."""
    groups = [Communicator(f"g{g}", tuple(range(8 * g, 8 * g + 8)), "dp") for g in range(2)]
    steps = 200
    random = np.random.default_rng(1)
    samples = {}
    for rank in range(RANKS):
        rows = np.zeros(steps, SAMPLE)
        rows["step"], rows["seq"] = np.arange(steps), np.arange(1, steps + 1)
        rows["op"], rows["peer"], rows["size_bytes"] = Op.ALL_REDUCE, -1, 1 << 24
        is_slow = (rank >= 8) & (np.arange(steps) >= 100)
        rows["duration_s"] = random.normal(0.1, 0.002, steps) * np.where(is_slow, 2.0, 1.0)
        samples[rank] = rows
    tables = {rank: {0: groups[rank // 8]} for rank in range(RANKS)}
    faults = judge_timings(Timings(RANKS, NODES, steps_of(noise(steps)), samples, tables), LAYOUT)
    assert {fault.kind for fault in faults} == {Kind.SLOW_COMM}


def test_the_clock_of_the_machine_plays_no_part() -> None:
    self_s = noise(100)
    self_s[40:, 5] *= 1.3
    assert judge_recording(recording(self_s)) == judge_recording(recording(self_s))


def test_a_file_of_any_kind_is_judged_as_what_it_is(tmp_path: Path) -> None:
    self_s = noise(60)
    self_s[:, 5] *= 1.3
    path = tmp_path / "x.ckptd-timings"
    whole = recording(self_s)
    write_recording(path, whole)
    assert judge_file(path) == judge_recording(whole)
    assert [fault.ranks for fault in judge_file(path)] == [(5,)]


def test_a_layout_file_takes_the_place_of_the_recorded_one(tmp_path: Path) -> None:
    """Sixteen stages: nobody has a peer, and what is slower from the start may be meant to be."""
    self_s = noise(60)
    self_s[:, 5] *= 1.3
    path = tmp_path / "x.ckptd-timings"
    write_recording(path, recording(self_s))
    given = write_layout(tmp_path / "layout.yaml", dp_size=1, pp_size=16)
    assert judge_file(path, given) == []
    other = write_layout(tmp_path / "other.yaml", dp_size=2, pp_size=2)
    with pytest.raises(InvalidRequest, match="4 ranks, the recording 16"):
        judge_file(path, other)


def test_what_is_no_recording_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="is not there"):
        judge_file(tmp_path / "absent")
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    with pytest.raises(InvalidRequest, match="is no recording"):
        judge_file(text)
    timeline = tmp_path / "x.parquet"
    timeline.write_text("hello")
    with pytest.raises(InvalidRequest) as caught:
        judge_file(timeline)
    assert "--layout" in caught.value.hint
    damaged = tmp_path / "x.ckptd-timings"
    damaged.write_text("hello")
    with pytest.raises(Corrupt):
        judge_file(damaged)
    with pytest.raises(InvalidRequest):
        judge_file(tmp_path / "folder")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InvalidRequest):
        judge_file(tmp_path / "folder")
