"""The tap for torch 2.14 and later, against groups that call hooks as its headers say."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ckptd.format.timings import Op
from ckptd_client.timing.communicators import Communicator
from ckptd_client.timing.endings import Endings
from ckptd_client.timing.group_hooks import GroupHooks, has_hooks, op_of
from ckptd_client.timing.recorder import Recorder


class Group:
    """A process group of the later torch. ``work`` of an operation: whatever ``call`` gives, None synchronous."""

    def __init__(self) -> None:
        self.pre: dict[int, Callable[[Any], None]] = {}
        self.post: dict[int, Callable[[Any], None]] = {}
        self._op_id = 0

    def register_pre_hook(self, hook_id: int, hook: Callable[[Any], None]) -> None:
        self.pre[hook_id] = hook

    def register_post_hook(self, hook_id: int, hook: Callable[[Any], None]) -> None:
        self.post[hook_id] = hook

    def unregister_pre_hook(self, hook_id: int) -> None:
        del self.pre[hook_id]

    def unregister_post_hook(self, hook_id: int) -> None:
        del self.post[hook_id]

    def call(self, name: str, tensors: list[torch.Tensor], work: Any = None, root: int = -1) -> None:
        self._op_id += 1
        common = {"name": SimpleNamespace(name=name), "async_op": True, "op_id": self._op_id}
        for hook in self.pre.values():
            hook(SimpleNamespace(**common, input_tensors=tensors, output_tensors=tensors, root=root))
        for hook in self.post.values():
            hook(SimpleNamespace(**common, work=work))


class FutureWork:
    """Ends when the test says so."""

    def __init__(self) -> None:
        self.callbacks: list[Callable[[Any], None]] = []

    def get_future(self) -> FutureWork:
        return self

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self.callbacks.append(callback)


@pytest.fixture
def hooks() -> GroupHooks:
    made = GroupHooks(Endings())
    made.recorder = Recorder()
    return made


def listed(hooks: GroupHooks, group: Group) -> None:
    assert hooks.recorder is not None
    hooks.recorder.communicators.by_address[id(group)] = Communicator(0, "g", (0, 1))


def test_this_torch_has_no_hooks() -> None:
    assert has_hooks() is (torch.__version__ >= "2.14")


def test_an_operation_is_noted_from_its_issue_to_its_end(hooks: GroupHooks) -> None:
    group, work, recorder = Group(), FutureWork(), hooks.recorder
    assert recorder is not None
    listed(hooks, group)
    hooks.hook(group)
    hooks.hook(group)
    group.call("ALLREDUCE_COALESCED", [torch.ones(2), torch.ones(2)], work)
    [operation] = recorder.pending
    assert (operation.op, operation.size_bytes, operation.seq) == (Op.ALL_REDUCE, 16, 1)
    for callback in work.callbacks:
        callback(work)
    assert not recorder.pending
    assert recorder.ring.written == 1


def test_a_synchronous_operation_ends_at_once(hooks: GroupHooks) -> None:
    group, recorder = Group(), hooks.recorder
    assert recorder is not None
    listed(hooks, group)
    hooks.hook(group)
    group.call("BARRIER", [torch.ones(1)])
    assert (recorder.ring.written, len(recorder.pending)) == (1, 0)


def test_what_is_no_communication_and_fake_tensors_are_left_out(hooks: GroupHooks) -> None:
    group, recorder = Group(), hooks.recorder
    assert recorder is not None
    hooks.hook(group)
    group.call("SPLIT", [])
    group.call("ALLREDUCE", [torch.ones(1, device="meta")])
    assert (recorder.entered, recorder.failures) == (0, 0)


def test_an_error_of_ours_does_not_reach_the_group(hooks: GroupHooks) -> None:
    group, recorder = Group(), hooks.recorder
    assert recorder is not None
    hooks.hook(group)
    for hook in (*group.pre.values(), *group.post.values()):
        hook(SimpleNamespace())
    assert recorder.failures == 2


def test_an_operation_that_raises_between_the_hooks_is_left_by_the_next_and_keeps_nothing(hooks: GroupHooks) -> None:
    group, recorder, tensor = Group(), hooks.recorder, torch.ones(1)
    assert recorder is not None
    listed(hooks, group)
    hooks.hook(group)
    found = weakref.ref(tensor)
    post, group.post = group.post, {}
    group.call("ALLREDUCE", [tensor])
    del tensor
    assert found() is None
    assert len(recorder.pending) == 1
    group.post = post
    group.call("BARRIER", [torch.ones(1)])
    assert not recorder.pending
    assert recorder.ring.written == 1
    group.post = {}
    group.call("ALLREDUCE", [torch.ones(1)])
    group.post = post
    hooks.uninstall()
    assert not recorder.pending


def test_an_operation_whose_end_cannot_be_followed_is_left(hooks: GroupHooks) -> None:
    group, recorder = Group(), hooks.recorder
    assert recorder is not None
    listed(hooks, group)
    hooks.hook(group)
    group.call("ALLREDUCE", [torch.ones(1)], object())
    assert (len(recorder.pending), recorder.failures) == (0, 1)


def test_uninstalled_the_group_has_no_hooks(hooks: GroupHooks) -> None:
    group = Group()
    hooks.hook(group)
    hooks.uninstall()
    assert (group.pre, group.post) == ({}, {})


@pytest.mark.parametrize(
    ("name", "op"),
    [
        ("REDUCE_SCATTER_TENSOR_COALESCED", Op.REDUCE_SCATTER),
        ("REDUCE", Op.REDUCE),
        ("ALLGATHER_INTO_TENSOR_COALESCED", Op.ALL_GATHER),
        ("ALLTOALL_BASE", Op.ALL_TO_ALL),
        ("RECV", Op.RECV),
        ("NEW_WINDOW", None),
        ("UNKNOWN", None),
    ],
)
def test_names_of_operations(name: str, op: Op | None) -> None:
    assert op_of(name) is op
