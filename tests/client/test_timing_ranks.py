"""Two ranks on gloo: what needs another rank is seen too, and a rank that stands still shows with the other."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from harness import Stage, TrainerProcess, free_port, wait_until

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).with_name("timed_rank.py")


def ranks(stage: Stage, mode: str) -> list[TrainerProcess]:
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    return [stage.script(PROGRAM, mode, env={**job, "RANK": str(rank)}) for rank in range(2)]


def ops(event: dict[str, Any]) -> list[str]:
    return [row[0] for row in event["rows"]]


def test_every_kind_of_caller_is_seen_on_two_ranks(stage: Stage) -> None:
    first, second = ranks(stage, "calls")
    assert first.finish()["problem"] == second.finish()["problem"] == ""
    events = {event["event"]: event for event in first.events}
    theirs = {event["event"]: event for event in second.events}
    assert ops(events["ddp"])[-1] == "all_reduce"
    assert ops(events["fsdp"]) == ["all_gather", "reduce_scatter"]
    assert ops(events["compiled"]) == ["all_reduce", "all_gather"]
    assert [row[:3] for row in events["batch"]["rows"]] == [["send", 1, 1], ["recv", 1, 1]]
    # The third to that rank: both ends count alike, and apart from collectives.
    assert [row[:3] for row in events["send"]["rows"]] == [["send", 1, 3]]
    assert [row[:3] for row in theirs["send"]["rows"]] == [["recv", 0, 3]]
    assert [row[:3] for row in theirs["any_source"]["rows"]] == [["recv", -1, 1]]
    assert "tp" in events["mesh"]["labels"]
    assert [event["pending"] for event in first.events[:-1]] == [0] * (len(first.events) - 1)


def test_who_waits_is_in_the_operation_for_as_long_as_the_other_is_late(stage: Stage) -> None:
    first, second = ranks(stage, "calls")
    [waited], [late] = first.finish() and first.of("late")[0]["rows"], second.finish() and second.of("late")[0]["rows"]
    assert waited[3] - late[3] > 0.1


def test_a_rank_that_is_stopped_shows_in_the_heartbeat_of_the_other(stage: Stage) -> None:
    first, second = ranks(stage, "train")
    first.wait_step(5)
    second.signal(signal.SIGSTOP)

    def stuck() -> dict[str, Any] | None:
        return next((beat for beat in reversed(first.of("beat")) if beat.get("stack")), None)

    beat = wait_until(stuck, "a heartbeat with a stack")
    [pending] = beat["pending"]
    assert pending["op"] == 1
    assert pending["for_seconds"] > 0.5
    count = beat["counts"][0]
    assert int(count["enqueued"]) - int(count["completed"]) == 1
    assert int(count["enqueued"]) == int(pending["seq"])
    assert "timed_rank.py" in beat["stack"]
    beats = len(second.of("beat"))
    second.signal(signal.SIGCONT)
    step = int(beat["step"])
    first.wait_step(step + 3)
    wait_until(lambda: not first.of("beat")[-1].get("stack"), "a heartbeat without a stack")
    wait_until(lambda: len(second.of("beat")) > beats, "the other's heartbeat")
