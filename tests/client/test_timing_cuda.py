"""Operations on a CUDA device: timed by events on the device's clock, every step of ``SAMPLE_STEPS`` whole.

Run with ``python -m pytest tests/client/test_timing_cuda.py -m gpu``.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from timed_alone import collecting, take_rows, take_steps
from torch import nn

from ckptd.format.timings import Mask, Op
from ckptd_client.timing import cuda, steps
from ckptd_client.timing.collection import Collection

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture
def tapped(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collection]:
    monkeypatch.setenv(steps.WARM_UP_ENV, "0")
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda:0"))
    with collecting() as collection:
        yield collection
    dist.destroy_process_group()


def ones(count: int = 1 << 20) -> torch.Tensor:
    return torch.ones(count, device="cuda")


def world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def work_on_device() -> None:
    x = torch.randn(2048, 2048, device="cuda")
    for _ in range(10):
        x = x @ x / 2048


def do_all() -> list[Op]:
    """One of each way to call; what it is."""
    tensor = ones()
    dist.all_reduce(tensor)
    dist.all_reduce(tensor, async_op=True).wait()
    dist.all_gather_into_tensor(ones(), tensor)
    dist.all_gather_into_tensor(ones(), tensor, async_op=True).wait()
    dist.reduce_scatter_tensor(ones(), tensor)
    _ = functional.all_gather_tensor(tensor, 0, world()) + 1
    dist.barrier()
    return [Op.ALL_REDUCE, Op.ALL_REDUCE, Op.ALL_GATHER, Op.ALL_GATHER, Op.REDUCE_SCATTER, Op.ALL_GATHER, Op.BARRIER]


def settle(collection: Collection) -> None:
    torch.cuda.synchronize()
    collection.refresh()
    collection.refresh()


def test_every_operation_ends_once_the_device_is_done(tapped: Collection) -> None:
    do_all()
    assert len(tapped.recorder.pending) > 0 or tapped.recorder.entered == 7
    settle(tapped)
    communicator = tapped.recorder.communicators.all[0]
    assert (communicator.enqueued, communicator.completed) == (7, 7)
    assert not tapped.recorder.pending
    assert not tapped.recorder.failures, tapped.recorder.last_failure


def test_steps_that_are_timed_are_whole_and_the_others_incomplete(tapped: Collection) -> None:
    do_all()
    for step in range(2 * cuda.SAMPLE_STEPS + 1):
        work_on_device()
        expected = do_all()
        work_on_device()
        tapped.steps.mark(step)
        settle(tapped)
    marks, rows = take_steps(tapped), take_rows(tapped)
    timed = [int(row["step"]) for row in marks if not row["mask"] & Mask.INCOMPLETE]
    assert timed == [cuda.SAMPLE_STEPS, 2 * cuda.SAMPLE_STEPS]
    assert (rows["end_ns"] >= rows["start_ns"]).all()
    ends = dict(zip(marks["step"].tolist(), marks["end_ns"].tolist(), strict=True))
    for step in timed:
        within = (rows["start_ns"] >= ends[step - 1]) & (rows["end_ns"] <= ends[step])
        assert sorted(rows["op"][within].tolist()) == sorted(expected)
        taken = (rows["end_ns"] - rows["start_ns"])[within].sum()
        assert 0 < taken < ends[step] - ends[step - 1]
    assert len(rows) == 2 * len(expected)


def test_the_device_is_never_waited_for(tapped: Collection) -> None:
    do_all()
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)
    before = torch.cuda.current_stream().query()
    tapped.steps.mark(1)
    dist.all_reduce(ones())
    tapped.refresh()
    assert not before
    assert not torch.cuda.current_stream().query()
    assert [operation.op for operation in tapped.recorder.pending] == [Op.ALL_REDUCE]
    settle(tapped)
    assert not tapped.recorder.pending


def test_a_graph_is_captured_as_it_would_be_and_named_as_a_gap(tapped: Collection) -> None:
    tensor = ones(4)
    dist.all_reduce(tensor)
    torch.cuda.synchronize()
    entered = tapped.recorder.entered
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dist.all_reduce(tensor)
        tensor.mul_(2)
        reporter = threading.Thread(target=tapped.refresh)  # who captures may not look
        reporter.start()
        reporter.join()
    graph.replay()
    torch.cuda.synchronize()
    assert tensor.tolist() == [2.0] * 4
    assert tapped.recorder.entered == entered
    assert "CUDA graph" in tapped.coverage().problem


def test_nothing_on_the_device_is_held(tapped: Collection) -> None:
    tensor, output = ones(), ones()
    found = [weakref.ref(tensor), weakref.ref(output)]
    dist.all_reduce(tensor, async_op=True).wait()
    dist.all_gather_into_tensor(output, tensor, async_op=True).wait()
    del tensor, output
    gc.collect()
    assert [reference() for reference in found] == [None, None]
    settle(tapped)
    assert not tapped.endings.waits._held


def test_ddp_on_a_device_ends(tapped: Collection) -> None:
    model = nn.parallel.DistributedDataParallel(nn.Linear(64, 64).cuda(), device_ids=[0])
    for step in range(6):
        model(torch.ones(4, 64, device="cuda")).sum().backward()
        tapped.steps.mark(step)
    settle(tapped)
    assert not tapped.recorder.pending
    assert Op.ALL_REDUCE in take_rows(tapped)["op"].tolist()
