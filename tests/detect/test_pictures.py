"""Pictures as data: what stands out is in them, of any size of job, and they stay small."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stalled_job import Job as StalledJob

from bench.detector_model import Fault as Slowness
from bench.detector_model import Job, simulate
from ckptd.detect.hang import judge_hang
from ckptd.detect.history import History
from ckptd.detect.judge import Judge
from ckptd.detect.layout import Layout
from ckptd.detect.links import Layer, link_matrix
from ckptd.detect.picture_steps import MOST_ROWS, excess_of, picture_of_steps
from ckptd.detect.picture_waits import MOST_GROUPS, picture_of_waits
from ckptd.detect.pictures import MOST_BYTES, Scene, encode, has_something, picture_of_links, pictures
from ckptd.detect.records import Communicator, Confidence, Count, Fault, Kind, Pending, RankState
from ckptd.detect.wait_graph import wait_graph
from ckptd.format.timings import Mask, Op

SEED = 11


def scene_of(job: Job, slow: Sequence[Slowness] = (), steps: int = 60) -> Scene:
    judge = Judge(job.nodes, job.layout)
    for chunk in simulate(job, tuple(slow), steps, SEED):
        for rows in chunk.rows:
            judge.history.put(np.arange(job.world_size), rows)
            if rows["step"][0] % 5 == 4:
                judge.weigh((), {}, float(rows["step"][0]))
    return Scene.of(judge, (), {}, [logged.fault for logged in judge.log.open])


def steps_of(
    self_s: Any, layout: Layout | None = None, nodes: Sequence[str] = (), roots: set[int] = frozenset()
) -> Any:
    """The heat map of ``self_s``, ranks x steps, nothing of it masked."""
    self_s = np.asarray(self_s, np.float32)
    names = nodes or [""] * len(self_s)
    masks = np.zeros(self_s.shape, np.uint32)
    return picture_of_steps(np.arange(self_s.shape[1]), self_s, masks, layout, names, roots)


# --- self time ----------------------------------------------------------------------------------------------------
def test_a_slow_rank_stands_out_and_its_victims_do_not() -> None:
    found = pictures(scene_of(Job(dp=8, pp=1, tp=1), [Slowness((5,), 1.3, 20)]), "gpt", "1-00")
    rows = found["steps"]["rows"]
    assert [row["ranks"][0] for row in rows if row["upper_excess_permille"] > 150] == [5]
    assert [row["flagged"]["ranks"] for row in rows] == [[5] if rank == 5 else [] for rank in range(8)]
    values = np.array(found["steps"]["excess_permille"])
    assert (values[5, 20:] > 150).all()
    assert np.abs(np.delete(values, 5, axis=0)).max() < 150
    assert [(fault["kind"], fault["ranks"]) for fault in found["faults"]] == [("slow_compute", [5])]


def test_masked_steps_are_told_and_have_no_values() -> None:
    steps = pictures(scene_of(Job(dp=4, pp=1, tp=1, checkpoint_every=20)))["steps"]
    assert steps["masked_steps"] == [{"step": step, "masks": ["checkpoint"]} for step in (0, 20, 40)]
    at = [steps["steps"].index(step) for step in (0, 20, 40)]
    assert {row[column] for row in steps["excess_permille"] for column in at} == {None}
    assert None not in steps["excess_permille"][0][1:20]


def test_a_step_that_few_ranks_have_been_through_is_there_all_the_same() -> None:
    history = History(4)
    for chunk in simulate(Job(dp=4, pp=1, tp=1), (), 10, SEED):
        for rows in chunk.rows:
            ranks = np.arange(4) if rows["step"][0] < 9 else np.array([2])
            history.put(ranks, rows[ranks])
    steps = history.held_steps()
    assert steps.tolist() == list(range(10))
    assert history.judged_steps().tolist() == list(range(9))
    assert [is_known.tolist() for is_known in np.isfinite(history.self_s(steps)).T[8:]] == [
        [True] * 4,
        [False, False, True, False],
    ]


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-3, 7.0, 1e3]), st.integers(2, 9))
def test_the_unit_of_time_makes_no_difference(seed: int, unit: float, peers: int) -> None:
    self_s = np.random.default_rng(seed).uniform(0.5, 2, (peers, 6)).astype(np.float32)
    layout = Layout.from_sizes(peers, 1, 1)
    assert np.allclose(excess_of(self_s, layout), excess_of(self_s * np.float32(unit), layout), atol=1e-4)


def test_of_two_peers_the_slower_one_is_above_and_the_faster_one_is_not_below() -> None:
    excess = excess_of(np.array([[1.0, 1.0], [1.5, 1.0]], np.float32), Layout.from_sizes(2, 1, 1))
    assert np.allclose(excess, [[0, 0], [0.5, 0]])


def test_steps_that_most_ranks_have_not_reported_yet_are_not_told_as_masked() -> None:
    masks = np.zeros((4, 6), np.uint32)
    masks[:, 1] = masks[:3, 4:] = Mask.INCOMPLETE
    self_s = np.where(masks, np.nan, 1.0).astype(np.float32)
    found = picture_of_steps(np.arange(6), self_s, masks, Layout.from_sizes(4, 1, 1), [""] * 4, ())
    assert found is not None
    assert found["masked_steps"] == [{"step": 1, "masks": ["incomplete"]}]


def test_ranks_that_run_another_program_are_no_measure() -> None:
    # Stage 0 takes 1 s, stage 1 takes 3 s: nobody is slow.
    self_s = np.repeat(np.array([1.0, 3.0], np.float32), 4)[:, None] * np.ones((1, 5), np.float32)
    assert np.abs(excess_of(self_s, Layout.from_sizes(4, 2, 1, ("pp", "dp", "tp")))).max() == 0


def test_without_peers_a_rank_is_held_against_its_own_past() -> None:
    self_s = np.ones((3, 9), np.float32)
    self_s[1] = 5.0
    self_s[1, 8] = 10.0
    found = steps_of(self_s)
    assert not found["has_peers"]
    assert [row[8] for row in found["excess_permille"]] == [0, 1000, 0]


def test_a_rank_that_sent_nothing_has_no_row_and_is_counted() -> None:
    self_s = np.ones((4, 3), np.float32)
    self_s[2] = np.nan
    found = steps_of(self_s, Layout.from_sizes(4, 1, 1))
    assert [row["ranks"] for row in found["rows"]] == [[0], [1], [3]]
    assert found["ranks_unseen_total"] == 1
    assert steps_of(np.full((4, 3), np.nan)) is None


@pytest.mark.parametrize(
    ("ranks", "on_node", "rows_are"), [(1024, 8, "ranks"), (2048, 8, "nodes"), (4104, 2, "3 nodes each")]
)
def test_of_a_large_job_rows_are_nodes_and_the_largest_excess_of_each_is_kept(
    ranks: int, on_node: int, rows_are: str
) -> None:
    self_s = np.random.default_rng(SEED).uniform(0.9, 1.1, (ranks, 5)).astype(np.float32)
    self_s[777, 2:] = 2.0
    layout = Layout.from_sizes(ranks, 1, 1)
    found = steps_of(self_s, layout, [f"node{rank // on_node}" for rank in range(ranks)], {777})
    assert found["rows_are"] == rows_are
    assert len(found["rows"]) == len(found["excess_permille"]) <= MOST_ROWS
    assert sum(row["ranks_total"] for row in found["rows"]) == ranks
    permille = np.rint(1000 * excess_of(self_s, layout))
    together = ranks // len(found["rows"])
    assert np.array_equal(found["excess_permille"], permille.reshape(-1, together, 5).max(axis=1))
    (flagged,) = [row for row in found["rows"] if row["flagged"]["ranks"]]
    assert (flagged["flagged"]["ranks"], flagged["worst_rank"], flagged["node"]) == (
        [777],
        777,
        f"node{777 // on_node}",
    )


def test_where_nodes_are_not_known_rows_are_program_peers() -> None:
    self_s = np.ones((2048, 3), np.float32)
    self_s[1001] = 2.0
    found = steps_of(self_s, Layout.from_sizes(64, 4, 8))
    assert (found["rows_are"], len(found["rows"])) == ("program peers", 32)
    assert max(found["rows"], key=lambda row: row["upper_excess_permille"])["worst_rank"] == 1001


# --- who waits for whom -------------------------------------------------------------------------------------------
def waits_of(job: StalledJob, silent: bool = False) -> dict[str, Any]:
    states = job.states(silent)
    found = picture_of_waits(states, job.communicators, judge_hang(states, job.communicators))
    assert found is not None
    return found


def test_a_job_that_is_not_stopped_has_no_graph() -> None:
    job = StalledJob(stops={3: 7})
    slow = Fault(Kind.SLOW_COMPUTE, (3,), confidence=Confidence.CONFIRMED)
    assert picture_of_waits(job.states(), job.communicators, [slow]) is None


def test_the_root_of_a_hang_is_apart_and_all_others_lead_to_it() -> None:
    found = waits_of(StalledJob(stops={3: 7}))
    root, *victims = found["groups"]
    assert (root["ranks"], root["reason"], root["hops_from_root"]) == ([3], "absent", 0)
    assert sorted(rank for group in victims for rank in group["ranks"]) == [0, 1, 2, 4, 5, 6, 7]
    assert all(group["reason"] is None and group["hops_from_root"] >= 1 for group in victims)
    assert {(edge["label"], edge["why"]) for edge in found["edges"] if edge["blocker"] == 0} == {
        ("tp", "missing"),
        ("dp", "missing"),
        ("world", "missing"),
    }


def test_a_rank_without_heartbeat_is_told_as_silent() -> None:
    root = waits_of(StalledJob(stops={3: 7}), silent=True)["groups"][0]
    assert (root["ranks"], root["condition"], root["reason"], root["silent_s"]) == ([3], "silent", "silent", 60.0)


@given(st.dictionaries(st.integers(0, 7), st.integers(0, 12), min_size=1, max_size=3), st.booleans())
def test_every_rank_is_in_one_group_and_every_edge_is_a_wait(stops: Mapping[int, int], silent: bool) -> None:
    job = StalledJob(stops=stops)
    states = job.states(silent)
    faults = judge_hang(states, job.communicators)
    found = picture_of_waits(states, job.communicators, faults)
    if found is None:
        assert not faults
        return
    assert sorted(rank for group in found["groups"] for rank in group["ranks"]) == list(range(8))
    named = {rank for fault in faults for rank in fault.ranks}
    assert {rank for group in found["groups"] if group["reason"] for rank in group["ranks"]} == named
    stopped = {state.rank for state in states if state.silent_s}
    waits = wait_graph({state.rank: state for state in states}, job.communicators, silent=stopped)
    known = {(edge.victim, edge.blocker, edge.communicator) for edge in waits.edges()}
    ranks = {group["id"]: group["ranks"] for group in found["groups"]}
    for edge in found["edges"]:
        pairs = [(victim, blocker) for victim in ranks[edge["victim"]] for blocker in ranks[edge["blocker"]]]
        assert any((*pair, name) in known for pair in pairs for name in edge["communicators"])


def absent(ranks: int, root: int) -> tuple[list[RankState], dict[str, Communicator]]:
    """Tensor groups of 8 within a data-parallel job: ``root`` stopped before an all-reduce of its group; the ranks with
    its index in other groups are one operation further, all others two."""
    groups = {"world": Communicator("world", tuple(range(ranks)), "world")}
    for first in range(0, ranks, 8):
        groups[f"tp{first}"] = Communicator(f"tp{first}", tuple(range(first, first + 8)), "tp")
    for index in range(8):
        groups[f"dp{index}"] = Communicator(f"dp{index}", tuple(range(index, ranks, 8)), "dp")
    states = []
    for rank in range(ranks):
        tp, dp = f"tp{rank - rank % 8}", f"dp{rank % 8}"
        is_near = rank // 8 == root // 8
        done = {tp: 4 + (not is_near), dp: 1, "world": 0}
        stuck = None if rank == root else tp if is_near else dp
        counts = {name: Count(done[name] + (name == stuck), done[name]) for name in done}
        pending = () if stuck is None else (Pending(stuck, done[stuck] + 1, Op.ALL_REDUCE, 64, for_s=20.0),)
        states.append(RankState(rank, f"n{rank // 8}", counts, pending))
    return states, groups


@pytest.mark.parametrize("ranks", [128, 1024, 4096])
def test_a_hang_of_many_ranks_is_a_few_groups_that_account_for_all(ranks: int) -> None:
    states, groups = absent(ranks, 77)
    found = picture_of_waits(states, groups, judge_hang(states, groups))
    assert found is not None
    told = [(group["ranks_total"], group["hops_from_root"], group["reason"]) for group in found["groups"]]
    # The rest of its group, those that wait for it in the other direction, and those that wait for the rest.
    others = ranks // 8 - 1
    assert told == [(1, 0, "absent"), (others, 1, None), (7, 1, None), (7 * others, 2, None)]
    assert found["groups"][0]["ranks"] == [77]
    assert found["ranks_left_out_total"] == 0


def test_a_hang_of_a_job_of_three_axes_leaves_nobody_out() -> None:
    found = waits_of(StalledJob(dp=8, pp=4, tp=4, stops={37: 9}))
    assert found["groups"][0]["ranks"] == [37]
    assert len(found["groups"]) <= MOST_GROUPS
    assert sum(group["ranks_total"] for group in found["groups"]) + found["ranks_left_out_total"] == 128


def test_groups_too_many_to_be_drawn_lose_those_far_from_the_root() -> None:
    # A chain without end: each waits for the next in a group of its own, with names that have nothing in common.
    last = 60
    groups = {f"g{at}": Communicator(f"g{at}", (at, at + 1), f"name{at}") for at in range(last)}
    states = [
        RankState(
            at,
            counts={f"g{at}": Count(1, 0), f"g{at - 1}": Count(0, 0)},
            pending=(Pending(f"g{at}", 1, Op.ALL_REDUCE, 8, for_s=20.0),) if at < last else (),
        )
        for at in range(last + 1)
    ]
    faults = judge_hang(states, groups)
    found = picture_of_waits(states, groups, faults)
    assert found is not None
    assert [group["ranks"][0] for group in found["groups"]] == list(range(last, last - MOST_GROUPS, -1))
    assert (found["groups_total"], found["ranks_left_out_total"]) == (last + 1, last + 1 - MOST_GROUPS)


def test_where_a_root_is_in_its_program_is_told() -> None:
    job = StalledJob(stops={3: 7})
    states = job.states()
    states[3] = RankState(
        3, "n1", states[3].counts, stack="train.py:10 main\ndata.py:5 next_batch\n/lib/torch/cuda.py:3 sync"
    )
    found = picture_of_waits(states, job.communicators, judge_hang(states, job.communicators))
    assert found is not None
    assert found["groups"][0]["where"] == "data.py:5 next_batch"


# --- links --------------------------------------------------------------------------------------------------------
def layer_of(places: int, slow: tuple[int, int] | None = None, *, figure: str = "transfer", **more: Any) -> Layer:
    src, dst = np.nonzero(~np.eye(places, dtype=bool))
    values = np.random.default_rng(SEED).lognormal(-7, 0.01, src.size)
    if slow:
        values[(src == slow[0]) & (dst == slow[1])] *= 4
    return Layer(figure, "s", tuple(f"n{at}" for at in range(places)), src, dst, values, **more)


def test_a_slow_link_is_flagged_with_how_many_times_slower_it_is() -> None:
    found = picture_of_links(link_matrix(layer_of(6, (1, 3))))
    (cell,) = found["flagged"]
    assert (found["places"][found["src"][cell]], found["places"][found["dst"][cell]]) == ("n1", "n3")
    assert found["log2_ratio"][cell] == pytest.approx(2, abs=0.1)
    assert np.abs(np.delete(found["log2_ratio"], cell)).max() < 0.2
    assert [finding["places"] for finding in found["findings"]] == [["n1", "n3"]]


def test_of_a_figure_that_is_relative_one_is_normal() -> None:
    layer = Layer("change", "", ("a", "b"), np.array([0, 1]), np.array([1, 0]), np.array([2.0, 4.0]), is_relative=True)
    found = picture_of_links(link_matrix(layer))
    assert (found["normal"], found["log2_ratio"]) == (1.0, [1.0, 2.0])


def test_of_many_links_the_slow_one_is_kept() -> None:
    found = picture_of_links(link_matrix(layer_of(100, (98, 2))))
    assert found["cells_total"] == 9900 > len(found["values"])
    (cell,) = found["flagged"]
    assert (found["places"][found["src"][cell]], found["places"][found["dst"][cell]]) == ("n98", "n2")


# --- all of it ----------------------------------------------------------------------------------------------------
def worst_scene(ranks: int) -> Scene:
    """As many digits and names as there can be."""
    states, groups = absent(ranks, 77)
    steps = np.arange(10**9, 10**9 + 192)
    self_s = np.random.default_rng(SEED).lognormal(0, 3, (ranks, 192)).astype(np.float32)
    faults = [
        Fault(Kind.SLOW_COMPUTE, tuple(range(ranks)), job_nodes(ranks), evidence={"summary": "x" * 300})
        for _ in range(100)
    ]
    masks = np.full(self_s.shape, Mask.CHECKPOINT | Mask.EVALUATION | Mask.INCOMPLETE, np.uint32)
    figures = ("transfer", "change", "delivery", "round_trip", "retransmits", "more")
    matrices = tuple(link_matrix(layer_of(120, (5, 6), figure=figure)) for figure in figures)
    hang = judge_hang(states, groups)
    layout = Layout.from_sizes(ranks // 32, 4, 8)
    everything = (tuple(states), groups, tuple(hang + faults))
    return Scene(job_nodes(ranks), layout, steps, self_s, masks, matrices, *everything)


def job_nodes(ranks: int) -> tuple[str, ...]:
    return tuple(f"worker-{rank // 8:05d}.a-rather-long-name.cluster.example" for rank in range(ranks))


@pytest.mark.parametrize("ranks", [1024, 8192])
def test_pictures_stay_small_whatever_the_job(ranks: int) -> None:
    document = pictures(worst_scene(ranks), "run", "1-0000")
    assert has_something(document)
    data = encode(document)
    assert len(data) <= MOST_BYTES
    assert json.loads(data) == document
    assert (len(document["faults"]), document["faults_total"]) == (32, 101)


def test_of_a_job_of_which_nothing_is_known_there_is_nothing_to_draw() -> None:
    document = pictures(Scene.of(Judge(("a", "b")), (), {}, ()))
    assert not has_something(document)
    assert (document["steps"], document["waits"], document["links"]) == (None, None, [])


def test_the_judge_goes_on_without_changing_a_scene() -> None:
    job = Job(dp=4, pp=1, tp=1)
    judge = Judge(job.nodes, job.layout)
    chunks = [rows for chunk in simulate(job, (), 200, SEED) for rows in chunk.rows]
    for rows in chunks[:192]:
        judge.history.put(np.arange(4), rows)
    scene = Scene.of(judge, (), {}, ())
    before = encode(pictures(scene))
    for rows in chunks[192:]:
        judge.history.put(np.arange(4), rows)
    assert encode(pictures(scene)) == before


def test_of_a_figure_of_ranks_and_of_nodes_that_of_nodes_is_shown_and_the_worst_first() -> None:
    of_ranks, of_nodes = layer_of(4, is_of_ranks=True), layer_of(3)
    change = layer_of(6, (1, 2), figure="change", is_of_ranks=True)
    scene = scene_of(Job(dp=4, pp=1, tp=1), steps=5)
    matrices = tuple(map(link_matrix, (of_ranks, of_nodes, change)))
    drawn = Scene(scene.nodes, None, scene.steps, scene.self_s, scene.masks, matrices, (), {}, ())
    assert [(link["figure"], link["places_are"]) for link in pictures(drawn)["links"]] == [
        ("change", "ranks"),
        ("transfer", "nodes"),
    ]
