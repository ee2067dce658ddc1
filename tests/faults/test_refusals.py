"""What cannot work is refused in one clear line with the right exit code, before anything is touched."""

from __future__ import annotations

import shutil

import pytest
from harness import CliResult, DaemonProcess, Stage, run_cli

SCRIPT = """
import torch
from torch import nn
from ckptd_client import Checkpointer
from ckptd.errors import CkptdError
from tiny_trainer import emit
width, dtype, names = {model}
model = nn.ModuleDict({{name: nn.Linear(width, 2, dtype=getattr(torch, dtype)) for name in names}})
before = [p.clone() for p in model.parameters()]
with Checkpointer({{"model": model}}, run="tiny", every=1) as ckpt:
    try:
        restored = ckpt.restore()
    except CkptdError as error:
        same = all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
        emit("failed", error=type(error).__name__, message=str(error), same=same)
    else:
        if restored is None:
            ckpt.save(1).wait("staged", 20)
        emit("ready", restored=restored.step if restored else None)
"""


def refused(result: CliResult, rc: int, *words: str) -> None:
    """Exit code ``rc``, nothing on stdout, and a line on stderr that has ``words`` (with a hint: one more)."""
    assert result.rc == rc, result
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 2, result.stderr
    for word in words:
        assert word in result.stderr, result.stderr


def test_a_budget_beyond_the_machine_is_refused_with_the_fix(stage: Stage) -> None:
    daemon = stage.daemon(memory="900TiB", wait=False)
    assert daemon.wait_exit() == 1
    assert "--memory asks for" in daemon.log
    assert "lower --memory" in daemon.log
    assert "Traceback" not in daemon.log
    assert len(daemon.log.strip().splitlines()) <= 2, daemon.log


def test_a_daemon_with_slots_to_adopt_never_refuses_its_budget(stage: Stage) -> None:
    daemon = stage.daemon()
    stage.trainer(daemon, "--steps", 2, "--wait", "staged").finish()
    daemon.kill()
    daemon._command[daemon._command.index("--memory") + 1] = "900TiB"
    daemon.start()
    assert any("no new slots" in problem for problem in daemon.status()["problems"])
    again = stage.trainer(daemon, "--steps", 5, "--wait", "staged")
    assert again.wait_event("ready")["restored"] == 2
    assert again.finish()["staged"] == 5


def test_a_second_daemon_on_the_same_arena_is_refused(daemon: DaemonProcess) -> None:
    other = daemon.folder / "other.sock"
    refused(
        run_cli("serve", "--socket", other, "--arena", daemon.arena, "--memory", "8MiB"),
        1,
        "is in use by another daemon",
    )
    assert daemon.status()["pid"] == daemon.pid


def test_a_second_daemon_on_the_same_socket_is_refused(daemon: DaemonProcess, stage: Stage) -> None:
    arena = daemon.arena.with_name(daemon.arena.name + "-b")
    stage.on_close(lambda: shutil.rmtree(arena, ignore_errors=True))
    refused(
        run_cli("serve", "--socket", daemon.socket, "--arena", arena, "--memory", "8MiB"), 2, "another daemon answers"
    )
    assert daemon.status()["pid"] == daemon.pid
    stage.trainer(daemon, "--steps", 2, "--wait", "staged").finish()  # it still hands over its slots


@pytest.mark.parametrize(
    ("tier", "rc", "words"),
    [
        ("ftp://host/x", 2, "ftp"),
        ("file://relative/x", 2, "file"),
        ("file:///dev/null/x", 1, "/dev/null"),
        ("file:///tmp/x,every=never", 2, "every"),
        ("file:///tmp/x,colour=blue", 2, "colour"),
    ],
)
def test_a_tier_that_cannot_be_is_refused_at_start(stage: Stage, tier: str, rc: int, words: str) -> None:
    daemon = stage.daemon(tiers=[tier], wait=False)
    assert daemon.wait_exit() == rc, daemon.log
    assert words in daemon.log
    assert "Traceback" not in daemon.log
    assert len(daemon.log.strip().splitlines()) <= 2, daemon.log


def test_verbs_name_runs_and_steps_that_are_not_there(stage: Stage, daemon: DaemonProcess) -> None:
    stage.trainer(daemon, "--steps", 2, "--wait", "staged").finish()
    for verb in ("ls", "verify", "prune"):
        refused(daemon.cli(verb, "nobody"), 5, "nobody")
    refused(daemon.cli("show", "tiny", 99), 5, "99")
    refused(daemon.cli("verify", "tiny", 99), 5, "99")
    refused(run_cli("status", "--socket", daemon.folder / "no.sock"), 6, "no.sock")


@pytest.mark.parametrize(
    ("name", "saved", "loaded", "words"),
    [
        ("name", (4, "float32", "ab"), (4, "float32", "ac"), "c."),
        ("shape", (4, "float32", "ab"), (5, "float32", "ab"), "5"),
        ("dtype", (4, "float32", "ab"), (4, "float64", "ab"), "float64"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_in_one_line_and_not_touched(
    stage: Stage, daemon: DaemonProcess, name: str, saved: object, loaded: object, words: str
) -> None:
    trainers = []
    for number, model in enumerate((saved, loaded)):
        script = daemon.folder / f"script{number}.py"
        script.write_text(SCRIPT.format(model=model))
        trainers.append(stage.script(script, daemon=daemon, env={"PYTHONPATH": "tests"}))
        trainers[-1].wait()
    failed = trainers[-1].wait_event("failed")
    assert failed["error"] == "StateMismatch"
    assert words in failed["message"]
    assert "\n" not in failed["message"]
    assert failed["same"]


def test_another_number_of_ranks_is_refused_and_the_number_that_fits_is_named(stage: Stage) -> None:
    daemon = stage.daemon(memory="128MiB")
    for trainer in stage.ranks(daemon, 2, "--steps", 3, "--wait", "staged"):
        trainer.finish()
    alone = stage.trainer(daemon)
    assert alone.wait() == 1
    failed = alone.events[-1]
    assert failed["error"] == "StateMismatch"
    assert "saved by 2 ranks, this job has 1" in failed["message"]
    for trainer in stage.ranks(daemon, 2, "--steps", 0):
        assert trainer.wait_event("ready")["restored"] == 3
