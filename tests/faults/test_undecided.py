"""A run never starts from scratch by accident: when it cannot be told whether a checkpoint exists, restore() raises."""

from __future__ import annotations

import shutil

import pytest
from harness import DaemonProcess, Stage, TrainerProcess, wait_until


def refused(trainer: TrainerProcess) -> dict[str, str]:
    assert trainer.wait(60) == 1
    return trainer.events[-1]


def save(stage: Stage, daemon: DaemonProcess, steps: int = 3) -> None:
    stage.trainer(daemon, "--steps", steps, "--wait", "durable" if daemon.tiers else "staged").finish()


@pytest.mark.slow
def test_a_daemon_that_is_gone_at_restore_leaves_it_undecided(stage: Stage, daemon: DaemonProcess) -> None:
    save(stage, daemon)
    daemon.kill()
    failed = refused(stage.trainer(daemon))
    assert failed["error"] == "RestoreUndecided"
    assert "no answer from the daemon" in failed["message"]


def test_a_daemon_that_dies_amid_the_restore_leaves_it_undecided(stage: Stage, daemon: DaemonProcess) -> None:
    save(stage, daemon)
    daemon.restart(failpoints="restore.before_fetch=kill")
    failed = refused(stage.trainer(daemon))
    assert failed["error"] == "RestoreUndecided"
    fresh = stage.daemon()
    untouched = stage.trainer(fresh, "--steps", 0).wait_event("ready")
    assert failed["hash"] == untouched["hash"]
    daemon.restart()
    assert stage.trainer(daemon, "--steps", 0).wait_event("ready")["restored"] == 3


def test_a_daemon_that_comes_up_while_the_trainer_waits_serves_the_restore(stage: Stage, daemon: DaemonProcess) -> None:
    save(stage, daemon)
    daemon.kill()
    trainer = stage.trainer(daemon, "--steps", 0)
    daemon.restart()
    assert trainer.wait_event("ready")["restored"] == 3


@pytest.mark.parametrize("damage", ["vanished", "not a folder"])
@pytest.mark.slow
def test_a_tier_that_does_not_answer_leaves_the_restore_undecided(
    stage: Stage, tier_daemon: DaemonProcess, damage: str
) -> None:
    """Although memory could answer: a newer checkpoint may be in the tier."""
    save(stage, tier_daemon)
    folder = tier_daemon.folder / "tier"
    shutil.move(folder, tier_daemon.folder / "aside")
    if damage == "not a folder":
        folder.touch()
    failed = refused(stage.trainer(tier_daemon))
    assert failed["error"] == "RestoreUndecided"
    assert "tier" in failed["message"]
    status = tier_daemon.status()["tiers"][0]
    assert not status["is_healthy"]
    folder.unlink(missing_ok=True)
    shutil.move(tier_daemon.folder / "aside", folder)
    again = stage.trainer(tier_daemon, "--steps", 0)
    assert again.wait_event("ready")["restored"] == 3


def test_a_restore_of_a_run_that_nobody_knows_is_none_and_training_starts(
    stage: Stage, tier_daemon: DaemonProcess
) -> None:
    trainer = stage.trainer(tier_daemon, "--steps", 2, "--wait", "durable")
    assert trainer.wait_event("ready")["restored"] is None
    assert trainer.finish()["durable"] == 2


def test_a_step_that_does_not_exist_is_refused_and_not_replaced_by_another(stage: Stage, daemon: DaemonProcess) -> None:
    save(stage, daemon)
    failed = refused(stage.trainer(daemon, "--restore-step", 77))
    assert failed["error"] == "RestoreFailed"
    assert "step 77 of run tiny does not exist" in failed["message"]


def test_ranks_raise_the_same_when_one_of_them_cannot_be_served(stage: Stage) -> None:
    daemon = stage.daemon(memory="128MiB")
    for trainer in stage.ranks(daemon, 2, "--steps", 3, "--wait", "staged"):
        trainer.finish()
    found = [s for s in daemon.status()["slots"] if s["rank"] == 1 and s["state"] == "sealed"]
    wait_until(lambda: not any(s["leases"] for s in daemon.status()["slots"]), "leases to end")
    for slot in found:
        path = daemon.arena / slot["slot"]
        with path.open("r+b") as file:
            file.seek(4096 + 30)
            file.write(b"\xff\xff")
    for trainer in stage.ranks(daemon, 2, "--steps", 3):
        assert refused(trainer)["error"] == "RestoreFailed"
