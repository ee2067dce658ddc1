"""SIGKILL and SIGSTOP of the daemon at every phase of begin, seal, drain and commit: training goes on, clients come
back, what was sealed is adopted, drains resume, and every checkpoint is committed once."""

from __future__ import annotations

from typing import Any

import pytest
from harness import DaemonProcess, Stage, TrainerProcess, wait_until

PHASES = [
    "begin.before@4",
    "begin.after@4",
    "seal.before_checksum@4",
    "seal.before_table@4",
    "seal.before_flip@4",
    "seal.after_flip@4",
    "seal.before_report@4",
    "seal.after_report@4",
    "drain.before@2",
    "tier.before_array@3",
    "tier.after_array@3",
    "tier.before_index@2",
    "drain.after@2",
    "tier.before_manifest@2",
    "tier.after_manifest@2",
]
# Run always; the others in `make test-all`.
DEFAULT = {
    "kill": ("begin.after", "seal.before_table", "drain.before", "tier.after_m"),
    "cont": ("seal.before_flip", "tier.before_manifest"),
    "stop-kill": ("seal.before_report",),
}
LONGEST_STEP_S = 6.0  # the fence's 2 s and much room for a slow machine; never the minutes of an RPC
FREE = ("--free", "--step-s", 0.01, "--wait", "durable")


def phases(way: str) -> list[Any]:
    return [p if p.startswith(DEFAULT[way]) else pytest.param(p, marks=pytest.mark.slow) for p in PHASES]


def failpoint(phase: str, action: str) -> str:
    name, _, nth = phase.partition("@")
    return f"{name}={action}@{nth}"


def steps_of(trainer: TrainerProcess) -> int:
    return max(trainer.hashes(), default=0)


def trains_on(trainer: TrainerProcess, steps: int = 20) -> None:
    """Wait until the trainer has done so many steps more."""
    trainer.wait_step(steps_of(trainer) + steps)


def snapshots_go_on(daemon: DaemonProcess, trainer: TrainerProcess) -> None:
    """Wait until a step that is still to come is staged."""
    daemon.wait_mark("tiny", "staged", steps_of(trainer) + 1)


def check_end(stage: Stage, daemon: DaemonProcess, trainer: TrainerProcess) -> None:
    """The trainer ends well with a durable step; every checkpoint exists once and is whole; a restore is bit-exact."""
    trainer.release("end")
    last = trainer.finish()
    assert last["durable"] == last["staged"] == steps_of(trainer)
    assert max(e["seconds"] for e in trainer.of("step")) < LONGEST_STEP_S
    wait_until(lambda: not any(s["leases"] for s in daemon.status()["slots"]), "drains to end")
    committed = daemon.steps("tiny", "tier", "durable")
    assert len(committed) == len(set(committed))
    assert last["durable"] in committed
    assert daemon.findings("tiny") == []
    again = stage.trainer(daemon, "--steps", 0)
    ready = again.wait_event("ready")
    assert (ready["restored"], ready["hash"]) == (last["staged"], trainer.hashes()[last["staged"]])
    again.finish()
    again = stage.trainer(daemon, "--steps", 0, "--source", "tier")
    assert again.wait_event("ready")["hash"] == ready["hash"]
    again.finish()


@pytest.mark.parametrize("phase", phases("kill"))
def test_training_goes_on_through_a_daemon_killed_at(stage: Stage, phase: str) -> None:
    daemon = stage.tier_daemon(failpoints=failpoint(phase, "kill"))
    trainer = stage.trainer(daemon, *FREE)
    assert daemon.wait_exit() == -9
    trains_on(trainer)
    daemon.restart()
    snapshots_go_on(daemon, trainer)
    assert "joined again" in trainer.stderr
    check_end(stage, daemon, trainer)


@pytest.mark.parametrize("phase", phases("cont"))
def test_training_goes_on_through_a_daemon_stopped_and_continued_at(stage: Stage, phase: str) -> None:
    daemon = stage.tier_daemon(failpoints=failpoint(phase, "stop"))
    trainer = stage.trainer(daemon, *FREE)
    wait_until(lambda: daemon.is_stopped, "the daemon to stop itself")
    trains_on(trainer)
    daemon.cont()
    snapshots_go_on(daemon, trainer)
    check_end(stage, daemon, trainer)


@pytest.mark.parametrize("phase", phases("stop-kill"))
def test_training_goes_on_through_a_daemon_stopped_and_then_killed_at(stage: Stage, phase: str) -> None:
    daemon = stage.tier_daemon(failpoints=failpoint(phase, "stop"))
    trainer = stage.trainer(daemon, *FREE)
    wait_until(lambda: daemon.is_stopped, "the daemon to stop itself")
    trains_on(trainer)
    daemon.restart()
    snapshots_go_on(daemon, trainer)
    check_end(stage, daemon, trainer)


@pytest.mark.slow
def test_a_daemon_halted_longer_than_the_silence_a_client_bears_is_joined_again(stage: Stage) -> None:
    daemon = stage.tier_daemon()
    trainer = stage.trainer(daemon, *FREE)
    trainer.wait_step(5)
    daemon.stop()
    wait_until(lambda: "no daemon answers" in (trainer.of("step")[-1]["skipped"] or ""), "the client to miss it")
    trains_on(trainer)
    daemon.cont()
    snapshots_go_on(daemon, trainer)
    check_end(stage, daemon, trainer)
