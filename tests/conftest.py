"""Daemons and trainers as fixtures; a test that fails prints the logs of what it started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from harness import DaemonProcess, Nursery, Stage
from hypothesis import HealthCheck, settings

# Where it is set, what is not flushed into a pipe looks as if it were: users have it seldom.
os.environ.pop("PYTHONUNBUFFERED", None)
# A machine that is shared may stand still amid an example.
settings.register_profile("shared-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared-machine")
_REPORT: pytest.StashKey[pytest.TestReport] = pytest.StashKey()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Any:
    report = yield
    if report.when == "call":
        item.stash[_REPORT] = report
    return report


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture
def stage(nursery: Nursery, request: pytest.FixtureRequest) -> Iterator[Stage]:
    """Starts daemons and trainers; they are gone after the test."""
    stage = Stage(nursery)
    try:
        yield stage
    finally:
        report = request.node.stash.get(_REPORT, None)
        if report is None or report.failed:
            print(stage.report())
        stage.close()


@pytest.fixture
def daemon(stage: Stage) -> DaemonProcess:
    """A daemon without a tier."""
    return stage.daemon()


@pytest.fixture
def tier_daemon(stage: Stage) -> DaemonProcess:
    """A daemon with one tier, where every snapshot becomes durable."""
    return stage.tier_daemon()
