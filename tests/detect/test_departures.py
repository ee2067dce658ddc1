"""Who went first, and who went because of it."""

from __future__ import annotations

import signal

from ckptd.detect.departures import TOGETHER_S, judge_departures
from ckptd.detect.records import Confidence, Kind, RankState

GLOO = "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:3241"


def job(
    world_size: int,
    gone: dict[int, float],
    errors: dict[int, str] | None = None,
    per_node: int = 1,
    signals: dict[int, int] | None = None,
) -> list[RankState]:
    errors = errors or {}
    return [
        RankState(
            rank,
            f"n{rank // per_node}",
            is_dead=rank in gone and rank not in errors,
            gone_s=gone.get(rank),
            error=errors.get(rank, ""),
            signal=(signals or {}).get(rank, 0),
        )
        for rank in range(world_size)
    ]


def test_nobody_is_named_while_all_are_there() -> None:
    assert judge_departures(job(4, {})) == []


def test_the_first_to_go_is_named_and_those_that_followed_are_evidence() -> None:
    states = job(8, {2: 10.0, **{r: 10.1 + r / 100 for r in (0, 1, 3)}}, signals={2: signal.SIGKILL})
    (fault,) = judge_departures(states, step=7)
    assert (fault.kind, fault.ranks, fault.confidence, fault.since_step) == (Kind.DEATH, (2,), Confidence.VERIFIED, 7)
    assert fault.evidence["ranks_that_followed"] == [0, 1, 3]


def test_ranks_killed_together_are_all_named() -> None:
    (fault,) = judge_departures(job(8, {4: 10.0, 5: 10.0 + TOGETHER_S / 2, 0: 11.0}, per_node=4))
    assert fault.ranks == (4, 5)
    assert fault.nodes == ()


def test_a_node_whose_every_rank_died_at_once_is_named_as_a_node() -> None:
    (fault,) = judge_departures(job(8, {4: 10.0, 5: 10.0, 6: 10.001, 7: 10.002}, per_node=4))
    assert (fault.ranks, fault.nodes) == ((4, 5, 6, 7), ("n1",))


def test_a_rank_that_leaves_because_its_communication_failed_is_a_victim_even_when_it_was_heard_of_first() -> None:
    (fault,) = judge_departures(job(4, {0: 10.0, 1: 10.002}, {0: GLOO}))
    assert fault.ranks == (1,)


def test_a_rank_whose_own_program_failed_is_named_with_its_error() -> None:
    (fault,) = judge_departures(job(4, {3: 10.0, 0: 10.4, 1: 10.4, 2: 10.4}, {3: "ValueError: bad batch", 0: GLOO}))
    assert fault.ranks == (3,)
    assert fault.evidence["errors"] == {"3": "ValueError: bad batch"}


def test_a_job_that_was_ended_from_outside_is_nobodys_fault() -> None:
    assert judge_departures(job(8, dict.fromkeys(range(8), 10.0))) == []


def test_a_job_that_was_told_to_end_is_nobodys_fault_however_slowly_its_ranks_go() -> None:
    gone = {rank: 10.0 + rank / 10 for rank in range(4)}
    assert judge_departures(job(4, gone, signals=dict.fromkeys(range(4), signal.SIGTERM))) == []


def test_a_rank_that_the_launcher_killed_after_anothers_communication_failed_is_not_named() -> None:
    assert judge_departures(job(4, {2: 10.0, 0: 11.0, 1: 11.0}, {2: "RuntimeError: NCCL error: unhandled"})) == []


def test_ranks_that_abort_as_soon_as_one_is_killed_are_not_named() -> None:
    signals = {0: signal.SIGABRT, 1: signal.SIGKILL, 2: signal.SIGABRT}
    (fault,) = judge_departures(job(3, {0: 10.0, 1: 10.001, 2: 10.002}, signals=signals))
    assert (fault.ranks, fault.confidence) == ((1,), Confidence.VERIFIED)
    assert fault.evidence["ranks_that_followed"] == [0, 2]


def test_of_ranks_killed_together_one_whose_end_is_not_known_counts_as_well() -> None:
    killed = dict.fromkeys((0, 1, 2), signal.SIGKILL)
    assert judge_departures(job(4, dict.fromkeys(range(4), 10.0), signals=killed)) == []  # ended from outside
    (fault,) = judge_departures(job(8, {4: 10.0, 5: 10.0}, per_node=2, signals={4: signal.SIGKILL}))
    assert (fault.ranks, fault.nodes, fault.confidence) == ((4, 5), ("n2",), Confidence.CONFIRMED)


def test_how_sure_a_death_is_depends_on_what_is_known_of_it() -> None:
    (known,) = judge_departures(job(4, {1: 10.0}, signals={1: signal.SIGSEGV}))
    (unknown,) = judge_departures(job(4, {1: 10.0}))
    (raised,) = judge_departures(job(4, {1: 10.0}, {1: "ValueError: bad batch"}))
    assert (known.confidence, known.evidence["signals"]) == (Confidence.VERIFIED, {"1": "SIGSEGV"})
    assert unknown.confidence is raised.confidence is Confidence.CONFIRMED


def test_a_rank_that_aborted_itself_is_not_verified_as_its_nodes_fault() -> None:
    (fault,) = judge_departures(job(4, {1: 10.0}, signals={1: signal.SIGABRT}))
    assert (fault.ranks, fault.confidence) == ((1,), Confidence.CONFIRMED)


def test_a_signal_without_a_name_is_told_by_its_number() -> None:
    (fault,) = judge_departures(job(4, {1: 10.0}, signals={1: 40}))
    assert (fault.confidence, fault.evidence["signals"]) == (Confidence.VERIFIED, {"1": "signal 40"})


def test_of_two_ranks_that_die_at_once_both_are_named() -> None:
    assert sorted(fault.ranks for fault in judge_departures(job(2, {0: 10.0, 1: 10.0}))) == [(0,), (1,)]
