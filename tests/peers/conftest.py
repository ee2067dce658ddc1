"""Fleets of daemons as fixtures."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from daemon_nursery import DaemonNursery
from fleet import Fleet, MakeFleet
from harness import Stage


@pytest.fixture(scope="session")
def daemon_nursery() -> Iterator[DaemonNursery]:
    nursery = DaemonNursery()
    yield nursery
    nursery.close()


@pytest.fixture
def make_fleet(stage: Stage, daemon_nursery: DaemonNursery) -> MakeFleet:
    """``make_fleet(6, memory="16MiB")``: so many daemons, with their options; they are gone after the test."""
    return lambda count, **options: Fleet(stage, count, spawn=daemon_nursery.spawn, **options)
