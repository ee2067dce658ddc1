"""Tensors that change while they are copied: the snapshot is discarded and says which; after the copy they may."""

from __future__ import annotations

import pytest
from harness import DaemonProcess, Stage

WHOLE = {"CKPTD_TORN_CHECK": "all"}


@pytest.mark.parametrize("way", ["during", "versioned"])
def test_a_weight_changed_while_it_is_copied_is_named_and_the_snapshot_discarded(
    stage: Stage, daemon: DaemonProcess, way: str
) -> None:
    """By writes that raise no version counter all through the copy, and by one that does before it."""
    slow = {"failpoints": "copy.piece=sleep:0.1", "env": WHOLE}
    trainer = stage.trainer(daemon, "--steps", 1, "--wait", "staged", "--half", "--mutate", way, **slow)
    assert trainer.finish()["staged"] == -1
    (event,) = trainer.of("step")
    assert event["error"].startswith("Torn: ")
    assert "was changed while it was copied" in event["error"]
    assert "model" in event["error"]
    assert daemon.steps("tiny") == []
    assert all(s["state"] != "writing" for s in daemon.status()["slots"])


def test_a_weight_changed_after_the_copy_is_the_next_snapshots_matter(stage: Stage, daemon: DaemonProcess) -> None:
    trainer = stage.trainer(daemon, "--steps", 4, "--wait", "staged", "--mutate", "after", env=WHOLE)
    assert trainer.finish()["staged"] == 4
    assert all(e["error"] is None for e in trainer.of("step"))
    again = stage.trainer(daemon, "--steps", 0)
    assert again.wait_event("ready")["hash"] == trainer.hashes()[4]


def test_an_optimizer_step_amid_a_slow_copy_waits_and_tears_nothing(stage: Stage, daemon: DaemonProcess) -> None:
    trainer = stage.trainer(daemon, "--steps", 12, "--half", failpoints="copy.piece=sleep:0.05", env=WHOLE)
    staged = trainer.finish()["staged"]
    assert staged > 0
    assert not any("Torn" in (e["error"] or "") for e in trainer.of("step"))
    again = stage.trainer(daemon, "--steps", 0, "--half")
    assert again.wait_event("ready")["hash"] == trainer.hashes()[staged]
