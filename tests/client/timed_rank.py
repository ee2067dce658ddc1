"""One of two ranks on gloo, timed: ``calls`` does one of everything, ``train`` takes steps until it is killed.

Its events say what the recorder has, or what its heartbeats were; no daemon is needed.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from google.protobuf.json_format import MessageToDict
from timed_alone import Link, collecting, take_rows, take_steps
from torch import nn
from torch.distributed.fsdp import fully_shard

from ckptd.format.timings import Op
from ckptd_client.timing import heartbeat as heartbeat_module
from ckptd_client.timing.collection import Collection
from ckptd_client.timing.heartbeat import Heartbeat

RANK, OTHER = int(os.environ["RANK"]), 1 - int(os.environ["RANK"])


def note(event: str, **fields: Any) -> None:
    with Path(os.environ["TRAINER_EVENTS"]).open("a") as lines:
        lines.write(json.dumps({"event": event, **fields}) + "\n")


def world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def ddp() -> None:
    model = nn.parallel.DistributedDataParallel(nn.Linear(4, 4))
    model(torch.ones(1, 4)).sum().backward()


def fsdp() -> None:
    model = nn.Linear(4, 4)
    fully_shard(model)
    model(torch.ones(1, 4)).sum().backward()


def batch() -> None:
    ops = [dist.P2POp(dist.isend, torch.ones(4), OTHER), dist.P2POp(dist.irecv, torch.empty(4), OTHER)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()


def send() -> None:
    _ = dist.send(torch.ones(8), 1) if RANK == 0 else dist.recv(torch.empty(8), 0)


def any_source() -> None:
    _ = dist.send(torch.ones(8), 1) if RANK == 0 else dist.recv(torch.empty(8))


def compiled() -> None:
    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(x: torch.Tensor) -> torch.Tensor:
        return functional.all_reduce(x * 2, "sum", world()) + functional.all_gather_tensor(x, 0, world())[:4]

    run(torch.ones(4))


def mesh() -> None:
    made = dist.init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
    dist.all_reduce(torch.ones(2), group=made.get_group("tp"))


def late() -> None:
    time.sleep(0.2 * RANK)
    dist.reduce_scatter_tensor(torch.empty(2), torch.ones(4))


CALLS: list[Callable[[], None]] = [ddp, fsdp, batch, send, send, any_source, compiled, mesh, late]


def calls(collection: Collection) -> None:
    for call in CALLS:
        call()
        until = time.monotonic() + 10
        while collection.recorder.pending and time.monotonic() < until:
            time.sleep(0.01)
        rows = [
            [Op(int(row["op"])).label, int(row["peer"]), int(row["seq"]), int(row["end_ns"] - row["start_ns"]) / 1e9]
            for row in sorted(take_rows(collection), key=lambda row: (int(row["start_ns"]), int(row["seq"])))
        ]
        labels = [communicator.label for communicator in collection.recorder.communicators.all]
        note(call.__name__, rows=rows, pending=len(collection.recorder.pending), labels=labels)
    note("end", problem=collection.coverage().problem)


class NotedLink(Link):
    """Its requests are events."""

    def call(self, method: str, request: Any, timeout_s: float) -> Any:
        note("beat", **MessageToDict(request.heartbeat, preserving_proto_field_name=True))
        return super().call(method, request, timeout_s)


def train(collection: Collection) -> None:
    heartbeat_module.INTERVAL_S, heartbeat_module.STILL_S = 0.1, 0.5
    Heartbeat(collection, NotedLink()).start()
    model = nn.parallel.DistributedDataParallel(nn.Linear(4, 4))
    step = 0
    while True:
        model(torch.ones(1, 4)).sum().backward()
        collection.steps.mark(step)
        take_steps(collection)
        note("step", step=step)
        step += 1
        time.sleep(0.02)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    with collecting() as found:
        {"calls": calls, "train": train}[sys.argv[1]](found)
    dist.destroy_process_group()
