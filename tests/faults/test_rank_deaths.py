"""SIGKILL of a rank at every phase of a save: what was complete comes back bit by bit, and nothing leaks."""

from __future__ import annotations

import pytest
from harness import DaemonProcess, Stage, wait_until

STEPS = 8
# The 5th save dies; with two segments a save has several pieces, so the 14th passage is amid one.
PHASES = ("client.before_begin=kill@5", "copy.piece=kill@14", "client.before_seal=kill@5", "client.after_seal=kill@5")


@pytest.mark.parametrize("phase", PHASES)
def test_a_rank_killed_while_it_saves_is_restored_from_a_complete_step(
    stage: Stage, daemon: DaemonProcess, phase: str
) -> None:
    reference = stage.trainer(daemon, "--run", "reference", "--steps", STEPS, "--no-restore", "--half")
    reference.finish()
    victim = stage.trainer(daemon, "--wait", "staged", "--half", failpoints=phase)
    assert victim.wait() == -9
    saved = max(victim.hashes())
    expected = 5 if phase.startswith("client.after_seal") else saved

    again = stage.trainer(daemon, "--wait", "staged", "--half")
    ready = again.wait_event("ready")
    assert ready["restored"] == expected
    assert ready["hash"] == reference.hashes()[expected]
    assert again.finish()["staged"] == STEPS
    assert again.hashes()[STEPS] == reference.hashes()[STEPS]
    slots = [s for s in daemon.status()["slots"] if s["run"] == "tiny"]
    assert not [s for s in slots if s["state"] == "writing"]
    assert len(slots) <= 3
    wait_until(lambda: not any(s["leases"] for s in daemon.status()["slots"]), "leases to end")


@pytest.mark.parametrize("phase", [PHASES[0], *(pytest.param(phase, marks=pytest.mark.slow) for phase in PHASES[1:])])
def test_one_of_two_ranks_killed_while_it_saves_takes_neither_off_a_complete_step(stage: Stage, phase: str) -> None:
    daemon = stage.daemon("--stage-deadline", 0.2)
    dying = {1: {"CKPTD_FAILPOINTS": phase}}
    survivor, victim = stage.ranks(daemon, 2, "--wait", "staged", "--half", envs=dying)
    assert victim.wait() == -9
    survivor.finish()  # its training goes on alone: its later steps are dead
    assert "not sealed by rank 1" in survivor.of("step")[-1]["error"]
    complete = daemon.steps("tiny", state="staged")
    assert complete

    daemon.set_flag("--stage-deadline", 60)
    again = stage.ranks(daemon, 2, "--wait", "staged", "--half")
    for trainer, before in zip(again, (survivor, victim), strict=True):
        ready = trainer.wait_event("ready")
        assert ready["restored"] == max(complete)
        if ready["restored"] in before.hashes():
            assert ready["hash"] == before.hashes()[ready["restored"]]
    for trainer in again:
        assert trainer.finish()["staged"] == STEPS


def test_ranks_killed_again_and_again_leak_no_slot(stage: Stage, daemon: DaemonProcess) -> None:
    for number in range(1, 7):
        phase = ("copy.piece=kill@4", "client.before_seal=kill@2", "client.after_seal=kill@2")[number % 3]
        assert stage.trainer(daemon, "--wait", "staged", "--steps", 4 * number, failpoints=phase).wait() == -9
    last = stage.trainer(daemon, "--wait", "staged", "--steps", 40)
    assert last.wait_event("ready")["restored"] > 3
    assert last.finish()["staged"] == 40
    slots = daemon.status()["slots"]
    assert len(slots) <= 3
    assert len(daemon.slot_files()) == len(slots)
    assert not any(s["state"] == "writing" for s in slots)
