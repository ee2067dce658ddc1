"""ENOSPC in a tier and in shared memory: a clear reason, training goes on, the next due step tries again."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

import pytest
from harness import DaemonProcess, Stage, TrainerProcess, wait_until

NAMESPACE = ("unshare", "--mount", "--propagation", "private")
_CAN_MOUNT = subprocess.run([*NAMESPACE, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False)
needs_mounts = pytest.mark.skipif(_CAN_MOUNT.returncode != 0, reason="may not mount in a namespace of its own")
FREE = ("--free", "--step-s", 0.01)


def on_small_mount(size: str) -> Sequence[str]:
    """A command prefix that gives what runs a file system of ``size`` at /mnt, seen by nobody else."""
    return [*NAMESPACE, "sh", "-c", f'mount -t tmpfs -o size={size} none /mnt && exec "$@"', "sh"]


def inside(daemon: DaemonProcess, *command: str) -> None:
    """Run a command where the daemon's mount is to be seen."""
    subprocess.run(["nsenter", "-t", str(daemon.pid), "-m", *command], check=True, capture_output=True)


def lost(trainer: TrainerProcess) -> list[str]:
    """Why snapshots were lost, but for those due while one before was still being given up."""
    errors = [e["error"] for e in trainer.of("step") if not (e["error"] or "").startswith("CaptureBusy")]
    assert errors
    return errors


@needs_mounts
def test_a_full_tier_is_named_and_written_again_once_there_is_room(stage: Stage) -> None:
    daemon = stage.daemon(tiers=["file:///mnt/tier,every=1,keep=100"], prefix=on_small_mount("600k"))
    trainer = stage.trainer(daemon, *FREE, "--wait", "durable")

    def failures() -> list[str]:
        marks = daemon.run_status("tiny").get("watermarks", {"not_durable": []})
        return [o["reason"] for o in marks["not_durable"] if o["error"] == "DrainFailed"]

    wait_until(failures, "a drain to fail")
    assert "No space left on device" in failures()[-1]
    durable = daemon.watermark("tiny", "durable")
    assert durable is not None  # what fitted was committed
    daemon.wait_mark("tiny", "staged", max(trainer.hashes()) + 1)  # snapshots go on in memory
    # Again and again: the daemon goes on trying, and a folder that it writes into is not empty.
    inside(daemon, "sh", "-c", "until rm -rf /mnt/tier/tiny/step-*; do sleep 0.1; done")
    daemon.wait_mark("tiny", "durable", durable + 1)
    inside(daemon, "mount", "-o", "remount,size=64m", "/mnt")
    trainer.release("end")
    assert trainer.finish()["durable"] == max(trainer.hashes())
    assert not any(e["skipped"] and "space" in e["skipped"] for e in trainer.of("step"))
    assert not [f for f in daemon.findings("tiny") if "CRC" in f]


def test_an_error_amid_a_drain_gives_up_that_step_and_the_next_is_durable(stage: Stage) -> None:
    daemon = stage.tier_daemon(failpoints="tier.after_array=raise@3")
    trainer = stage.trainer(daemon, "--steps", 6, "--wait", "durable")
    assert trainer.finish()["durable"] == 6
    failed = [e["error"] for e in trainer.of("step") if e["error"]]
    assert len(failed) == 1
    assert failed[0].startswith("DrainFailed: step ")
    assert "No space left on device" in failed[0]
    assert len(daemon.steps("tiny", "tier", "durable")) == 5
    assert daemon.findings("tiny") == []


@needs_mounts
def test_shared_memory_that_is_full_kills_the_step_and_the_next_due_one_tries_again(stage: Stage) -> None:
    daemon = stage.daemon("--arena", "/mnt/arena", memory="8MiB", prefix=on_small_mount("9m"))
    inside(daemon, "sh", "-c", "head -c 10m /dev/zero > /mnt/filler; truncate -s -80k /mnt/filler")
    trainer = stage.trainer(daemon, "--steps", 3, "--wait", "staged", "--hold-at", 2)
    trainer.wait_event("holding")
    for error in lost(trainer):
        assert error.startswith("StepDead: step ")
        assert "no shared memory for a slot of" in error
        assert "No space left on device" in error
    assert daemon.status()["slots"] == []
    inside(daemon, "rm", "/mnt/filler")
    trainer.release(2)
    assert trainer.finish()["staged"] == 3


def test_a_slot_that_cannot_be_allocated_leaves_no_file_behind(stage: Stage) -> None:
    daemon = stage.daemon(failpoints="arena.allocate=raise")
    trainer = stage.trainer(daemon, "--steps", 3, "--wait", "staged")
    assert trainer.finish()["staged"] == -1
    assert all("free shared memory" in error for error in lost(trainer))
    assert daemon.slot_files() == []
    assert daemon.status()["used_bytes"] == 0
    daemon.restart()
    again = stage.trainer(daemon, "--steps", 2, "--wait", "staged")
    assert again.finish()["staged"] == 2


def test_a_state_larger_than_all_memory_is_skipped_with_the_size_it_needs(stage: Stage) -> None:
    daemon = stage.daemon(memory="1MiB")
    trainer = stage.trainer(daemon, "--steps", 2, "--width", 512, "--wait", "staged")
    assert trainer.finish()["staged"] == -1
    for error in lost(trainer):
        assert "needs a slot of" in error
        assert "--memory" in error
