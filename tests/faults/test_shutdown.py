"""SIGTERM of daemon and trainer: what is staged becomes durable, within the deadline or at the next start."""

from __future__ import annotations

import json
import signal

from harness import DaemonProcess, Stage, wait_until


def manifests(daemon: DaemonProcess, run: str = "tiny") -> list[int]:
    """The committed steps, read from the tier itself: no daemon need run."""
    found = (daemon.folder / "tier" / run).glob("step-*/manifest.json")
    return sorted(json.loads(path.read_text())["snapshot"]["step"] for path in found)


def test_a_daemon_told_to_end_finishes_its_drain_first(stage: Stage) -> None:
    daemon = stage.tier_daemon(failpoints="drain.before=sleep:1.5")
    stage.trainer(daemon, "--steps", 1, "--wait", "staged", "--ignore-close").finish()
    assert manifests(daemon) == []
    assert daemon.terminate() == 0
    assert manifests(daemon) == [1]


def test_a_daemon_out_of_time_says_so_and_the_next_start_finishes_the_drain(stage: Stage) -> None:
    daemon = stage.tier_daemon("--drain-deadline", 0.2, failpoints="drain.before=sleep:3")
    stage.trainer(daemon, "--steps", 1, "--wait", "staged", "--ignore-close").finish()
    assert daemon.terminate() == 3
    assert manifests(daemon) == []
    daemon.restart()
    daemon.wait_mark("tiny", "durable", 1)
    assert manifests(daemon) == [1]
    assert daemon.findings("tiny") == []


def test_a_trainer_told_to_end_leaves_the_drain_to_the_daemon(stage: Stage) -> None:
    daemon = stage.tier_daemon(failpoints="drain.before=sleep:1.5")
    trainer = stage.trainer(daemon, "--steps", 99, "--wait", "staged", "--hold-at", 1)
    trainer.wait_event("holding")
    trainer.signal(signal.SIGTERM)
    assert trainer.wait() == -signal.SIGTERM
    assert manifests(daemon) == []
    daemon.wait_mark("tiny", "durable", 1)
    assert manifests(daemon) == [1]


def test_an_idle_daemon_ends_at_once_and_leaves_no_socket(stage: Stage, daemon: DaemonProcess) -> None:
    stage.trainer(daemon, "--steps", 2, "--wait", "staged").finish()
    assert daemon.terminate() == 0
    assert not daemon.socket.with_name("d.fd.sock").exists()
    daemon.start()
    assert daemon.steps("tiny", state="staged")[0] == 2


def test_a_daemon_ends_although_a_trainer_is_connected_and_takes_it_back(stage: Stage, daemon: DaemonProcess) -> None:
    trainer = stage.trainer(daemon, "--free", "--step-s", 0.01, "--wait", "staged")
    trainer.wait_step(5)
    assert daemon.terminate() == 0
    daemon.start()
    daemon.wait_mark("tiny", "staged", max(trainer.hashes()) + 1)
    trainer.release("end")
    assert trainer.finish()["staged"] == max(trainer.hashes())


def test_readiness_follows_the_tier_and_liveness_does_not(stage: Stage) -> None:
    daemon = stage.tier_daemon(http=True)
    assert daemon.get("/readyz") == (200, "ok\n")
    (daemon.folder / "tier").rename(daemon.folder / "aside")
    status, body = daemon.get("/readyz")
    assert status == 503
    assert "tier" in body
    assert daemon.get("/livez")[0] == 200
    (daemon.folder / "aside").rename(daemon.folder / "tier")
    wait_until(lambda: daemon.get("/readyz")[0] == 200, "the daemon to be ready again")
