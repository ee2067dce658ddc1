"""``watch()`` and ``Checkpointer(timing=...)``: who reports, and that a process does it once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from fake_job import FakeDaemon
from processes import wait_until
from timed_alone import one_rank_group
from torch import nn

import ckptd_client
from ckptd.errors import InvalidRequest
from ckptd.format.timings import OPERATION, STEP, Mask, unpack
from ckptd_client import Checkpointer, Watch, checkpointer, watch
from ckptd_client.timing import collection as process
from ckptd_client.timing import heartbeat, steps, watching

SOON_S = 10.0


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> FakeDaemon:
    """The daemon that every client of this process finds."""
    found = FakeDaemon("a")
    for module in (watching, checkpointer):
        monkeypatch.setattr(module, "Daemon", lambda address: found)
    monkeypatch.setattr(heartbeat, "INTERVAL_S", 0.02)
    monkeypatch.setenv(steps.WARM_UP_ENV, "0")
    return found


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    with one_rank_group():
        yield
    assert process._collection is None, "a tap was left behind"


@pytest.fixture
def checkpointer_of() -> Iterator[Callable[..., Checkpointer]]:
    made: list[Checkpointer] = []

    def make(**options: Any) -> Checkpointer:
        made.append(Checkpointer({"model": nn.Linear(2, 2)}, run="run", every=1000, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def reports(node: FakeDaemon) -> list[Any]:
    return [request for method, request in list(node.calls) if method == "ReportTimings"]


def operations(node: FakeDaemon) -> int:
    return sum(len(unpack(request.operations, OPERATION, "rows", 1 << 20)) for request in reports(node))


def step_rows(node: FakeDaemon) -> list[tuple[int, int]]:
    rows = [row for request in reports(node) for row in unpack(request.steps, STEP, "rows", 1 << 20)]
    return [(int(row["step"]), int(row["mask"])) for row in rows]


def test_a_watch_reports_and_has_no_step_due(node: FakeDaemon) -> None:
    with watch("run") as watched:
        assert isinstance(watched, Watch)
        watched.step(0)
        dist.barrier()
        watched.step(1)
        with watched.masked("evaluation"):
            watched.step(2)
    assert operations(node) == 1
    assert step_rows(node) == [(0, Mask.INCOMPLETE), (1, 0), (2, Mask.EVALUATION)]
    assert node.joins[0].every.WhichOneof("value") == "steps"
    assert node.joins[0].every.steps == 0
    assert [method for method, _ in node.calls][-1] == "Leave"


def test_a_checkpointer_reports_unless_it_is_told_not_to(
    node: FakeDaemon, checkpointer_of: Callable[..., Checkpointer]
) -> None:
    silent = checkpointer_of(timing=False)
    dist.barrier()
    silent.step(1)
    silent.close()
    assert reports(node) == []
    timed = checkpointer_of()
    dist.barrier()
    timed.step(1)
    timed.close()
    assert (operations(node), [step for step, _ in step_rows(node)]) == (1, [1])


def test_a_step_after_a_save_or_a_restore_is_masked(
    node: FakeDaemon, checkpointer_of: Callable[..., Checkpointer]
) -> None:
    timed = checkpointer_of()
    for step in (1, 2, 3, 4):
        timed.step(step)
        if step == 2:
            timed.save(2)
    timed.close()
    assert [mask for _, mask in step_rows(node)] == [Mask.INCOMPLETE, 0, Mask.CHECKPOINT, 0]


def test_while_a_save_a_restore_or_a_fence_is_under_way_the_rank_is_masked(
    node: FakeDaemon, checkpointer_of: Callable[..., Checkpointer], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = checkpointer_of()
    assert process._collection is not None
    marks = process._collection.steps
    seen: list[Mask] = []

    def look(*args: Any) -> None:
        seen.append(marks.in_force)

    monkeypatch.setattr(timed, "_restore", look)
    timed.restore()
    monkeypatch.setattr(timed, "_begin", look)
    timed.save(1)
    monkeypatch.setattr(timed._engine, "_current", SimpleNamespace(stall_s=0.0, fence=look), raising=False)
    monkeypatch.setattr(type(timed._engine), "current", property(lambda engine: engine._current))
    timed.fence()
    assert seen == [Mask.CHECKPOINT] * 3
    assert marks.in_force == Mask.NONE
    monkeypatch.undo()


def test_a_watch_beside_a_checkpointer_adds_nothing_twice(
    node: FakeDaemon, checkpointer_of: Callable[..., Checkpointer]
) -> None:
    timed = checkpointer_of()
    with watch("run") as watched:
        dist.barrier()
        for step in (0, 1):
            timed.step(step)
            watched.step(step)
    timed.close()
    assert operations(node) == 1
    assert [step for step, _ in step_rows(node)] == [0, 1]
    assert len(node.joins) == 1


def test_a_watch_gives_way_to_a_checkpointer(node: FakeDaemon, checkpointer_of: Callable[..., Checkpointer]) -> None:
    watched = watch("run")
    dist.barrier()
    wait_until(lambda: operations(node) == 1, "the watch's report", SOON_S)
    timed = checkpointer_of()
    assert [method for method, _ in node.calls if method in ("Join", "Leave")] == ["Join", "Leave", "Join"]
    dist.barrier()
    watched.step(3)
    timed.close()
    assert (operations(node), [step for step, _ in step_rows(node)]) == (2, [3])
    watched.close()


def test_a_watch_of_a_run_whose_checkpointer_is_not_timed_is_refused(
    node: FakeDaemon, checkpointer_of: Callable[..., Checkpointer]
) -> None:
    untimed = checkpointer_of(timing=False)
    with pytest.raises(InvalidRequest, match="leave its timing on"):
        watch("run")
    untimed.close()
    watch("run").close()


def test_without_a_daemon_nothing_waits_and_nothing_is_raised(node: FakeDaemon) -> None:
    node.is_up = False
    with watch("run") as watched:
        dist.barrier()
        watched.step(1)
    assert reports(node) == []


def test_watch_is_public() -> None:
    assert {"watch", "Watch"} <= set(ckptd_client.__all__)
