"""Runs side by side, incarnations over one another, and branches that were abandoned on purpose."""

from __future__ import annotations

import shutil

import pytest
from harness import DaemonProcess, Stage, TrainerProcess, wait_until


def save(stage: Stage, daemon: DaemonProcess, *args: object) -> TrainerProcess:
    trainer = stage.trainer(daemon, "--wait", "durable" if daemon.tiers else "staged", *args)
    trainer.finish()
    return trainer


def restored(stage: Stage, daemon: DaemonProcess, *args: object) -> dict[str, object]:
    trainer = stage.trainer(daemon, "--steps", 0, *args)
    ready = trainer.wait_event("ready")
    trainer.finish()
    return ready


def wipe_memory(daemon: DaemonProcess) -> None:
    daemon.kill()
    shutil.rmtree(daemon.arena)
    daemon.restart()


def test_two_runs_of_the_same_tensors_never_mix(stage: Stage, tier_daemon: DaemonProcess) -> None:
    one = stage.trainer(tier_daemon, "--run", "one", "--wait", "durable", "--steps", 6)
    two = stage.trainer(tier_daemon, "--run", "two", "--wait", "durable", "--steps", 4)
    one.finish()
    two.finish()
    for run, trainer, step in (("one", one, 6), ("two", two, 4)):
        for source in ("memory", "tier"):
            ready = restored(stage, tier_daemon, "--run", run, "--source", source)
            assert (ready["restored"], ready["hash"]) == (step, trainer.hashes()[step])
        assert tier_daemon.findings(run) == []
    assert restored(stage, tier_daemon, "--run", "three")["restored"] is None


def test_an_old_incarnation_goes_on_draining_while_a_new_one_runs(stage: Stage) -> None:
    daemon = stage.tier_daemon(slots=4, failpoints="drain.before=sleep:1@1")
    old = stage.trainer(daemon, "--steps", 3, "--wait", "staged", "--ignore-close")
    old.finish()
    new = stage.trainer(daemon, "--steps", 6, "--wait", "staged")
    assert new.wait_event("ready")["restored"] == 3
    new.finish()
    daemon.wait_mark("tiny", "durable", 6)
    committed = [(r["snapshot"]["incarnation"].split("-")[0], r["snapshot"]["step"]) for r in daemon.rows("tiny")]
    assert ("1", 1) in committed  # what was being drained when its trainer went
    assert ("2", 6) in committed
    assert daemon.findings("tiny") == []


@pytest.mark.parametrize("is_wiped", [False, True])
def test_a_branch_left_on_purpose_does_not_come_back(stage: Stage, tier_daemon: DaemonProcess, is_wiped: bool) -> None:
    """Also when all memory is lost: the tier has the records of the incarnations."""
    first = save(stage, tier_daemon, "--steps", 6)
    back = stage.trainer(tier_daemon, "--restore-step", 3, "--crash-after-restore")
    assert back.wait_event("ready")["hash"] == first.hashes()[3]
    assert back.wait() == 9
    if is_wiped:
        wipe_memory(tier_daemon)
    ready = restored(stage, tier_daemon)
    assert (ready["restored"], ready["hash"]) == (3, first.hashes()[3])
    # The abandoned steps are still there for whoever names one.
    assert restored(stage, tier_daemon, "--restore-step", 6)["hash"] == first.hashes()[6]


def test_a_new_branch_wins_over_later_steps_of_the_abandoned_one(stage: Stage, tier_daemon: DaemonProcess) -> None:
    save(stage, tier_daemon, "--steps", 8)
    branch = save(stage, tier_daemon, "--steps", 4, "--restore-step", 2)
    for _ in range(2):
        assert restored(stage, tier_daemon)["hash"] == branch.hashes()[4]
        wipe_memory(tier_daemon)


def test_after_three_resumes_that_made_nothing_the_older_snapshot_is_tried(
    stage: Stage, tier_daemon: DaemonProcess
) -> None:
    saved = save(stage, tier_daemon, "--steps", 4)
    for _ in range(3):
        crash = stage.trainer(tier_daemon, "--crash-after-restore")
        assert crash.wait_event("ready")["restored"] == 4
        assert crash.wait() == 9
    ready = restored(stage, tier_daemon)
    assert (ready["restored"], ready["hash"]) == (3, saved.hashes()[3])


def test_a_restore_from_the_tier_needs_no_slot_of_those_that_wait_for_its_decision(stage: Stage) -> None:
    """All slots of the rank are sealed, memory has room for no more, and the tier is asked for."""
    daemon = stage.tier_daemon(memory="500KiB")
    saved = save(stage, daemon, "--steps", 5)
    daemon.restart()
    stage.trainer(daemon, "--steps", 0, "--no-restore").finish()
    assert restored(stage, daemon, "--source", "tier")["hash"] == saved.hashes()[5]


def test_a_stale_job_of_an_older_incarnation_is_told_to_end(stage: Stage, daemon: DaemonProcess) -> None:
    old = stage.trainer(daemon, "--free", "--step-s", 0.01)
    old.wait_step(3)
    save(stage, daemon, "--steps", 5, "--no-restore")
    wait_until(lambda: "gone on to incarnation" in old.stderr, "the old job to be told")
    daemon.restart()  # it has to join again, and may not
    wait_until(lambda: "gone on to incarnation" in (old.of("step")[-1]["skipped"] or ""), "the old job to be refused")
    old.release("end")
    old.finish()
    assert restored(stage, daemon)["restored"] == 5


def test_a_halted_trainer_that_wakes_up_does_not_write_into_its_successors_slots(stage: Stage) -> None:
    daemon = stage.daemon(slots=2)
    old = stage.trainer(daemon, "--steps", 3, "--wait", "staged", "--half", failpoints="copy.piece=stop@6")
    wait_until(lambda: old.is_stopped, "the old trainer to halt amid a copy")
    new = save(stage, daemon, "--steps", 9, "--half")
    old.cont()
    old.wait()
    assert daemon.findings("tiny") == []
    ready = restored(stage, daemon, "--half")
    assert (ready["restored"], ready["hash"]) == (9, new.hashes()[9])
    assert len(daemon.slot_files()) == len(daemon.status()["slots"])
