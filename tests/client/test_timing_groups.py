"""Communicators: what process groups are called, and what is left of those that are gone."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch.distributed as dist
from timed_alone import collecting, one_rank_group, take_rows

from ckptd_client.timing import communicators as communicators_module
from ckptd_client.timing.collection import Collection

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def tapped() -> Iterator[Collection]:
    with one_rank_group(), collecting() as collection:
        yield collection


def test_groups_that_come_and_go_leave_their_names_only(tapped: Collection) -> None:
    for _ in range(3):
        group = dist.new_group([0])
        dist.barrier(group=group)
        dist.destroy_process_group(group)
        del group
    gc.collect()
    dist.barrier()
    known = tapped.recorder.communicators
    assert list(known.live) == [3]
    assert [communicator.row for communicator in known.all] == [0, 1, 2, 3]
    assert not any(communicator.recent for communicator in known.all[:3])


def test_after_so_many_groups_new_ones_are_not_seen_and_the_others_are(
    tapped: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(communicators_module, "MOST", 2)
    dist.barrier()
    groups = [dist.new_group([0]) for _ in range(3)]
    for group in groups:
        dist.barrier(group=group)
    dist.barrier()
    assert take_rows(tapped)["communicator"].tolist() == [0, 1, 0]
    assert len(tapped.recorder.communicators.all) == 2
    assert "groups were made" in tapped.coverage().problem


def test_a_group_made_again_is_another_communicator() -> None:
    with collecting() as collection:
        for _ in range(2):
            with one_rank_group():
                dist.barrier()
                dist.barrier()
        first, second = collection.recorder.communicators.all
        assert first.id != second.id
        assert (first.members, second.members) == ((0,), (0,))
        rows = take_rows(collection)
        assert list(zip(rows["communicator"], rows["seq"], strict=True)) == [(0, 1), (0, 2), (1, 1), (1, 2)]


def test_groups_of_the_same_members_differ_and_a_mesh_dimension_names_its_own(tapped: Collection) -> None:
    for group in (None, dist.new_group([0]), dist.new_group([0], group_desc="mesh_tp")):
        dist.barrier(group=group)
    made = tapped.recorder.communicators.all
    assert len({communicator.id for communicator in made}) == 3
    assert [communicator.label for communicator in made] == ["", "", "tp"]
    assert {communicator.backend for communicator in made} == {"cpu:gloo,cuda:gloo"}
