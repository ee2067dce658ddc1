"""Slow communication is found and narrowed as far as can be known; waiting for a late rank is no slow network."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from link_model import Network, group

from ckptd.detect.baseline import Assembly, Columns, Tracks
from ckptd.detect.kernel_links import PeerLink
from ckptd.detect.records import Communicator, Confidence, Fault, Kind
from ckptd.detect.slow_comm import CommJudge, tomography
from ckptd.format.timings import Op

Sends = Sequence[tuple[Communicator, int, int]]
SEEDS = range(4)


def nodes(count: int, ranks: int = 1) -> list[str]:
    return [f"n{rank // ranks}" for rank in range(count * ranks)]


def grid(rows: int, columns: int) -> list[Communicator]:
    """Ranks in a grid: a communicator for each row, and one for each column."""
    count = rows * columns
    across = [group(f"row{i}", *range(i * columns, (i + 1) * columns), label="shard") for i in range(rows)]
    return across + [group(f"column{j}", *range(j, count, columns), label="replicate") for j in range(columns)]


def both_ways(comm: Communicator) -> list[tuple[Communicator, int, int]]:
    ranks = comm.members
    return [(comm, *ends) for a, b in pairwise(ranks) for ends in ((a, b), (b, a))]


def run(
    network: Network, steps: int, comms: Sequence[Communicator] = (), sends: Sends = (), size: int = 1 << 24
) -> tuple[list[Fault], dict[Confidence, int]]:
    """The faults at the end, and the step at which a first one of each confidence was found."""
    judge, first, faults = CommJudge(network.node_of), {}, []
    for step in range(steps):
        for comm in comms:
            network.collective(comm, step, size)
        for comm, src, dst in sends:
            network.send(comm, src, dst, step)
        judge.take(network.timings())
        faults = judge.judge()
        for fault in faults:
            first.setdefault(fault.confidence, step)
    return faults, first


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("since", [0, 47])
def test_a_node_with_a_slow_network_is_named_within_50_operations(seed: int, since: int) -> None:
    network = Network(nodes(16), nics={"n5": 4.0}, since=since, seed=seed)
    (fault,), first = run(network, since + 50, grid(4, 4))
    assert (fault.kind, fault.nodes, fault.ranks) == (Kind.SLOW_COMM, ("n5",), (5,))
    assert fault.confidence is Confidence.CONFIRMED
    assert first[Confidence.SUSPECT] < first[Confidence.CONFIRMED] < since + 50
    assert abs(fault.since_step - since) < 20
    assert fault.evidence["ratio"] == pytest.approx(4.0, rel=0.2)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("since", [30, 41])
def test_between_two_ranks_the_link_is_named_within_50_operations(seed: int, since: int) -> None:
    network = Network(nodes(2), links={("n0", "n1"): 4.0}, since=since, seed=seed)
    (fault,), _ = run(network, since + 50, [group("world", 0, 1)])
    assert (fault.kind, fault.nodes, fault.ranks) == (Kind.SLOW_LINK, ("n0", "n1"), (0, 1))
    assert fault.confidence is Confidence.CONFIRMED


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("since", [0, 30])
def test_a_slow_link_of_a_pipeline_is_named_within_50_operations(seed: int, since: int) -> None:
    network = Network(nodes(5), links={("n1", "n2"): 4.0}, since=since, seed=seed)
    (fault,), _ = run(network, since + 50, sends=both_ways(group("pipeline", *range(5))))
    assert (fault.kind, fault.nodes, fault.ranks) == (Kind.SLOW_LINK, ("n1", "n2"), (1, 2))
    assert fault.confidence is Confidence.CONFIRMED


@pytest.mark.parametrize("since", [0, 30])
def test_a_slow_link_at_the_end_of_a_pipeline_is_named_without_certainty(since: int) -> None:
    network = Network(nodes(4), links={("n0", "n1"): 4.0}, since=since)
    (fault,), _ = run(network, since + 50, sends=both_ways(group("pipeline", *range(4))))
    assert (fault.nodes, fault.confidence) == (("n0", "n1"), Confidence.SUSPECT)
    assert not fault.evidence["is_separable"]


@pytest.mark.parametrize("since", [0, 30])
def test_a_slow_node_of_a_pipeline_is_that_node(since: int) -> None:
    network = Network(nodes(5), nics={"n2": 4.0}, since=since)
    (fault,), _ = run(network, since + 50, sends=both_ways(group("pipeline", *range(5))))
    assert (fault.kind, fault.nodes, fault.ranks) == (Kind.SLOW_LINK, ("n2",), (2,))


def test_one_slow_pair_of_ranks_is_named_where_the_rest_of_its_nodes_is_well() -> None:
    network = Network(nodes(4, ranks=2), seed=3)
    faulty = Network(nodes(4, ranks=2), links={("n1", "n2"): 4.0}, seed=4)
    lanes = [group(f"lane{lane}", *range(lane, 8, 2)) for lane in (0, 1)]
    judge = CommJudge(network.node_of)
    for step in range(50):
        for lane, of in ((0, network), (1, faulty)):
            for comm, src, dst in both_ways(lanes[lane]):
                of.send(comm, src, dst, step)
            judge.take(of.timings())
        faults = judge.judge()
    (fault,) = faults
    assert (fault.nodes, fault.ranks) == (("n1", "n2"), (3, 5))


@pytest.mark.parametrize("since", [0, 30])
def test_a_slow_rail_is_the_rank_that_uses_it(since: int) -> None:
    ranks = np.arange(32).reshape(4, 4, 2)  # rows and columns of nodes, two ranks each
    lanes = [ranks[i, :, lane] for i in range(4) for lane in (0, 1)]
    lanes += [ranks[:, j, lane] for j in range(4) for lane in (0, 1)]
    comms = [group(f"{at}", *members.tolist(), label="row" if at < 8 else "column") for at, members in enumerate(lanes)]
    of_rail = [comm for comm in comms if 11 in comm.members]
    well, ill = Network(nodes(16, 2)), Network(nodes(16, 2), nics={"n5": 4.0}, since=since, seed=1)
    judge = CommJudge(well.node_of)
    for step in range(since + 50):
        for comm in comms:
            (ill if comm in of_rail else well).collective(comm, step)
        judge.take(well.timings())
        judge.take(ill.timings())
        faults = judge.judge()
    (fault,) = faults
    assert (fault.nodes, fault.ranks) == (("n5",), (11,))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_slow_link_in_one_communicator_blames_no_node(seed: int) -> None:
    network = Network(nodes(16), links={("n5", "n6"): 4.0}, since=30, seed=seed)
    (fault,), _ = run(network, 80, grid(4, 4))
    assert (fault.kind, fault.nodes, fault.ranks) == (Kind.SLOW_COMM, (), ())
    assert fault.evidence["communicators"] == ["row1"]
    assert fault.evidence["members"] == [4, 5, 6, 7]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("noise", [0.02, 0.1, 0.3])
def test_a_healthy_job_has_no_confirmed_fault(seed: int, noise: float) -> None:
    comms = [*grid(4, 4), group("world", *range(16))]
    network = Network(nodes(16), noise=noise, seed=seed)
    _, first = run(network, 200, comms, both_ways(group("pipeline", *range(16))))
    assert Confidence.CONFIRMED not in first


@pytest.mark.parametrize("seed", SEEDS)
def test_waiting_for_a_late_rank_is_no_slow_communication(seed: int) -> None:
    network = Network(nodes(16), late_s={5: 0.2}, seed=seed)
    _, first = run(network, 120, grid(4, 4), both_ways(group("pipeline", *range(16))))
    assert first == {}


def test_rooted_operations_are_not_judged() -> None:
    network = Network(nodes(4), nics={"n1": 8.0}, since=30)
    judge = CommJudge(network.node_of)
    for step in range(100):
        network.collective(group("world", *range(4)), step, op=Op.BROADCAST)
        judge.take(network.timings())
        assert judge.judge() == []


def test_kernels_narrow_a_slow_communicator_to_a_link() -> None:
    network = Network(nodes(4), links={("n1", "n2"): 4.0}, since=30)
    judge = CommJudge(network.node_of)
    for step in range(80):
        network.collective(group("world", *range(4)), step)
    judge.take(network.timings())
    (broad,) = judge.judge()
    assert (broad.kind, broad.ranks, broad.evidence["member_count"]) == (Kind.SLOW_COMM, (), 4)
    ends = [(a, b) for a in range(4) for b in range(4) if a != b]
    rates = [PeerLink(f"n{a}", f"n{b}", delivery_bytes_per_s=1e9 / (4 if {a, b} == {1, 2} else 1)) for a, b in ends]
    well = [PeerLink(peer.src, peer.dst, delivery_bytes_per_s=1e9) for peer in rates]
    for answer in (well, well, well, rates):
        assert judge.judge(answer) == [broad]  # one bad answer says little
    (fault,) = judge.judge(rates)
    assert (fault.kind, fault.nodes, fault.confidence) == (Kind.SLOW_LINK, ("n1", "n2"), Confidence.CONFIRMED)


def test_what_an_excused_rank_takes_part_in_is_not_held_against_the_network() -> None:
    network = Network(nodes(4), nics={"n1": 4.0}, since=30)
    judge = CommJudge(network.node_of)
    for step in range(80):
        network.collective(group("world", *range(4)), step)
    judge.take(network.timings())
    assert judge.judge()
    assert judge.judge(excused=(1,)) == []


def test_a_slow_communicator_inside_a_node_is_that_node_and_sure_only_against_siblings() -> None:
    inside = [group(f"tp{node}", 2 * node, 2 * node + 1, label="tp") for node in range(8)]
    judge = CommJudge(nodes(8, ranks=2))
    well, ill = Network(nodes(8, ranks=2)), Network([f"n{rank}" for rank in range(16)], seed=1)
    for step in range(50):
        for comm in inside:
            (ill if comm.id == "tp3" else well).collective(comm, step)  # between nodes: ten times slower
        judge.take(well.timings())
        judge.take(ill.timings())
    (fault,) = judge.judge()
    assert (fault.kind, fault.nodes, fault.ranks) == (Kind.SLOW_COMM, ("n3",), (6, 7))
    assert (fault.confidence, fault.evidence["against"]) == (Confidence.CONFIRMED, "siblings")


@pytest.mark.parametrize("count", [1, 2])
def test_what_slows_down_inside_nodes_without_fast_siblings_names_no_rank_and_is_not_sure(count: int) -> None:
    """As on a node whose processors are busy; of a job on one node, the node itself is no news."""
    at_nodes = nodes(count, ranks=4)
    groups = [group(f"inside{node}", *range(4 * node, 4 * node + 4)) for node in range(count)]
    fast, slow = Network(at_nodes), Network([f"n{rank}" for rank in range(4 * count)], seed=1)
    judge = CommJudge(at_nodes)
    for step in range(100):
        for comm in groups:
            (slow if step >= 50 else fast).collective(comm, step)
        judge.take(fast.timings())
        judge.take(slow.timings())
    faults = judge.judge()
    assert len(faults) == count
    for fault in faults:
        assert (fault.kind, fault.ranks, fault.confidence) == (Kind.SLOW_COMM, (), Confidence.SUSPECT)
        assert len(fault.nodes) == (count > 1)
        assert fault.evidence["member_count"] == 4


def test_when_all_communication_slows_down_no_node_is_named() -> None:
    network = Network(nodes(16), nics={f"n{at}": 3.0 for at in range(16)}, since=40)
    (fault,), _ = run(network, 100, grid(4, 4))
    assert (fault.nodes, fault.ranks, fault.confidence) == ((), (), Confidence.SUSPECT)


def test_small_operations_that_do_not_feel_a_slow_link_clear_nobody() -> None:
    network = Network(nodes(16), nics={"n5": 4.0})
    judge = CommJudge(network.node_of)
    for step in range(50):
        for comm in grid(4, 4):
            network.collective(comm, step, 64)
            network.collective(comm, step)
        judge.take(network.timings())
    (fault,) = judge.judge()
    assert fault.nodes == ("n5",)


@settings(max_examples=15)
@given(st.lists(st.integers(0, 79), max_size=12), st.booleans())
def test_samples_handed_over_twice_count_once(cuts: list[int], by_rank: bool) -> None:
    network = Network(nodes(4), nics={"n1": 4.0}, since=40)
    for step in range(80):
        network.collective(group("world", *range(4)), step)
    whole = network.timings(keep=True)
    once, often = CommJudge(network.node_of), CommJudge(network.node_of)
    once.take(whole)
    rows = {rank: network.rows[rank] for rank in range(4)}
    ends = sorted({*cuts, *range(10, 81, 10)})  # a rank is never more than that behind another
    for begin, end in pairwise([0, *ends]):
        for ranks in [[0], [1, 2, 3]] if by_rank else [[0, 1, 2, 3]]:
            network.rows = {rank: rows[rank][max(begin - 5, 0) : end] for rank in rows}
            often.take(network.timings(ranks, keep=True))
    assert once.judge()
    assert [(f.nodes, f.evidence) for f in often.judge()] == [(f.nodes, f.evidence) for f in once.judge()]


def columns(rows: Sequence[tuple[int, int, int, int, float, int]]) -> Columns:
    channel, seq, step, size, seconds, rank = (np.array(column) for column in zip(*rows, strict=True))
    return Columns(channel, seq, step, size, seconds.astype(np.float64), rank)


def test_a_transfer_is_the_shortest_duration_once_all_members_are_there() -> None:
    assembly, members = Assembly(), np.array([2, 3])
    assert not assembly.take(
        columns([(0, 1, 0, 8, 0.5, 0), (1, 1, 0, 8, 0.1, 0), (1, 1, 0, 8, 0.3, 1)]), members
    ).seq.size
    done = assembly.take(columns([(0, 1, 0, 8, 0.2, 1)]), members)
    assert (done.channel.tolist(), done.seconds.tolist(), done.rank.tolist()) == ([0], [0.2], [1])
    done = assembly.take(columns([(0, 1, 0, 8, 0.2, 1), (1, 1, 1, 8, 0.4, 2)]), members)
    assert (done.channel.tolist(), done.seconds.tolist(), done.rank.tolist()) == ([1], [0.1], [0])


def test_a_transfer_that_lacks_few_of_many_members_counts_late_and_one_that_lacks_more_never() -> None:
    assembly, members = Assembly(), np.array([100, 100, 1])
    rows = [(0, 1, 0, 8, 0.5, rank) for rank in range(98)] + [(1, 1, 0, 8, 0.5, rank) for rank in range(97)]
    assert not assembly.take(columns(rows), members).seq.size
    done = assembly.take(columns([(2, 1, 16, 8, 0.5, 0)]), members)
    assert sorted(done.channel.tolist()) == [0, 2]


def test_sparse_numbers_are_joined_as_dense_ones_are() -> None:
    numbers = [1, 10**6, 10**11]
    rows = [(0, seq, 0, 8, 0.1 * (rank + 1), rank) for rank in range(2) for seq in numbers]
    done = Assembly().take(columns(rows), np.array([2]))
    assert (sorted(done.seq.tolist()), set(done.seconds.tolist())) == (numbers, {0.1})


def test_windows_close_at_twenty_operations_also_where_few_of_them_are_sampled() -> None:
    for stride, samples in ((1, 20), (4, 6), (8, 5)):
        tracks = Tracks()
        for at in range(samples):
            assert not tracks.state.size or tracks.state["closed"][0] == 0
            tracks.take(columns([(0, 1 + at * stride, at, 8, 0.5, 0)]), np.zeros(1, np.int64))
        assert tracks.state["closed"][0] == 1


@given(st.integers(0, 999), st.floats(0.0, 0.2), st.integers(1, 7))
def test_what_was_slow_is_not_learnt_as_normal(seed: int, noise: float, batch: int) -> None:
    random = np.random.default_rng(seed)
    seconds = np.where(np.arange(1, 801) > 200, 4.0, 1.0) * random.lognormal(0, noise, 800)
    tracks = Tracks()
    for begin in range(0, 800, batch * 20):
        rows = [(0, seq + 1, seq, 8, seconds[seq], 0) for seq in range(begin, min(begin + batch * 20, 800))]
        tracks.take(columns(rows), np.zeros(len(rows), np.int64))
    assert (tracks.state["streak"][0], tracks.state["since"][0], tracks.state["closed"][0]) == (30, 200, 40)


def test_tomography_names_nobody_where_two_explanations_are_as_good() -> None:
    rows = [np.arange(i * 4, i * 4 + 4) for i in range(4)]
    places = rows + [np.arange(j, 16, 4) for j in range(4)]
    is_slow = np.array([at in (0, 2, 4, 5) for at in range(8)])  # two of rows, two of columns: four crossings
    assert tomography(places, is_slow, np.ones(8, np.bool_), np.where(is_slow, 4.0, 1.0)) == []
    is_slow = np.array([at in (0, 4) for at in range(8)])
    ((place, covered),) = tomography(places, is_slow, np.ones(8, np.bool_), np.where(is_slow, 4.0, 1.0))
    assert (place, covered.tolist()) == (0, [0, 4])


def test_a_world_of_one_or_without_samples_has_no_fault() -> None:
    network = Network(nodes(1))
    judge = CommJudge(network.node_of)
    judge.take(network.timings())
    for step in range(60):
        network.collective(group("world", 0), step)
    judge.take(network.timings())
    assert judge.judge() == []
