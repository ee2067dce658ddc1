"""The monitor: rates between samples, sources that fail or are slow, a thread that ends. Time is made by hand."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator

import pytest

from ckptd.detect.health import SUSTAINED, WARM_UP, Resource
from ckptd.health import monitor as module
from ckptd.health.monitor import RETRY_S, WINDOW, Monitor, Snapshot, sources_of_node
from ckptd.health.samples import Source

INTERVAL_S = 5.0


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


class FakeSource:
    """Gives what it is told to; an exception is raised. Each read takes ``read_s`` of the clock."""

    def __init__(self, clock: Clock, name: str = "fake") -> None:
        self.name = name
        self.unread: dict[str, str] = {}
        self.answer: dict[str, float] | Exception = {}
        self.read_s = 0.0
        self.reads = 0
        self.closed = 0
        self._clock = clock

    def read(self) -> dict[str, float]:
        self.reads += 1
        self._clock.now_s += self.read_s
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def source(clock: Clock) -> FakeSource:
    return FakeSource(clock)


def nothing() -> tuple[Resource, ...]:
    return ()


def sampled(monitor: Monitor, clock: Clock, count: int = 1) -> Snapshot:
    for _ in range(count):
        monitor.sample()
        clock.now_s += INTERVAL_S
    return monitor.snapshot()


def test_before_the_first_sample_nothing_is_known(clock: Clock, source: FakeSource) -> None:
    snapshot = Monitor([source], nothing).snapshot()
    assert (snapshot.health.score, snapshot.health.is_learned, snapshot.figures) == (0.0, False, {})
    assert snapshot.age_s == math.inf


def test_counters_become_rates_over_the_time_that_passed(clock: Clock, source: FakeSource) -> None:
    monitor = Monitor([source], nothing)
    source.answer = {"memory_major_faults_total": 100, "memory_available_share": 0.5}
    assert sampled(monitor, clock).figures == {"memory_available_share": 0.5}
    source.answer = {"memory_major_faults_total": 200, "memory_available_share": 0.4}
    snapshot = sampled(monitor, clock)
    assert snapshot.figures == {"memory_major_faults_per_s": 100 / INTERVAL_S, "memory_available_share": 0.4}
    assert snapshot.age_s == INTERVAL_S


def test_a_source_that_fails_is_set_aside_with_its_reason_and_tried_again_later(clock: Clock) -> None:
    broken, well = FakeSource(clock, "broken"), FakeSource(clock, "well")
    broken.answer = PermissionError(1, "Operation not permitted", "/dev/kmsg")
    well.answer = {"memory_available_share": 0.5}
    monitor = Monitor([broken, well], nothing)
    snapshot = sampled(monitor, clock, 3)
    assert snapshot.unread == {"broken": "/dev/kmsg: Operation not permitted"}
    assert snapshot.figures == {"memory_available_share": 0.5}
    assert (broken.reads, well.reads) == (1, 3)
    clock.now_s += RETRY_S
    broken.answer = {"cpu_steal_share": 0.0}
    snapshot = sampled(monitor, clock)
    assert (snapshot.unread, snapshot.figures.keys()) == ({}, {"cpu_steal_share", "memory_available_share"})


def test_a_source_that_is_wrong_in_any_other_way_costs_the_others_nothing(clock: Clock) -> None:
    broken, well = FakeSource(clock, "broken"), FakeSource(clock, "well")
    broken.answer, well.answer = ValueError("no number"), {"memory_available_share": 0.5}
    snapshot = sampled(Monitor([broken, well], nothing), clock)
    assert snapshot.unread == {"broken": "ValueError: no number"}
    assert snapshot.figures == {"memory_available_share": 0.5}


def test_a_slow_source_is_read_less_often_and_what_it_told_counts(clock: Clock, source: FakeSource) -> None:
    source.read_s, source.answer = 1.5, {"cpu_steal_share": 0.0}
    monitor = Monitor([source], nothing)
    assert sampled(monitor, clock).unread == {}  # the first read has to open it
    snapshot = sampled(monitor, clock)
    assert snapshot.figures == {"cpu_steal_share": 0.0}
    assert "more than 1 s" in snapshot.unread["fake"]
    sampled(monitor, clock, 5)
    assert source.reads == 2
    clock.now_s += RETRY_S
    source.read_s = 0.0
    assert sampled(monitor, clock).unread == {}
    assert source.reads == 3


def test_the_rate_after_a_gap_is_over_the_whole_gap(clock: Clock, source: FakeSource) -> None:
    monitor = Monitor([source], nothing)
    source.answer = {"memory_major_faults_total": 0}
    sampled(monitor, clock)
    source.answer = OSError(5, "Input/output error")
    sampled(monitor, clock)
    clock.now_s += RETRY_S
    source.answer = {"memory_major_faults_total": 140}
    assert sampled(monitor, clock).figures == {"memory_major_faults_per_s": 140 / (RETRY_S + 2 * INTERVAL_S)}


def test_what_a_source_could_not_read_in_part_is_told(clock: Clock, source: FakeSource) -> None:
    source.unread = {"gpu_nvlink_errors_total": "Not Supported"}
    assert sampled(Monitor([source], nothing), clock).unread == {"gpu_nvlink_errors_total": "Not Supported"}


def test_signs_come_with_the_score(clock: Clock, source: FakeSource) -> None:
    monitor = Monitor([source], nothing)
    source.answer = {"cpu_steal_share": 0.002, "cpu_pressure_share": 0.1}
    assert sampled(monitor, clock, WARM_UP).health.is_learned
    source.answer = {"cpu_steal_share": 0.38, "cpu_pressure_share": 0.8}
    health = sampled(monitor, clock, SUSTAINED).health
    assert health.is_unwell()
    assert health.signs[0] == "cpu steal 38 % (normal 0.2 %)"


def test_what_the_daemon_loads_is_asked_at_each_sample(clock: Clock, source: FakeSource) -> None:
    loaded: set[Resource] = set()
    monitor = Monitor([source], lambda: loaded)
    source.answer = {"disk_latency_s{vda}": 0.002, "io_pressure_share": 0.0}
    sampled(monitor, clock, WARM_UP)
    source.answer = {"disk_latency_s{vda}": 0.2, "io_pressure_share": 0.9}
    loaded.add(Resource.DISK)
    assert sampled(monitor, clock, SUSTAINED).health.signs == ()
    loaded.clear()
    assert len(sampled(monitor, clock, SUSTAINED).health.signs) == 2


def test_the_window_is_bounded(clock: Clock, source: FakeSource) -> None:
    monitor = Monitor([source], nothing)
    for number in range(WINDOW + 10):
        source.answer = {"gpu_temperature_c": float(number)}
        sampled(monitor, clock)
    assert [snapshot.figures["gpu_temperature_c"] for snapshot in monitor.window()] == list(range(10, WINDOW + 10))


# --- the thread ---------------------------------------------------------------------------------------------------
class Gate:
    """A source that says when it was read and may be kept from returning."""

    name = "gate"

    def __init__(self) -> None:
        self.unread: dict[str, str] = {}
        self.was_read, self.may_return, self.is_closed = threading.Event(), threading.Event(), threading.Event()

    def read(self) -> dict[str, float]:
        self.was_read.set()
        assert self.may_return.wait(30)
        return {"memory_available_share": 0.5}

    def close(self) -> None:
        self.is_closed.set()


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.may_return.set()


def test_a_snapshot_does_not_wait_for_a_read_and_close_does_not_for_ever(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CLOSE_S", 0.05)
    monitor = Monitor([gate], nothing, interval_s=0.001)
    monitor.start()
    assert gate.was_read.wait(30)
    assert monitor.snapshot().figures == {}
    monitor.close()
    assert not gate.is_closed.is_set()
    # What a reader has open is closed by the thread that reads, once the read has returned.
    gate.may_return.set()
    assert gate.is_closed.wait(30)


def test_the_thread_samples_until_it_is_closed_and_closes_the_sources(gate: Gate) -> None:
    gate.may_return.set()
    sampled_twice = threading.Event()
    calls = iter([lambda: None, sampled_twice.set])

    def loaded() -> tuple[Resource, ...]:
        next(calls, lambda: None)()
        return ()

    monitor = Monitor([gate], loaded, interval_s=0.001)
    monitor.start()
    assert sampled_twice.wait(30)
    monitor.close()
    monitor.close()
    assert gate.is_closed.is_set()
    assert monitor.snapshot().figures == {"memory_available_share": 0.5}
    assert not any(thread.name == "health" for thread in threading.enumerate())


def test_a_caller_that_fails_does_not_end_the_thread(gate: Gate) -> None:
    gate.may_return.set()
    went_on = threading.Event()
    calls = iter([0])

    def loaded() -> tuple[Resource, ...]:
        if next(calls, None) is not None:
            raise RuntimeError("the daemon is not ready")
        went_on.set()
        return ()

    monitor = Monitor([gate], loaded, interval_s=0.001)
    monitor.start()
    assert went_on.wait(30)
    monitor.close()


def test_this_machine_can_be_sampled_and_says_what_it_cannot_read() -> None:
    sources: list[Source] = sources_of_node()
    monitor = Monitor(sources, nothing)
    monitor.sample()
    monitor.sample()
    snapshot = monitor.snapshot()
    assert {"cpu_steal_share", "memory_available_share"} - snapshot.figures.keys() <= {"cpu_steal_share"}
    assert all(reason for reason in snapshot.unread.values())
    assert all(math.isfinite(value) for value in snapshot.figures.values())
    for source in sources:
        source.close()
