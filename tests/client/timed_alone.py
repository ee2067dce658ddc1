"""A process group of this process alone, what its operations left, and a link that is a list."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch.distributed as dist

from ckptd.errors import CkptdError
from ckptd.format.timings import OPERATION, STEP, Op, Rows, unpack
from ckptd.model import Incarnation
from ckptd.serve.diagnosis.black_box import BlackBox
from ckptd_api.convert import incarnation_from_pb
from ckptd_api.v1 import node_pb2, types_pb2
from ckptd_client.timing import collection as process
from ckptd_client.timing.collection import Collection


@contextmanager
def one_rank_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def collecting() -> Iterator[Collection]:
    user = object()
    try:
        yield process.enter(user)
    finally:
        process.leave(user)


def take_rows(collection: Collection) -> Rows:
    data, end = collection.recorder.ring.peek(1 << 20)
    collection.recorder.ring.commit(end)
    return unpack(data, OPERATION, "operations", 1 << 20)


def take_ops(collection: Collection) -> list[Op]:
    return [Op(int(row["op"])) for row in take_rows(collection)]


def take_steps(collection: Collection) -> Rows:
    data, end = collection.steps.ring.peek(1 << 20)
    collection.steps.ring.commit(end)
    return unpack(data, STEP, "steps", 1 << 20)


def masks(collection: Collection) -> list[int]:
    return np.asarray(take_steps(collection)["mask"]).tolist()


class Link:
    """What a heartbeat needs of a link; its daemon is itself. ``error``, when set, is raised instead of an answer."""

    def __init__(self) -> None:
        self.run = "run"
        self.rank = 0
        self.instance = 1
        self.incarnation = types_pb2.Incarnation(ordinal=1, id=2)
        self.problem: CkptdError | None = None
        self.error: CkptdError | None = None
        self.answers: list[node_pb2.ReportTimingsResponse] = []
        self.requests: list[node_pb2.ReportTimingsRequest] = []
        self.black_boxes: list[BlackBox] = []

    @property
    def daemon(self) -> Any:
        return self

    def call(self, method: str, request: node_pb2.ReportTimingsRequest, timeout_s: float) -> Any:
        assert method == "ReportTimings"
        assert timeout_s > 0
        if self.error is not None:
            raise self.error
        self.requests.append(request)
        return self.answers.pop(0) if self.answers else node_pb2.ReportTimingsResponse()

    def black_box(self, run: str, incarnation: Incarnation, rank: int) -> int:
        assert (run, incarnation, rank) == (self.run, incarnation_from_pb(self.incarnation), self.rank)
        self.black_boxes.append(BlackBox())
        return self.black_boxes[-1].descriptor()

    @property
    def last(self) -> node_pb2.ReportTimingsRequest:
        return self.requests[-1]

    def rows(self) -> list[Op]:
        """The operations of every request."""
        return [Op(int(row["op"])) for r in self.requests for row in unpack(r.operations, OPERATION, "rows", 1 << 20)]
