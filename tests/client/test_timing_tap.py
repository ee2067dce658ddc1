"""The tap on one rank: what passes it is noted once, ends, is let go, and is what it would have been."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from timed_alone import collecting, one_rank_group, take_ops, take_rows
from torch import nn
from torch._subclasses import FakeTensorMode

from ckptd.format.timings import Op
from ckptd_client.timing import collection as process
from ckptd_client.timing import recorder as recorder_module
from ckptd_client.timing import waits as waits_module
from ckptd_client.timing.collection import Collection
from ckptd_client.timing.communicators import Communicator
from ckptd_client.timing.dispatcher import Dispatcher
from ckptd_client.timing.operations import SPECS, missing, usable

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def tapped() -> Iterator[Collection]:
    with one_rank_group(), collecting() as collection:
        yield collection


def world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def gather_object() -> None:
    dist.all_gather_object([None], {"a": 1})


def scatter() -> None:
    dist.scatter(torch.empty(4), [torch.ones(4)])


def coalesced() -> None:
    with dist.distributed_c10d._coalescing_manager(async_ops=True) as works:
        dist.all_reduce(torch.ones(4))
        dist.all_reduce(torch.ones(4))
    works.wait()


def ddp() -> None:
    model = nn.parallel.DistributedDataParallel(nn.Linear(4, 4))
    model(torch.ones(1, 4)).sum().backward()


def functional_sum() -> None:
    _ = functional.all_reduce(torch.ones(4), "sum", world()) + 1


def functional_scatter() -> None:
    _ = functional.reduce_scatter_tensor(torch.ones(4), "sum", 0, world()) + 1


CALLS: list[tuple[Callable[[], Any], list[Op]]] = [
    (lambda: dist.all_reduce(torch.ones(4)), [Op.ALL_REDUCE]),
    (lambda: dist.all_reduce(torch.ones(4), async_op=True).wait(), [Op.ALL_REDUCE]),
    (lambda: dist.broadcast(torch.ones(4), 0), [Op.BROADCAST]),
    (lambda: dist.reduce(torch.ones(4), 0), [Op.REDUCE]),
    (lambda: dist.all_gather([torch.empty(4)], torch.ones(4)), [Op.ALL_GATHER]),
    (lambda: dist.all_gather_into_tensor(torch.empty(4), torch.ones(4)), [Op.ALL_GATHER]),
    (lambda: dist.reduce_scatter_tensor(torch.empty(4), torch.ones(4)), [Op.REDUCE_SCATTER]),
    (lambda: dist.reduce_scatter(torch.empty(4), [torch.ones(4)]), [Op.REDUCE_SCATTER]),
    (lambda: dist.all_to_all_single(torch.empty(4), torch.ones(4)), [Op.ALL_TO_ALL]),
    (lambda: dist.gather(torch.ones(4), [torch.empty(4)]), [Op.GATHER]),
    (scatter, [Op.SCATTER]),
    (dist.barrier, [Op.BARRIER]),
    (dist.monitored_barrier, [Op.BARRIER]),
    (gather_object, [Op.ALL_GATHER, Op.ALL_GATHER]),
    (coalesced, [Op.ALL_REDUCE]),
    (functional_sum, [Op.ALL_REDUCE]),
    (functional_scatter, [Op.REDUCE_SCATTER]),
]


@pytest.mark.parametrize(("call", "expected"), CALLS)
def test_every_operation_is_seen_once_and_ends(call: Callable[[], Any], expected: list[Op], tapped: Collection) -> None:
    call()
    settle(tapped)
    rows = take_rows(tapped)
    assert [Op(int(op)) for op in rows["op"]] == expected
    assert (rows["end_ns"] > rows["start_ns"]).all()
    assert rows["seq"].tolist() == list(range(1, len(expected) + 1))
    assert not tapped.recorder.failures, tapped.recorder.last_failure


def settle(collection: Collection) -> None:
    """Until every done-callback has run: gloo's threads call them."""
    deadline = threading.Event()
    for _ in range(500):
        if not collection.recorder.pending:
            return
        deadline.wait(0.01)
    raise AssertionError(f"pending: {[(o.op, o.seq) for o in collection.recorder.pending]}")


def test_what_ddp_does_in_cpp_is_seen(tapped: Collection) -> None:
    ddp()
    settle(tapped)
    assert {Op.BROADCAST, Op.ALL_REDUCE} <= set(take_ops(tapped))


@pytest.mark.slow
def test_compiled_collectives_are_seen_when_they_run_and_not_when_they_are_traced(tapped: Collection) -> None:
    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(x: torch.Tensor) -> torch.Tensor:
        return functional.all_reduce(x * 2, "sum", world()) + functional.all_gather_tensor(x, 0, world())

    for _ in range(2):
        assert compiled(torch.ones(4)).tolist() == [3.0] * 4
        settle(tapped)
        assert take_ops(tapped) == [Op.ALL_REDUCE, Op.ALL_GATHER]


def test_fake_tensors_leave_nothing(tapped: Collection) -> None:
    with FakeTensorMode():
        assert functional.all_reduce(torch.ones(4), "sum", world()).shape == (4,)
    meta = torch.ones(4, device="meta")
    assert functional.all_reduce(meta, "sum", world()).shape == (4,)
    assert (take_ops(tapped), tapped.recorder.entered) == ([], 0)


def test_inference_mode_autocast_and_other_threads_are_seen(tapped: Collection) -> None:
    with torch.inference_mode():
        dist.all_reduce(torch.ones(4))
    with torch.autocast("cpu"):
        dist.all_reduce(torch.ones(4))
    thread = threading.Thread(target=dist.barrier)
    thread.start()
    thread.join()
    assert take_ops(tapped) == [Op.ALL_REDUCE, Op.ALL_REDUCE, Op.BARRIER]


def test_sizes_are_of_the_input_and_count_all_of_a_list(tapped: Collection) -> None:
    dist.all_reduce(torch.ones(3, dtype=torch.float64))
    dist.reduce_scatter(torch.empty(5), [torch.ones(5)])
    coalesced()
    dist.barrier()
    settle(tapped)
    assert take_rows(tapped)["size_bytes"].tolist() == [24, 20, 32, 0]


def test_a_root_is_named_by_its_global_rank(tapped: Collection) -> None:
    dist.broadcast(torch.ones(1), 0)
    dist.all_reduce(torch.ones(1))
    assert take_rows(tapped)["peer"].tolist() == [0, -1]


# --- what is let go ---------------------------------------------------------------------------------------------------
def test_tensors_and_groups_are_free_afterwards(tapped: Collection) -> None:
    tensor = torch.ones(1000)
    found = weakref.ref(tensor)
    group = dist.new_group([0])
    dist.all_reduce(tensor, group=group)
    dist.all_reduce(tensor, async_op=True).wait()
    dist.reduce_scatter_tensor(tensor, tensor.clone())
    _ = functional.reduce_scatter_tensor(tensor, "sum", 0, world()) + 1
    settle(tapped)
    seen = weakref.ref(group)
    dist.destroy_process_group(group)
    del tensor, group, _
    gc.collect()
    assert found() is None
    assert seen() is None
    assert not tapped.endings.waits._held
    assert not tapped.endings.waits._by_output
    assert len(tapped.recorder.communicators.by_address) == 1


def test_works_that_nobody_waits_for_are_bounded(tapped: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits_module, "MOST_HELD", 3)
    works = [dist.reduce_scatter_tensor(torch.empty(4), torch.ones(4), async_op=True) for _ in range(8)]
    assert len(tapped.endings.waits._held) == 3
    assert len(tapped.recorder.pending) == 3
    for work in works:
        work.wait()
    assert not tapped.recorder.pending
    assert len(take_rows(tapped)) == 3


def test_on_the_host_a_work_that_is_over_is_let_go_at_the_next_look(tapped: Collection) -> None:
    operation = tapped.recorder.begin(Communicator(0, "g", (0,)), Op.REDUCE_SCATTER, -1, 8)
    is_over = False

    class Work:
        def is_completed(self) -> bool:
            return is_over

    work: Any = Work()
    tapped.endings.waits.hold(operation, work, 0)
    tapped.endings.poll()
    assert operation in tapped.recorder.pending
    is_over = True
    found = weakref.ref(work)
    del work
    tapped.endings.poll()
    gc.collect()
    assert found() is None
    assert take_ops(tapped) == [Op.REDUCE_SCATTER]


def test_what_is_pending_is_bounded_and_counted_as_lost(tapped: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "MOST_PENDING", 2)
    works = [dist.reduce_scatter_tensor(torch.empty(4), torch.ones(4), async_op=True) for _ in range(5)]
    assert len(tapped.recorder.pending) == 2
    assert tapped.coverage().dropped_total == 3
    for work in works:
        work.wait()
    communicator = tapped.recorder.communicators.all[0]
    assert (communicator.enqueued, communicator.completed) == (5, 5)


# --- what must not happen ---------------------------------------------------------------------------------------------
def test_an_error_of_ours_does_not_reach_the_caller(tapped: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("ours")

    tensor = torch.full((2,), 3.0)
    for target, name in ((tapped.recorder, "begin"), (tapped.endings, "follow"), (tapped.recorder, "end")):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, broken)
            dist.all_reduce(tensor)
            dist.all_reduce(tensor, async_op=True).wait()
    assert tensor.tolist() == [3.0, 3.0]
    assert tapped.recorder.failures >= 5
    assert "ours" in tapped.coverage().problem


def test_an_operation_whose_device_cannot_be_asked_is_left(tapped: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(operation: Any) -> None:
        raise RuntimeError("no event")

    monkeypatch.setattr(tapped.endings.device, "begin", broken)
    operation = tapped.recorder.begin(Communicator(0, "g", (0,)), Op.ALL_REDUCE, -1, 8)
    with pytest.raises(RuntimeError, match="no event"):
        tapped.endings.begin(operation)
    assert not tapped.recorder.pending


def test_an_error_of_the_operation_is_the_callers(tapped: Collection) -> None:
    with pytest.raises(RuntimeError):
        dist.all_gather_into_tensor(torch.empty(3), torch.ones(2))
    assert not tapped.recorder.pending
    assert not tapped.recorder.failures
    dist.barrier()
    assert take_ops(tapped) == [Op.BARRIER]


def test_without_users_the_operations_are_as_they_were() -> None:
    raw = dist.Work.__dict__["wait"]
    with one_rank_group():
        for _ in range(2):
            with collecting() as collection:
                dist.barrier()
                assert dist.Work.__dict__["wait"] is not raw
            dist.barrier()
            assert dist.Work.__dict__["wait"] is raw
            dist.all_reduce(torch.ones(2), async_op=True).wait()
            assert collection.recorder.entered == 1


def test_two_users_share_one_tap(tapped: Collection) -> None:
    with collecting() as other:
        assert other is tapped
        dist.barrier()
    dist.barrier()
    assert take_ops(tapped) == [Op.BARRIER, Op.BARRIER]


def test_an_operation_that_is_let_through_is_not_noted(tapped: Collection) -> None:
    assert tapped.tap is not None
    tapped.tap.recorder = None
    dist.barrier()
    tapped.tap.recorder = tapped.recorder
    assert take_ops(tapped) == []


# --- coverage ---------------------------------------------------------------------------------------------------------
def test_this_torch_has_no_operation_that_the_table_has_not() -> None:
    assert missing() == []
    assert set(usable()) == set(SPECS)


def test_the_coverage_says_what_the_tap_is(tapped: Collection) -> None:
    dist.barrier()
    coverage = tapped.coverage()
    assert (coverage.source, coverage.problem, coverage.operations_total) == ("dispatcher", "", 1)


def test_a_tap_that_does_not_work_says_so_and_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    raw = dist.Work.__dict__["wait"]
    monkeypatch.setattr(Dispatcher, "_kernel", lambda *args: lambda keys, *a: pytest.fail("called"))
    monkeypatch.setattr(process, "sees_an_operation", lambda tap: False)
    with caplog.at_level(logging.WARNING), collecting() as collection:
        assert collection.coverage().source == "none"
        assert "did not pass" in collection.coverage().problem
        assert dist.Work.__dict__["wait"] is raw
        with one_rank_group():
            dist.barrier()
    assert "collectives are not timed" in caplog.text


@pytest.mark.parametrize(
    ("owner", "name"), [(dist.ProcessGroup, "_end_coalescing"), (dist, "Work"), (dist, "ProcessGroup")]
)
def test_a_torch_that_lacks_what_is_needed_is_not_timed_and_nothing_is_raised(
    owner: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = dist.Work.__dict__["wait"]
    with monkeypatch.context() as patch:
        patch.delattr(owner, name)
        with collecting() as collection:
            assert collection.coverage().source == "none"
            assert name in collection.coverage().problem
    assert dist.Work.__dict__["wait"] is raw


def test_the_operation_of_the_self_test_is_not_among_the_rows() -> None:
    with collecting() as collection:
        assert (collection.recorder.entered, take_ops(collection)) == (0, [])
        assert collection.recorder.communicators.all == []


def test_a_group_that_torch_does_not_list_works_and_is_named(tapped: Collection) -> None:
    c10d: Any = torch._C._distributed_c10d
    group = dist.ProcessGroup(dist.HashStore(), 0, 1)
    backend = c10d.FakeProcessGroup._create_internal(0, 1, c10d.FakeProcessGroup.Options())
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.CUSTOM, backend)
    group.allreduce([torch.ones(1)]).wait()
    assert tapped.recorder.entered == 0
    assert "not list" in tapped.coverage().problem


def test_a_library_that_goes_past_c10d_is_named(tapped: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "deep_ep", object())
    assert tapped.coverage().problem == "deep_ep is loaded: what it sends is not seen"
