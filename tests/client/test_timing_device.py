"""The device's clock without a device: events that are done when the test says how far the device is."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from timed_alone import take_rows, take_steps

from ckptd.format.timings import Mask, Op
from ckptd_client.timing import cuda, steps
from ckptd_client.timing import waits as waits_module
from ckptd_client.timing.collection import Collection
from ckptd_client.timing.communicators import Communicator
from ckptd_client.timing.cuda import SAMPLE_STEPS
from ckptd_client.timing.recorder import Operation

MS = 1_000_000


class Device:
    """``enqueued_ms``: where the stream's end is; ``done_ms``: how far the device has come."""

    def __init__(self) -> None:
        self.enqueued_ms = 0.0
        self.done_ms = 0.0
        self.is_capturing = False
        self.made = 0


class Event:
    def __init__(self, device: Device) -> None:
        self._device = device
        self.at_ms = -1.0
        device.made += 1

    def record(self) -> None:
        self.at_ms = self._device.enqueued_ms

    def query(self) -> bool:
        return self.at_ms <= self._device.done_ms

    def elapsed_time(self, other: Event) -> float:
        assert self.query()
        assert other.query()
        return other.at_ms - self.at_ms


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(made))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: made.is_capturing)
    monkeypatch.setenv(steps.WARM_UP_ENV, "0")
    return made


@pytest.fixture
def collection() -> Collection:
    return Collection()


@pytest.fixture
def communicator(collection: Collection) -> Communicator:
    return collection.recorder.communicators._add("g", (0, 1), "", "nccl")


def run(collection: Collection, communicator: Communicator, device: Device, for_ms: float) -> Operation:
    """An operation that keeps its stream for so long."""
    operation = collection.recorder.begin(communicator, Op.ALL_REDUCE, -1, 8)
    collection.endings.device.begin(operation)
    device.enqueued_ms += for_ms
    collection.endings.device.end(operation)
    return operation


def test_an_operation_lasts_as_long_as_it_kept_its_stream(
    device: Device, collection: Collection, communicator: Communicator
) -> None:
    timer = collection.endings.device
    run(collection, communicator, device, 1)
    for step in range(SAMPLE_STEPS + 2):
        device.enqueued_ms += 10
        run(collection, communicator, device, 3)
        device.enqueued_ms += 7
        collection.steps.mark(step)
    timer.poll()
    assert len(take_rows(collection)) == 0
    device.done_ms = device.enqueued_ms
    timer.poll()
    timer.poll()
    [row] = take_rows(collection)
    marks = take_steps(collection)
    assert marks["step"].tolist() == list(range(SAMPLE_STEPS + 2))
    assert [bool(mask & Mask.INCOMPLETE) for mask in marks["mask"]] == [
        step != SAMPLE_STEPS for step in range(SAMPLE_STEPS + 2)
    ]
    assert (marks["end_ns"][1:] - marks["end_ns"][:-1]).tolist() == [20 * MS] * (SAMPLE_STEPS + 1)
    assert row["end_ns"] - row["start_ns"] == 3 * MS
    assert row["start_ns"] - marks["end_ns"][SAMPLE_STEPS - 1] == 10 * MS
    assert (communicator.enqueued, communicator.completed) == (SAMPLE_STEPS + 3, SAMPLE_STEPS + 3)


def test_what_the_device_has_not_done_is_pending(
    device: Device, collection: Collection, communicator: Communicator
) -> None:
    first, second = (run(collection, communicator, device, 5) for _ in range(2))
    device.done_ms = 5
    collection.endings.device.poll()
    assert list(collection.recorder.pending) == [second]
    assert first not in collection.recorder.pending


def test_events_are_used_again(device: Device, collection: Collection, communicator: Communicator) -> None:
    for _ in range(50):
        run(collection, communicator, device, 1)
        device.done_ms = device.enqueued_ms
        collection.endings.device.poll()
    assert device.made == 1


def test_what_came_before_an_operation_that_is_over_is_over_in_the_end(
    device: Device, collection: Collection, communicator: Communicator
) -> None:
    unseen = collection.recorder.begin(communicator, Op.ALL_GATHER, -1, 8)
    recent = collection.recorder.begin(communicator, Op.ALL_GATHER, -1, 8)
    unseen.start_ns -= cuda._OVERTAKEN_NS
    last = run(collection, communicator, device, 1)
    collection.endings.device.poll()
    assert list(collection.recorder.pending) == [unseen, recent, last]
    device.done_ms = device.enqueued_ms
    collection.endings.device.poll()
    assert list(collection.recorder.pending) == [recent]  # somebody may yet wait for it


def test_while_a_graph_is_captured_nothing_is_recorded(
    device: Device, collection: Collection, communicator: Communicator
) -> None:
    run(collection, communicator, device, 1)
    made = device.made
    device.is_capturing = True
    collection.steps.mark(0)
    tensor: Any = SimpleNamespace(is_cuda=True)
    assert not collection.endings.device.can_time(collection.recorder, tensor)
    assert "CUDA graph" in "".join(collection.recorder.gaps)
    assert device.made == made


def test_another_kind_of_device_is_a_gap(collection: Collection) -> None:
    tensor: Any = SimpleNamespace(is_cuda=False, device=SimpleNamespace(type="xpu"))
    assert not collection.endings.device.can_time(collection.recorder, tensor)
    assert collection.recorder.gaps == {"operations on xpu are not recorded"}


def test_a_batch_ends_when_its_one_work_was_waited_for(collection: Collection, communicator: Communicator) -> None:
    waits, recorder = collection.endings.waits, collection.recorder
    recorder.communicators.by_address[1] = communicator
    parts = [recorder.begin(communicator, op, 1, 8) for op in (Op.SEND, Op.RECV)]
    other = recorder.begin(communicator, Op.ALL_REDUCE, -1, 8)
    for operation in (*parts, other):
        waits.hold(operation, object(), 0)  # type: ignore[arg-type]
    batch: Any = SimpleNamespace()
    waits.coalesced(1, batch)
    waits._settle(id(batch), waits._held.pop(id(batch)))
    assert list(recorder.pending) == [other]
    assert [Op(int(op)) for op in take_rows(collection)["op"]] == [Op.SEND, Op.RECV]


# --- works that are held ----------------------------------------------------------------------------------------------
class Work:
    def __init__(self) -> None:
        self.is_over = False

    def is_completed(self) -> bool:
        return self.is_over


def held(collection: Collection, communicator: Communicator, op: Op = Op.ALL_GATHER) -> tuple[Operation, Work]:
    """An operation of a device that ends when its work is waited for."""
    operation, work = collection.recorder.begin(communicator, op, -1, 8), Work()
    collection.endings.waits.hold(operation, work, 0, collection.endings.device.end)  # type: ignore[arg-type]
    return operation, work


def age(operation: Operation) -> None:
    operation.start_ns -= waits_module._KEPT_NS


def test_a_work_that_is_over_is_the_programs_alone_and_its_wait_is_still_seen(
    device: Device, collection: Collection, communicator: Communicator
) -> None:
    operation, work = held(collection, communicator)
    found, waits = weakref.ref(work), collection.endings.waits
    work.is_over = True
    waits.poll(may_query_device=True)
    assert operation in collection.recorder.pending
    waits._settle(id(work), waits._held.pop(id(work)))
    assert [end.operation for end in collection.endings.device._ends] == [operation]
    del work
    assert found() is None


@pytest.mark.parametrize("may_query", [True, False])
def test_a_work_that_the_program_has_dropped_is_kept_no_longer_than_needed(
    collection: Collection, communicator: Communicator, may_query: bool
) -> None:
    operation, work = held(collection, communicator)
    found, waits = weakref.ref(work), collection.endings.waits
    work.is_over = may_query
    del work
    waits.poll(may_query_device=may_query)
    if not may_query:
        assert found() is not None
        age(operation)
        waits.poll(may_query_device=False)
    assert found() is None
    assert not waits._held
    # Where it cannot be told that it is over, it may hang.
    assert (operation in collection.recorder.pending) is not may_query


def test_a_work_that_is_not_over_stays_pending_and_one_long_over_does_not(
    collection: Collection, communicator: Communicator
) -> None:
    operation, work = held(collection, communicator)
    age(operation)
    collection.endings.waits.poll(may_query_device=True)
    assert operation in collection.recorder.pending
    work.is_over = True
    collection.endings.waits.poll(may_query_device=True)
    assert not collection.recorder.pending
    assert not collection.endings.waits._held
