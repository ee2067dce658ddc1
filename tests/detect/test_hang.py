"""Who is named when a job stands still: roots by the right argument, and never a victim."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.detect.hang import HEARTBEATS, POST_MORTEM, HangThresholds, judge_hang
from ckptd.detect.records import Communicator, Confidence, Count, Fault, Kind, Pending, RankState
from ckptd.format.timings import Mask, Op
from tests.detect.stalled_job import Job
from tests.detect.waiting_ranks import FOUR, PAIR, idle, p2p, waits

layouts = st.sampled_from([(1, 1, 2), (2, 1, 1), (4, 1, 2), (1, 4, 1), (2, 2, 2), (3, 2, 1), (2, 3, 2)])


def told(faults: Sequence[Fault]) -> list[tuple[Kind, tuple[int, ...], str]]:
    return [(fault.kind, fault.ranks, fault.evidence["reason"]) for fault in faults]


def named(faults: Sequence[Fault]) -> set[int]:
    return {rank for fault in faults for rank in fault.ranks}


# --- one root -----------------------------------------------------------------------------------------------------
def test_an_absent_rank_that_is_alive_is_the_root() -> None:
    (fault,) = judge_hang([waits(0), idle(1), waits(2), waits(3)], FOUR)
    assert told([fault]) == [(Kind.HANG, (1,), "absent")]
    assert (fault.nodes, fault.confidence, fault.since_step) == (("n1",), Confidence.SUSPECT, 8)
    assert fault.evidence["waits"][0]["waiting"] == {"ranks": [0, 2, 3], "ranks_total": 3}
    assert fault.evidence["victims_total"] == 3


@pytest.mark.parametrize(
    ("waits_s", "mask", "confidence"),
    [
        (11.0, Mask.NONE, Confidence.SUSPECT),  # it may be saving
        (61.0, Mask.NONE, Confidence.CONFIRMED),
        (61.0, Mask.EVALUATION, Confidence.SUSPECT),  # it says so
    ],
)
def test_an_absent_rank_that_lives_is_a_suspect_for_as_long_as_a_rank_may_be_busy_alone(
    waits_s: float, mask: Mask, confidence: Confidence
) -> None:
    waiting = [
        replace(waits(rank), pending=tuple(replace(p, for_s=waits_s) for p in waits(rank).pending))
        for rank in (0, 2, 3)
    ]
    (fault,) = judge_hang([waiting[0], replace(idle(1), mask=int(mask)), *waiting[1:]], FOUR)
    assert (fault.ranks, fault.confidence) == ((1,), confidence)


def test_a_silent_rank_is_the_root_whatever_it_last_said() -> None:
    stopped = replace(waits(1, seq=4), silent_s=15.0)
    assert told(judge_hang([waits(0), stopped, waits(2), waits(3)], FOUR)) == [(Kind.HANG, (1,), "silent")]


def test_a_rank_that_went_silent_inside_an_operation_that_all_entered_is_the_root() -> None:
    states = [waits(0), replace(waits(1), silent_s=15.0), waits(2), waits(3)]
    assert told(judge_hang(states, FOUR)) == [(Kind.HANG, (1,), "silent")]


def test_a_silent_rank_that_nobody_waits_for_is_not_named() -> None:
    states = [waits(0), idle(1), replace(idle(2, group="h"), silent_s=99.0)]
    assert named(judge_hang(states, PAIR)) == {1}


def test_who_waits_for_a_dead_rank_is_a_victim() -> None:
    states = [waits(0), replace(waits(1), is_dead=True), waits(2), waits(3)]
    (fault,) = judge_hang(states, FOUR)
    assert told([fault]) == [(Kind.DEATH, (1,), "dead")]
    assert fault.evidence["victims_total"] == 3


def test_a_death_is_told_although_nobody_waits() -> None:
    assert told(judge_hang([idle(0), replace(idle(1), is_dead=True)], PAIR)) == [(Kind.DEATH, (1,), "dead")]


def test_beside_a_death_an_absent_rank_is_only_suspect() -> None:
    states = [waits(0), replace(idle(1), is_dead=True), waits(2), idle(3)]
    found = {fault.ranks: fault.confidence for fault in judge_hang(states, FOUR)}
    assert found == {(1,): Confidence.CONFIRMED, (3,): Confidence.SUSPECT}


def test_a_rank_that_left_is_no_death_but_the_root_when_others_wait_for_it() -> None:
    left = replace(idle(1), has_left=True)
    assert told(judge_hang([waits(0), left], PAIR)) == [(Kind.HANG, (1,), "left")]
    assert judge_hang([idle(0), left], PAIR) == []


def test_a_rank_never_heard_of_is_the_root_when_all_others_entered() -> None:
    (fault,) = judge_hang([waits(0), waits(2), waits(3)], FOUR)
    assert told([fault]) == [(Kind.HANG, (1,), "unheard")]
    assert (fault.nodes, fault.confidence) == ((), Confidence.SUSPECT)


def test_a_rank_never_heard_of_is_not_needed_when_another_is_known_to_be_absent() -> None:
    assert named(judge_hang([waits(0), idle(2), waits(3)], FOUR)) == {2}


def test_a_rank_that_keeps_open_what_a_peer_finished_is_stuck() -> None:
    states = [waits(0, 6), waits(1, 5), waits(2, 6), waits(3, 6)]
    (fault,) = judge_hang(states, FOUR)
    assert told([fault]) == [(Kind.HANG, (1,), "stuck")]
    assert fault.confidence is Confidence.CONFIRMED


def test_the_stuck_rank_may_have_entered_the_most() -> None:
    ahead = RankState(1, "n1", {"g": Count(9, 4)}, tuple(Pending("g", s, Op.ALL_REDUCE, 64) for s in range(5, 10)))
    states = [waits(0, 7), ahead, waits(2, 7), waits(3, 7)]
    assert named(judge_hang(states, FOUR)) == {1}


def test_a_broadcast_that_ended_at_its_root_accuses_nobody_who_waits_for_a_missing_member() -> None:
    states = [idle(0, 5), waits(1, 5, Op.BROADCAST), waits(2, 5, Op.BROADCAST), idle(3, 4)]
    assert told(judge_hang(states, FOUR)) == [(Kind.HANG, (3,), "absent")]


def test_two_roots_at_once_are_both_named_each_with_its_node() -> None:
    faults = judge_hang([waits(0), idle(1), waits(2), idle(3)], FOUR)
    assert [(fault.ranks, fault.nodes) for fault in faults] == [((1,), ("n1",)), ((3,), ("n3",))]


# --- chains -------------------------------------------------------------------------------------------------------
def test_only_the_end_of_a_chain_over_communicators_is_named() -> None:
    groups = {
        "tp": Communicator("tp", (0, 1)),
        "pp": Communicator("pp", (1, 2)),
        "dp": Communicator("dp", (2, 3)),
    }
    tp = waits(0, group="tp")
    pp = replace(waits(1, group="pp"), counts={"tp": Count(4, 4), "pp": Count(5, 4)})
    dp = replace(waits(2, group="dp"), counts={"pp": Count(4, 4), "dp": Count(5, 4)})
    (fault,) = judge_hang([tp, pp, dp, idle(3, group="dp")], groups)
    assert told([fault]) == [(Kind.HANG, (3,), "absent")]
    assert [wait["communicator"] for wait in fault.evidence["waits"]] == ["dp", "pp", "tp"]


def test_a_receive_waits_for_the_peer_that_never_sent() -> None:
    assert told(judge_hang([p2p(0, Op.RECV, 1), idle(1)], PAIR)) == [(Kind.HANG, (1,), "absent")]


def test_a_send_and_its_receive_that_both_pend_are_a_communication_hang_of_the_pair() -> None:
    faults = judge_hang([p2p(0, Op.RECV, 1, 3), p2p(1, Op.SEND, 0, 3)], PAIR)
    assert told(faults) == [(Kind.COMM_HANG, (0, 1), "closed")]


def test_a_receive_from_a_rank_never_heard_of_names_it() -> None:
    assert told(judge_hang([p2p(0, Op.RECV, 1)], PAIR)) == [(Kind.HANG, (1,), "unheard")]


def test_ranks_that_enter_two_communicators_in_different_orders_are_a_fault_of_the_program() -> None:
    groups = {name: Communicator(name, (0, 1)) for name in ("a", "b")}
    states = [waits(0, group="a"), waits(1, group="b")]
    (fault,) = judge_hang(states, groups)
    assert told([fault]) == [(Kind.DESYNC, (0, 1), "cycle")]
    assert fault.nodes == ()


def test_a_host_that_stopped_with_a_send_open_is_told_by_a_peer_that_passed_with_the_same_send_open() -> None:
    groups = {
        "pp0": Communicator("pp0", (0, 2), "pp"),
        "pp1": Communicator("pp1", (1, 3), "pp"),
        "tp": Communicator("tp", (0, 1), "tp"),
        "world": Communicator("world", (0, 1, 2, 3), "world"),
    }
    sends = [Pending(f"pp{rank}", 3, Op.SEND, 64, rank + 2, 20.0) for rank in range(2)]
    rest = {"tp": Count(4, 4), "world": Count(6, 6)}
    went_on = RankState(1, "", {**rest, "tp": Count(5, 4)}, (sends[1], Pending("tp", 5, Op.ALL_REDUCE, 64, for_s=19.0)))
    states = [RankState(0, "", rest, (sends[0],)), went_on, *(waits(rank, 7, group="world") for rank in (2, 3))]
    (fault,) = judge_hang(states, groups)
    assert told([fault]) == [(Kind.HANG, (0,), "behind")]
    assert fault.confidence is Confidence.SUSPECT


def test_a_receive_from_anyone_accuses_nobody() -> None:
    assert judge_hang([p2p(0, Op.RECV, -1), idle(1)], PAIR) == []


def test_an_operation_of_an_unknown_communicator_accuses_nobody() -> None:
    assert judge_hang([waits(0, group="unknown"), idle(1)], PAIR) == []


# --- communication ------------------------------------------------------------------------------------------------
def test_when_all_entered_and_none_finished_the_communicator_is_the_culprit() -> None:
    (fault,) = judge_hang([waits(rank) for rank in range(4)], FOUR)
    assert told([fault]) == [(Kind.COMM_HANG, (0, 1, 2, 3), "closed")]
    assert fault.confidence is Confidence.SUSPECT
    assert (fault.evidence["communicator"], fault.evidence["label"]) == ("g", "dp")


def test_a_link_on_which_nothing_moves_narrows_a_communication_hang() -> None:
    (fault,) = judge_hang([waits(rank) for rank in range(4)], FOUR, slow_links=[(2, 3), (3, 9)])
    assert (fault.ranks, fault.nodes) == ((2, 3), ("n2", "n3"))
    assert fault.evidence["members"]["ranks"] == [0, 1, 2, 3]


def test_a_communicator_whose_members_are_held_by_an_older_operation_is_not_the_culprit() -> None:
    groups = {"small": Communicator("small", (0, 1)), "world": Communicator("world", (0, 1, 2, 3))}
    older = Pending("small", 2, Op.ALL_REDUCE, 64, for_s=20.0)
    newer = Pending("world", 5, Op.ALL_REDUCE, 64, for_s=19.0)
    counts = {"small": Count(2, 1), "world": Count(5, 4)}
    states = [RankState(r, "", counts, (newer, older) if r < 2 else (newer,)) for r in range(4)]
    (fault,) = judge_hang(states, groups)
    assert (fault.kind, fault.ranks) == (Kind.COMM_HANG, (0, 1))


def test_a_closed_communicator_is_no_culprit_while_a_root_explains_one_of_its_members() -> None:
    groups = {"small": Communicator("small", (0, 1)), "world": Communicator("world", (0, 1, 2))}
    older = Pending("small", 2, Op.ALL_REDUCE, 64, for_s=20.0)
    newer = Pending("world", 5, Op.ALL_REDUCE, 64, for_s=19.0)
    both = RankState(0, "", {"small": Count(2, 1), "world": Count(5, 4)}, (older, newer))
    one = RankState(1, "", {"small": Count(2, 1), "world": Count(4, 4)}, (older,))
    assert told(judge_hang([both, one, idle(2, group="world")], groups)) == [(Kind.HANG, (2,), "absent")]


def test_of_many_communicators_that_hang_at_once_the_smallest_speaks() -> None:
    groups = {f"g{i}": Communicator(f"g{i}", tuple(range(4 * i, 4 * i + 4 - (i == 3)))) for i in range(6)}
    states = [waits(rank, group=name) for name, group in groups.items() for rank in group.members]
    (fault,) = judge_hang(states, groups)
    assert fault.ranks == (12, 13, 14)
    assert fault.evidence["closed_total"] == 6


# --- desync -------------------------------------------------------------------------------------------------------
def test_a_different_size_is_a_desync_that_names_the_minority_and_no_node() -> None:
    states = [waits(0), waits(1), waits(2, size_bytes=128), waits(3)]
    (fault,) = judge_hang(states, FOUR)
    assert told([fault]) == [(Kind.DESYNC, (2,), "desync")]
    assert fault.nodes == ()
    one, most = fault.evidence["mismatches"][0]["signatures"]
    assert (one["size_bytes"], one["ranks"], one["where"]) == (128, [2], "train.py:2")
    assert (most["size_bytes"], most["ranks"], most["where"]) == (64, [0, 1, 3], "train.py:0")


def test_a_desync_of_two_names_both() -> None:
    assert told(judge_hang([waits(0), waits(1, op=Op.BROADCAST)], PAIR)) == [(Kind.DESYNC, (0, 1), "desync")]


def test_a_skipped_collective_is_seen_in_what_was_entered_under_its_number() -> None:
    program = [(Op.ALL_REDUCE, 64), (Op.ALL_REDUCE, 32), (Op.BROADCAST, 8), (Op.ALL_REDUCE, 64)]

    def rank_state(rank: int, ops: list[tuple[Op, int]]) -> RankState:
        seq = len(ops)
        signatures = {("g", number): signature for number, signature in enumerate(ops, 1)}
        pending = (Pending("g", seq, *ops[-1]),)
        return RankState(rank, "", {"g": Count(seq, seq - 1)}, pending, signatures)

    states = [rank_state(rank, program) for rank in range(3)] + [rank_state(3, program[:1] + program[2:])]
    (fault,) = judge_hang(states, FOUR)
    assert told([fault]) == [(Kind.DESYNC, (3,), "desync")]
    assert fault.evidence["mismatches"][0]["seq"] == 2


def test_a_skip_that_looks_alike_is_told_at_the_end_as_a_rank_that_left_or_is_absent() -> None:
    states = [waits(rank, 10) for rank in range(3)]
    for last, reason in ((idle(3, 9), "absent"), (replace(idle(3, 9), has_left=True), "left")):
        (fault,) = judge_hang([*states, last], FOUR)
        assert told([fault]) == [(Kind.HANG, (3,), reason)]
        assert fault.evidence["counts"] == {"3": {"g": [9, 9]}}


def test_uneven_sizes_are_the_right_of_all_to_all() -> None:
    states = [
        waits(0, op=Op.ALL_TO_ALL),
        waits(1, op=Op.ALL_TO_ALL, size_bytes=99),
        idle(2),
        waits(3, op=Op.ALL_TO_ALL),
    ]
    assert told(judge_hang(states, FOUR)) == [(Kind.HANG, (2,), "absent")]


@pytest.mark.parametrize("skipper", [0, 1])
def test_where_two_ranks_differ_the_one_that_left_the_program_is_named_by_what_came_before(skipper: int) -> None:
    program = {("world", seq): (Op.ALL_REDUCE, 4 if seq % 3 == 0 else 4096) for seq in range(1, 13)}
    program["world", 1] = (Op.BROADCAST, 7)  # as jobs begin
    states = []
    for rank in range(2):
        seq, size_bytes = 12, 4096 if rank == skipper else 4
        pending = Pending("world", seq, Op.ALL_REDUCE, size_bytes)
        past = {key: signature for key, signature in program.items() if key[1] < seq}
        states.append(RankState(rank, f"n{rank}", {"world": Count(12, 11)}, (pending,), past))
    (fault,) = judge_hang(states, {"world": Communicator("world", (0, 1))})
    assert (fault.kind, fault.ranks) == (Kind.DESYNC, (skipper,))


def test_a_point_to_point_operation_under_the_same_number_hides_no_desync() -> None:
    states = [replace(idle(0), signatures={("g", 5): (Op.SEND, 9)}), waits(1), waits(2), waits(3, size_bytes=1)]
    assert told(judge_hang(states, FOUR)) == [(Kind.DESYNC, (3,), "desync")]


def test_after_a_desync_only_deaths_are_told_beside_it() -> None:
    states = [waits(0), waits(1, size_bytes=1), idle(2), replace(idle(3), is_dead=True)]
    assert [fault.kind for fault in judge_hang(states, FOUR)] == [Kind.DESYNC, Kind.DEATH]


def test_a_mismatch_of_the_past_in_a_communicator_at_rest_is_no_desync() -> None:
    groups = {**FOUR, "h": Communicator("h", (0, 2))}
    states = [waits(0), idle(1), waits(2), waits(3)]
    states[0] = replace(states[0], signatures={("h", 1): (Op.ALL_GATHER, 5)})
    states[2] = replace(states[2], signatures={("h", 1): (Op.ALL_GATHER, 6)})
    assert named(judge_hang(states, groups)) == {1}


# --- whole jobs ---------------------------------------------------------------------------------------------------
@st.composite
def stopped_jobs(draw: st.DrawFn, ahead: int, most: int) -> Job:
    dp, pp, tp = draw(layouts)
    ranks = draw(st.sets(st.integers(0, dp * pp * tp - 1), min_size=1, max_size=most))
    return Job(dp, pp, tp, ahead=ahead, stops={rank: draw(st.integers(0, 14)) for rank in sorted(ranks)})


@settings(max_examples=60)
@given(stopped_jobs(ahead=1, most=3))
def test_in_a_job_that_blocks_exactly_the_stopped_ranks_that_others_wait_for_are_named(job: Job) -> None:
    absent = {rank for rank in job.waited_for() if not job.open_calls(rank)}
    assert named(judge_hang(job.states(), job.communicators)) == absent


@settings(max_examples=60)
@given(stopped_jobs(ahead=4, most=3))
def test_no_victim_is_named_however_far_hosts_run_ahead(job: Job) -> None:
    found = named(judge_hang(job.states(silent=True), job.communicators))
    assert job.waited_for(by_running_only=True) <= found <= set(job.stops)


@settings(max_examples=60)
@given(stopped_jobs(ahead=4, most=1), st.sampled_from([HEARTBEATS, POST_MORTEM]))
def test_one_host_that_stopped_is_found_from_its_peers_alone(job: Job, thresholds: HangThresholds) -> None:
    found = named(judge_hang(job.states(), job.communicators, thresholds))
    assert found <= set(job.stops)
    assert bool(found) == bool(job.waited_for())


def test_a_healthy_job_has_no_faults() -> None:
    job = Job()
    assert judge_hang(job.states(), job.communicators) == []


def test_a_world_of_one_has_no_faults() -> None:
    assert judge_hang([idle(0)], {"g": Communicator("g", (0,))}) == []
    assert judge_hang([], {}) == []


def test_evidence_is_plain_json_and_small_in_a_large_job() -> None:
    everybody = {"g": Communicator("g", tuple(range(4096)))}
    (fault,) = judge_hang([waits(rank) for rank in range(4095)] + [idle(4095)], everybody)
    assert fault.ranks == (4095,)
    assert len(json.dumps(dict(fault.evidence))) < 2000
