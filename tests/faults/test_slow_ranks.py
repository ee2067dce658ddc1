"""Ranks delayed at random, without collectives to hold them together: snapshots go on completing to the end."""

from __future__ import annotations

import pytest
from harness import DaemonProcess, Stage


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_snapshots_complete_to_the_end_when_ranks_are_delayed_at_random(stage: Stage, seed: int) -> None:
    """Three ranks drift apart for hundreds of steps, snapshots due at every second one; near the end they are still
    being staged, and all ranks restore the same step bit by bit."""
    daemon = stage.daemon("--stage-deadline", 2, memory="128MiB")
    steps = 240
    ranks = stage.ranks(daemon, 3, "--steps", steps, "--every", 2, "--jitter-s", 0.02, "--seed", seed)
    for trainer in ranks:
        trainer.wait(60)
        assert trainer.returncode == 0, trainer.stderr
    staged = daemon.steps("tiny", state="staged")
    assert staged
    assert max(staged) > steps - 60
    again = stage.ranks(daemon, 3, "--steps", 0)
    for trainer, before in zip(again, ranks, strict=True):
        ready = trainer.wait_event("ready")
        assert ready["restored"] == max(staged)
        assert ready["hash"] == before.hashes()[max(staged)]


def test_a_rank_that_is_always_slower_lets_snapshots_complete(stage: Stage, daemon: DaemonProcess) -> None:
    ranks = stage.ranks(
        daemon, 2, "--steps", 40, "--wait", "staged", envs={1: {"CKPTD_FAILPOINTS": "copy.piece=sleep:0.01"}}
    )
    for trainer in ranks:
        assert trainer.finish()["staged"] == 40
    assert sum(e["error"] is None for e in ranks[0].of("step")) > 30


def test_a_rank_stopped_amid_a_save_and_continued_joins_in_again(stage: Stage) -> None:
    """The others pass it by: the step it holds up dies by the deadline, and later ones complete once it is back."""
    daemon = stage.daemon("--stage-deadline", 0.5)
    stopping = {1: {"CKPTD_FAILPOINTS": "client.before_seal=stop@3"}}
    first, second = stage.ranks(daemon, 2, "--steps", 12, "--wait", "staged", "--hold-at", 6, envs=stopping)
    first.wait_event("holding")
    assert any("not sealed by rank 1 within 0.5 s" in (e["error"] or "") for e in first.of("step"))
    assert second.is_stopped
    second.cont()
    second.wait_event("holding")
    for trainer in (first, second):
        trainer.release(6)
    for trainer in (first, second):
        assert trainer.finish()["staged"] == 12
