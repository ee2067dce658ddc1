"""Peer sets: from meshes, from sizes, from communicators; never wrong ones."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.detect.layout import Axis, Layout, axes_of, infer
from ckptd.detect.records import Communicator
from ckptd.errors import InvalidRequest

SIZES = st.sampled_from([1, 2, 3, 4])


def peers(ids: np.ndarray, rank: int) -> set[int]:
    return set(np.flatnonzero(ids == ids[rank]).tolist()) if ids[rank] >= 0 else {rank}


def groups(dp: int, pp: int, tp: int) -> dict[str, list[tuple[int, ...]]]:
    """Members of the groups of each axis, ranks numbered pp, dp, tp with tp fastest."""
    ranks = np.arange(dp * pp * tp).reshape(pp, dp, tp)
    return {
        name: [tuple(row) for row in np.moveaxis(ranks, axis, -1).reshape(-1, ranks.shape[axis]).tolist()]
        for axis, name in enumerate(("pp", "dp", "tp"))
    }


def usage(
    members: list[tuple[int, ...]], operations: float, is_p2p: bool = False
) -> list[tuple[Communicator, float, bool]]:
    return [(Communicator(f"{m}-{operations}", m), operations, is_p2p) for m in members]


@given(SIZES, SIZES, SIZES, st.permutations(["dp", "pp", "tp"]))
def test_program_peers_differ_in_data_only_and_data_peers_in_tensor_only(
    dp: int, pp: int, tp: int, order: list[str]
) -> None:
    layout = Layout.from_sizes(dp, pp, tp, order)
    sizes = {"dp": dp, "pp": pp, "tp": tp}
    index = dict(zip(order, np.indices([sizes[name] for name in order]).reshape(3, -1), strict=True))
    for one, other in itertools.permutations(range(dp * pp * tp), 2):
        differs = {name for name in order if index[name][one] != index[name][other]}
        assert (other in peers(layout.program, one)) == (differs == {"dp"})
        assert (other in peers(layout.data, one)) == (differs == {"tp"})
        assert (layout.stage[one] == layout.stage[other]) == ("pp" not in differs)
        assert layout.replica is not None
        assert (other in peers(layout.replica, one)) == ("dp" not in differs)


def test_a_mesh_of_torch_names_its_axes_in_many_ways() -> None:
    names = ["dp_replicate", "ddp", "FSDP", "tp", "tensor", "model", "pp", "stage", "ep", "cp", "sp"]
    assert axes_of(names) == [Axis.DATA] * 3 + [Axis.TENSOR] * 3 + [Axis.PIPELINE] * 2 + [
        Axis.EXPERT,
        Axis.CONTEXT,
        Axis.CONTEXT,
    ]


def test_an_unknown_axis_is_data_only_when_there_is_no_other() -> None:
    assert axes_of(["nodes"]) == [Axis.DATA]
    assert axes_of(["nodes", "tp"]) == [Axis.DATA, Axis.TENSOR]
    assert axes_of(["dp", "nodes"]) == [Axis.DATA, Axis.UNKNOWN]
    assert axes_of(["alpha", "beta"]) == [Axis.UNKNOWN, Axis.UNKNOWN]
    assert axes_of(["dp_tp"]) == [Axis.DATA]


def test_ranks_that_differ_in_expert_or_context_are_no_peers() -> None:
    layout = Layout.from_mesh(("dp", "ep", "cp"), (2, 2, 2), range(8), 8)
    assert peers(layout.program, 0) == {0, 4}
    assert peers(layout.data, 0) == {0}


def test_replicated_and_sharded_data_is_one_set_of_peers() -> None:
    layout = Layout.from_mesh(("dp_replicate", "dp_shard"), (2, 4), range(8), 8)
    assert peers(layout.program, 5) == set(range(8))


def test_ranks_outside_of_the_mesh_have_no_peers() -> None:
    layout = Layout.from_mesh(("dp",), (2,), (3, 1), 4)
    assert layout.program.tolist() == [-1, 0, -1, 0]


@pytest.mark.parametrize(
    ("names", "shape", "ranks"),
    [
        (("dp", "tp"), (2,), (0, 1)),
        (("dp",), (3,), (0, 1)),
        (("dp",), (2,), (0, 4)),
        (("dp",), (2,), (1, 1)),
        (("dp",), (2,), (-1, 1)),
        (("dp",), (0,), ()),
        ((), (), ()),
    ],
)
def test_a_mesh_that_contradicts_itself_is_refused(
    names: tuple[str, ...], shape: tuple[int, ...], ranks: tuple[int, ...]
) -> None:
    with pytest.raises(InvalidRequest, match="mesh"):
        Layout.from_mesh(names, shape, ranks, 4)


def test_an_order_must_name_each_axis_once() -> None:
    with pytest.raises(InvalidRequest, match="order dp-dp-tp"):
        Layout.from_sizes(2, 2, 2, ("dp", "dp", "tp"))


def test_a_job_with_the_world_only_makes_everybody_a_program_peer() -> None:
    layout = infer(usage([tuple(range(6))], 12), 6)
    assert layout.is_inferred
    assert peers(layout.program, 2) == set(range(6))
    assert (layout.data == -1).all()


def test_messages_within_the_world_may_be_a_pipeline_so_nobody_is_a_peer() -> None:
    layout = infer(usage([tuple(range(6))], 12, is_p2p=True), 6)
    assert (layout.program == -1).all()
    assert (layout.data == -1).all()


def test_no_communicators_no_peers() -> None:
    assert (infer([], 4).program == -1).all()
    assert infer([], 1).program.tolist() == [-1]


@given(st.sampled_from([2, 3, 4]), st.sampled_from([2, 4]), st.sampled_from([2, 3]), st.booleans())
def test_three_axes_are_told_apart_by_their_use(dp: int, pp: int, tp: int, has_products: bool) -> None:
    members = groups(dp, pp, tp)
    known = usage(members["tp"], 100) + usage(members["dp"], 10) + usage(members["pp"], 2, is_p2p=True)
    known += usage([tuple(range(dp * pp * tp))], 1)
    if has_products:
        ranks = np.arange(dp * pp * tp).reshape(pp, -1)
        known += usage([tuple(row) for row in ranks.tolist()], 500)  # data and tensor of a stage in one group
    layout, given_one = infer(known, dp * pp * tp), Layout.from_sizes(dp, pp, tp)
    for rank in range(dp * pp * tp):
        assert peers(layout.program, rank) == peers(given_one.program, rank)
        assert peers(layout.data, rank) == peers(given_one.data, rank)
    assert layout.stage.tolist() == given_one.stage.tolist()


@given(SIZES, SIZES, SIZES, st.sets(st.sampled_from(["dp", "pp", "tp", "world", "odd"])))
def test_whatever_is_missing_peers_are_of_one_stage(dp: int, pp: int, tp: int, seen: set[str]) -> None:
    world = dp * pp * tp
    members = groups(dp, pp, tp)
    known = [*usage(members["tp"], 100)] if "tp" in seen else []
    known += usage(members["dp"], 10) if "dp" in seen else []
    # Where the groups of the pipeline are not seen, its messages go through the world.
    known += usage(members["pp"], 2, is_p2p=True) if "pp" in seen else []
    known += usage([tuple(range(world))], 3, is_p2p=pp > 1 and "pp" not in seen) if "world" in seen or pp > 1 else []
    known += usage([(0, world - 1)], 1) if "odd" in seen and world > 2 else []
    layout, given_one = infer(known, world), Layout.from_sizes(dp, pp, tp)
    for ids, rank in itertools.product((layout.program, layout.data), range(world)):
        if pp > 1:
            assert {given_one.stage[peer] for peer in peers(ids, rank)} == {given_one.stage[rank]}


def test_groups_that_overlap_or_leave_ranks_out_are_no_family() -> None:
    known = usage([(0, 1), (1, 2)], 50) + usage([tuple(range(4))], 5)
    layout = infer(known, 4)
    assert (layout.data == -1).all()
