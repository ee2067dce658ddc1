"""What the daemon that judges shows of a run's ranks: how far apart they are and how much of them is seen."""

from __future__ import annotations

import pytest
from metrics_page import Page

from ckptd.metrics import Metrics
from ckptd.model import Incarnation, Roster, RosterEntry
from ckptd.serve.diagnosis.analyst import Analyst
from ckptd.serve.diagnosis.gauges import Gauges
from ckptd_api.convert import incarnation_to_pb
from ckptd_api.v1 import coordinator_pb2

FIRST = Incarnation(1, 0xAB)
GAUGES = ("ckptd_progress_lag_steps", "ckptd_timing_coverage_ratio", "ckptd_timing_ranks")


class Judged:
    """A run of four ranks on one node, judged here."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.metrics.begin_run("gpt")
        self.gauges = Gauges(self.metrics)
        self.start(FIRST)

    def start(self, incarnation: Incarnation) -> None:
        entries = tuple(RosterEntry(rank, "n0", "n0:1", 7) for rank in range(4))
        roster = Roster(version=1, incarnation_id=incarnation.id, block_bytes=1 << 20, entries=entries)
        self.analyst = Analyst("gpt", incarnation, roster, lambda _: None)

    def hear(self, steps: dict[int, int], problem: str = "", source: str = "hooks", gone: tuple[int, ...] = ()) -> Page:
        request = coordinator_pb2.ReportRanksRequest(
            run="gpt", node_id="n0", incarnation=incarnation_to_pb(self.analyst.incarnation)
        )
        for rank, step in steps.items():
            item = request.ranks.add(rank=rank)
            item.heartbeat.step = step
            item.coverage.source, item.coverage.problem = source, problem
        for rank in gone:
            request.ranks.add(rank=rank, has_left=True)
        self.analyst.take(request, 1.0)
        self.gauges.show(self.analyst)
        return Page(self.metrics)


def test_the_lag_is_that_of_the_slowest_rank_behind_the_fastest() -> None:
    run = Judged()
    assert run.hear({}).value("ckptd_progress_lag_steps", run="gpt") is None
    assert run.hear({0: 100, 1: 100, 2: 97, 3: 101}).value("ckptd_progress_lag_steps", run="gpt") == 4
    assert run.hear({2: 100}, gone=(3,)).value("ckptd_progress_lag_steps", run="gpt") == 0


@pytest.mark.parametrize(("problem", "source"), [("groups that torch does not list", "hooks"), ("", "none")])
def test_a_rank_that_is_not_wholly_seen_lowers_the_coverage(problem: str, source: str) -> None:
    run = Judged()
    assert run.hear({0: 5, 1: 5}).value("ckptd_timing_coverage_ratio", run="gpt") == 0.5
    assert run.hear({2: 5, 3: 5}).value("ckptd_timing_coverage_ratio", run="gpt") == 1
    assert run.hear({3: 6}, problem, source).value("ckptd_timing_coverage_ratio", run="gpt") == 0.75
    assert run.hear({3: 6}, gone=(3,)).value("ckptd_timing_coverage_ratio", run="gpt") == 1


def test_nothing_of_the_ranks_is_shown_once_another_daemon_judges() -> None:
    run = Judged()
    assert set(GAUGES) <= run.hear({0: 1}).names
    run.gauges.hide(run.analyst)
    assert not set(GAUGES) & Page(run.metrics).names


def test_of_a_start_that_is_over_nothing_is_kept() -> None:
    run = Judged()
    run.hear({0: 100, 1: 1})
    run.gauges.forget(run.analyst)
    run.start(FIRST)
    run.gauges.show(run.analyst)
    assert Page(run.metrics).value("ckptd_progress_lag_steps", run="gpt") is None


def test_a_run_that_was_pruned_and_begins_again_with_its_first_start_is_shown() -> None:
    run = Judged()
    run.start(Incarnation(5, 0xCD))
    run.hear({0: 7})
    run.gauges.forget(run.analyst)  # `ckptd prune`
    run.metrics.forget_run("gpt")
    run.metrics.begin_run("gpt")
    run.start(FIRST)
    assert run.hear({0: 100, 1: 97}).value("ckptd_progress_lag_steps", run="gpt") == 3
