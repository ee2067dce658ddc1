"""What a run's watermarks tell the metrics: levels and their times, usual intervals, what counts and what does not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from metrics_page import Page

from ckptd.metrics import Metrics
from ckptd.serve.run_metrics import RunMetrics, tier_label
from ckptd.tiers.spec import TierSpec
from ckptd.tiers.zarr_tier import ZarrTier
from ckptd_api.v1 import types_pb2


class Clocked:
    """A run whose clocks are told the time."""

    def __init__(self, sealed_before: Mapping[int, float] | None = None) -> None:
        self.metrics = Metrics()
        self.metrics.begin_run("gpt")
        self.now_s = 0.0
        self.start(sealed_before)

    def start(self, sealed_before: Mapping[int, float] | None = None) -> None:
        """The daemon, or the run, starts anew."""
        self._run = RunMetrics(self.metrics, "gpt", sealed_before or {}, lambda: 1000 + self.now_s, lambda: self.now_s)

    def say(
        self,
        at_s: float,
        dead: tuple[int, ...] = (),
        failed: tuple[int, ...] = (),
        error: str = "DrainFailed",
        **levels: int,
    ) -> None:
        self.now_s = at_s
        marks = types_pb2.Watermarks(
            roster_version=1,
            dead=[types_pb2.StepOutcome(step=step, error="StepDead") for step in dead],
            not_durable=[types_pb2.StepOutcome(step=step, error=error) for step in failed],
            **levels,
        )
        self._run.follow(marks)

    def value(self, name: str, **labels: str) -> float | None:
        return Page(self.metrics).value(name, run="gpt", **labels)


def test_a_level_has_its_newest_step_and_the_time_it_was_reached() -> None:
    run = Clocked()
    run.say(0)
    run.say(5, staged=3)
    run.say(9, staged=3, durable=3)
    assert run.value("ckptd_snapshot_step", level="staged") == 3
    assert run.value("ckptd_snapshot_timestamp_seconds", level="staged") == 1005
    assert run.value("ckptd_snapshot_timestamp_seconds", level="durable") == 1009


def test_the_usual_interval_is_the_median_of_the_last_eight_gaps_of_a_level() -> None:
    run = Clocked()
    run.say(0)
    run.say(10, staged=1)
    at_s = 10.0
    for step, gap_s in enumerate((90, 90, 90, 90, 2, 4, 2, 4, 4, 4, 2, 4), 2):
        at_s += gap_s
        run.say(at_s, staged=step)
    assert run.value("ckptd_snapshot_interval_seconds", level="staged") == 4


def test_one_or_two_gaps_are_no_usual_interval() -> None:
    run = Clocked()
    run.say(0)
    for step, at_s in enumerate((10, 90, 92), 1):
        run.say(at_s, staged=step)
        assert run.value("ckptd_snapshot_interval_seconds", level="staged") is None


def test_a_gap_across_a_stop_does_not_count() -> None:
    run = Clocked()
    run.say(0)
    run.say(1, staged=1)
    run.say(3, staged=2)
    run.start()
    run.say(4000, staged=2)
    run.say(4001, staged=3)
    run.say(4003, staged=4)
    run.say(4005, staged=5)
    run.say(4007, staged=6)
    assert run.value("ckptd_snapshot_interval_seconds", level="staged") == 2


def test_a_step_from_before_this_daemon_has_the_time_it_was_sealed() -> None:
    run = Clocked(sealed_before={8: 700.0})
    run.say(0, staged=8)
    assert run.value("ckptd_snapshot_timestamp_seconds", level="staged") == 700
    run.say(6, staged=9)
    assert run.value("ckptd_snapshot_timestamp_seconds", level="staged") == 1006


def test_a_step_from_before_this_daemon_that_is_not_here_has_no_time() -> None:
    run = Clocked(sealed_before={8: 700.0})
    run.say(0, staged=8, durable=2)
    assert run.value("ckptd_snapshot_step", level="durable") == 2
    assert run.value("ckptd_snapshot_timestamp_seconds", level="durable") is None
    run.say(4, staged=8, durable=9)
    assert run.value("ckptd_snapshot_timestamp_seconds", level="durable") == 1004


def test_a_coordinator_that_restarted_and_finds_old_steps_again_does_not_make_them_new() -> None:
    run = Clocked(sealed_before={7: 690.0, 8: 700.0})
    run.say(0)
    run.say(1, staged=8)
    run.say(2, staged=8, protected=8, durable=7)
    run.say(3, staged=8, protected=8, durable=8)
    for level in ("staged", "protected", "durable"):
        assert run.value("ckptd_snapshot_timestamp_seconds", level=level) == 700
        assert run.value("ckptd_snapshot_interval_seconds", level=level) is None
    assert run.value("ckptd_commits_total", result="committed") == 0
    run.say(5, staged=9, durable=9)
    assert run.value("ckptd_snapshot_timestamp_seconds", level="durable") == 1005
    assert run.value("ckptd_commits_total", result="committed") == 1


def test_a_level_does_not_go_back_when_another_daemon_commits_again() -> None:
    run = Clocked()
    run.say(0)
    for step in (1, 2, 3):
        run.say(step, staged=step, durable=step)
    run.say(40, staged=3)
    run.say(41, staged=3, durable=2)
    run.say(42, staged=3, durable=3)
    assert run.value("ckptd_snapshot_step", level="durable") == 3
    assert run.value("ckptd_snapshot_timestamp_seconds", level="durable") == 1003
    assert run.value("ckptd_commits_total", result="committed") == 3


def test_dead_steps_and_commits_are_counted_once_with_the_time_of_the_last() -> None:
    run = Clocked()
    run.say(0)
    run.say(1, dead=(1, 2), durable=3)
    run.say(2, dead=(1, 2, 4), durable=3, failed=(4,))
    assert run.value("ckptd_dead_steps_total") == 3
    assert run.value("ckptd_commits_total", result="committed") == 1
    assert run.value("ckptd_commits_total", result="failed") == 1
    assert run.value("ckptd_commit_timestamp_seconds", result="committed") == 1001
    assert run.value("ckptd_commit_timestamp_seconds", result="failed") == 1002


def test_what_happened_before_this_daemon_heard_of_the_run_is_not_counted() -> None:
    run = Clocked()
    run.say(0, dead=(1, 2), durable=3, failed=(2,))
    assert run.value("ckptd_dead_steps_total") == 0
    assert run.value("ckptd_commits_total", result="committed") == 0
    assert run.value("ckptd_commit_timestamp_seconds", result="failed") is None


def test_levels_that_a_restarted_coordinator_tells_again_are_not_reached_again() -> None:
    run = Clocked()
    run.say(0)
    run.say(2, staged=5, durable=5)
    run.say(50)
    run.say(60, staged=5, durable=5)
    assert run.value("ckptd_snapshot_timestamp_seconds", level="staged") == 1002
    assert run.value("ckptd_snapshot_interval_seconds", level="staged") is None
    assert run.value("ckptd_commits_total", result="committed") == 1


def test_a_drain_that_was_only_passed_over_is_no_failed_commit() -> None:
    run = Clocked()
    run.say(0)
    run.say(1, failed=(2,), error="DrainBusy")
    assert run.value("ckptd_commits_total", result="failed") == 0


@pytest.mark.parametrize(
    ("source", "label"),
    [("memory", "memory"), ("peer", "memory"), ("reconstruction", "memory"), ("{}/b", "node-file")],
)
def test_bytes_are_of_a_tier_by_scope_and_scheme_or_of_memory(source: str, label: str, tmp_path: Path) -> None:
    root = f"file://{tmp_path}"
    tiers = [ZarrTier(TierSpec.parse(text)) for text in (f"{root}/a", f"{root}/b,scope=node")]
    assert tier_label(source.format(root), tiers) == label
