"""Whether tiers answer: told with a deadline, by scope and scheme; a mount that hangs hangs nobody."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

from harness import Stage, wait_until
from metrics_page import Page

from ckptd.errors import TierFailed
from ckptd.metrics import Metrics
from ckptd.serve.tier_watch import TierWatch
from ckptd.tiers.spec import TierSpec


class FakeTier:
    """Answers, fails with ``problem``, or waits for ``go``."""

    def __init__(self, url: str, problem: Exception | None = None) -> None:
        self.spec = TierSpec.parse(url)
        self.problem = problem
        self.go = threading.Event()
        self.go.set()
        self.asked = 0

    def probe(self) -> None:
        self.asked += 1
        self.go.wait(10)
        if self.problem:
            raise self.problem


def watching(*tiers: FakeTier) -> SimpleNamespace:
    metrics = Metrics()
    some: Any = tiers
    watch = TierWatch(some, metrics, deadline_s=0.1)
    return SimpleNamespace(watch=watch, ready=lambda label: Page(metrics).value("ckptd_tier_ready", tier=label))


def test_a_tier_that_answers_is_ready_and_one_that_fails_says_why() -> None:
    shared, own = FakeTier("file:///a"), FakeTier("file:///b,scope=node", TierFailed("no space", "free some"))
    here = watching(shared, own)
    assert here.watch.problems() == ["no space (free some)"]
    assert (here.ready("shared-file"), here.ready("node-file")) == (1, 0)


def test_of_tiers_with_one_label_the_worst_is_told() -> None:
    here = watching(FakeTier("file:///a"), FakeTier("file:///b", TierFailed("gone", "")), FakeTier("file:///c"))
    here.watch.problems()
    assert here.ready("shared-file") == 0


def test_a_tier_that_hangs_holds_nobody_up_and_keeps_one_thread() -> None:
    hung, well = FakeTier("file:///hung"), FakeTier("file:///well,scope=node")
    here = watching(hung, well)
    hung.go.clear()
    started = time.monotonic()
    for _ in range(3):
        (problem,) = here.watch.problems()
    assert time.monotonic() - started < 5
    assert problem.startswith("file:///hung: no answer within 0.1 s")
    assert (hung.asked, well.asked) == (1, 3)
    assert (here.ready("shared-file"), here.ready("node-file")) == (0, 1)
    hung.go.set()
    wait_until(lambda: not here.watch.problems(), "the tier to be ready again")
    assert here.ready("shared-file") == 1


def test_an_error_nobody_thought_of_is_a_problem_too() -> None:
    here = watching(FakeTier("file:///a", RuntimeError("odd")))
    assert here.watch.problems() == ["RuntimeError: odd"]


def test_readyz_and_the_metric_follow_a_tier_that_goes_and_comes_back(stage: Stage) -> None:
    daemon = stage.tier_daemon(http=True)
    root, away = daemon.folder / "tier", daemon.folder / "away"
    wait_until(lambda: Page(daemon).value("ckptd_tier_ready", tier="shared-file") == 1, "the first answer")
    root.rename(away)
    status, text = daemon.get("/readyz")
    assert (status, "tier" in text) == (503, True)
    assert Page(daemon).value("ckptd_tier_ready", tier="shared-file") == 0
    away.rename(root)
    assert daemon.get("/readyz") == (200, "ok\n")
    assert Page(daemon).value("ckptd_tier_ready", tier="shared-file") == 1
