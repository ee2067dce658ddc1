"""Faults while daemons read from one another: halted, killed and restarted peers, flipped bits, full memory. Protection
ends, one way or the other, with the reason; nothing is made of garbage; and what is protected comes back bit for bit.
"""

from __future__ import annotations

import itertools
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fleet import Fleet, MakeFleet, flip_fragment, flip_image_block
from harness import wait_until
from shard_ranks import ShardJob

from ckptd.erasure.stripes import Stripes
from ckptd.errors import DaemonUnreachable, RestoreUndecided
from ckptd.model import Geometry

STRIPES = Stripes(Geometry(4, 2), 2)
PULLS = 8  # that a node serves for a step: each of 4 pieces to the 2 nodes that hold the parity of its stripe
HALTED = 3
IMPATIENT = ("--protect-deadline", 1, "--peer-silence", 1)


def check_whole(fleet: Fleet, job: ShardJob, step: int, lost: tuple[int, int]) -> None:
    """Two nodes go, and ``step`` comes back bit for bit."""
    job.close()
    fleet.lose(*lost)
    fleet.replace(*lost)
    restored, _ = ShardJob(fleet.daemons).restore()
    assert restored.step == step


# --- halted -------------------------------------------------------------------------------------------------------
def halting(pull: int, **options: Any) -> dict[str, Any]:
    """Options of a fleet whose node ``HALTED`` halts when it serves its ``pull``-th pull: what it sends just then may
    arrive or not."""
    return {"options_of": lambda p: {"failpoints": f"pull.batch=stop@{pull}"} if p == HALTED else {}, **options}


def test_while_a_peer_is_halted_the_others_go_on_with_what_does_not_need_it(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(6, **halting(2 * PULLS, flags=("--peer-silence", 60)))
    job = ShardJob(fleet.daemons)
    job.save(1)
    job.wait_protected(1)
    job.save(2)
    wait_until(lambda: fleet.daemons[HALTED].is_stopped, "the node to halt")
    wait_until(lambda: sum(map(len, fleet.parity(2).values())) >= 5, "what it had sent by then")
    fleet.daemons[HALTED].cont()
    job.wait_protected(2)
    assert not job.not_protected(2)
    check_whole(fleet, job, 2, (2, HALTED))


@pytest.mark.slow
def test_a_peer_that_is_halted_until_its_streams_are_cut_is_asked_again(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(6, **halting(PULLS + 4, flags=("--peer-silence", 2)))
    job = ShardJob(fleet.daemons)
    job.save(1)
    job.wait_protected(1)
    job.save(2)
    wait_until(lambda: fleet.daemons[HALTED].is_stopped, "the node to halt")
    wait_until(lambda: any("tried again" in daemon.log for daemon in fleet.daemons), "a stream to be cut")
    fleet.daemons[HALTED].cont()
    job.wait_protected(2)
    check_whole(fleet, job, 2, (2, HALTED))


@pytest.mark.slow
def test_a_peer_that_stays_halted_fails_the_step_by_name_and_the_next_is_protected(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(6, **halting(PULLS + 2, flags=IMPATIENT))
    name = fleet.daemons[HALTED].status()["node_id"]
    job = ShardJob(fleet.daemons)
    job.save(1)
    job.wait_protected(1)
    job.save(2)
    wait_until(lambda: job.not_protected(2), "protection of step 2 to be given up")
    assert job.not_protected(2).startswith("ProtectFailed: node ")
    assert name in job.not_protected(2)
    wait_until(lambda: job.marks["silent_nodes"] == [name], "the node to be missed")
    assert job.marks["protected"] == 1
    fleet.daemons[HALTED].cont()
    job.save(3)
    job.wait_protected(3)
    check_whole(fleet, job, 3, (0, HALTED))


@pytest.mark.slow
def test_a_step_that_could_not_be_protected_is_tried_again_once_the_peer_is_back(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(6, **halting(PULLS + 2, flags=IMPATIENT))
    job = ShardJob(fleet.daemons)
    job.save(1)
    job.wait_protected(1)
    job.save(2)
    wait_until(lambda: job.not_protected(2), "protection of step 2 to be given up")
    fleet.daemons[HALTED].cont()
    job.wait_protected(2)
    assert not job.not_protected(2)
    check_whole(fleet, job, 2, (1, HALTED))


@pytest.mark.slow
def test_a_peer_that_is_halted_at_a_restore_leaves_it_undecided_and_the_next_try_works(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(4)
    job = ShardJob(fleet.daemons, protect="2+2")
    job.save(1)
    job.wait_protected(1)
    job = ShardJob(fleet.daemons, protect="2+2")
    fleet.daemons[3].stop()
    with pytest.raises(RestoreUndecided, match=f"{fleet.daemons[3].listen} did not answer"):
        job.candidates()
    fleet.daemons[3].cont()
    restored, sources = job.restore()
    assert restored.step == 1
    assert set(sources.values()) == {"memory"}


# --- killed -------------------------------------------------------------------------------------------------------
DEATH_AT = {
    "before": "protect.before=kill@2",
    "batch": "protect.batch=kill@3",
    "before_seal": "protect.before_seal=kill@3",
    "flip": "parity.before_flip=kill@3",
    "pull": f"pull.batch=kill@{PULLS + 2}",
}
ALWAYS = [("before_seal", "another"), ("pull", "coordinator")]


DEATHS = [
    pytest.param(at, who, marks=() if (at, who) in ALWAYS else pytest.mark.slow)
    for at, who in itertools.product(DEATH_AT, ("coordinator", "another"))
]


@pytest.mark.parametrize(("at", "who"), DEATHS)
def test_a_daemon_killed_amid_protection_and_restarted_with_its_memory(
    make_fleet: MakeFleet, at: str, who: str
) -> None:
    position = 0 if who == "coordinator" else 3
    fleet = make_fleet(6, options_of=lambda p: {"failpoints": DEATH_AT[at]} if p == position else {})
    job = ShardJob(fleet.daemons)
    job.save(1)
    job.wait_protected(1)
    with suppress(DaemonUnreachable):  # it may die before it answers the rank whose shard was the last
        job.save(2, ranks=range(6))
    assert fleet.daemons[position].wait_exit() == -9
    fleet.daemons[position].restart()
    job.rejoin(fleet.daemons[position])
    job.wait_protected(2)
    job.save(3)
    job.wait_protected(3)
    check_whole(fleet, job, 3, (2, 3))


def test_the_coordinators_daemon_is_killed_while_others_protect_and_protection_ends_well(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(6, options_of=lambda p: {"failpoints": "protect.before_seal=stop@3"} if p == 4 else {})
    job = ShardJob(fleet.daemons)
    job.save(1)
    job.wait_protected(1)
    job.save(2)
    wait_until(lambda: fleet.daemons[4].is_stopped, "a node to halt before it seals")
    fleet.daemons[0].restart()
    job.rejoin(fleet.daemons[0])
    fleet.daemons[4].cont()
    job.wait_protected(2)
    job.save(3)
    job.wait_protected(3)
    check_whole(fleet, job, 3, (1, 4))


def test_the_coordinators_daemon_is_killed_while_a_restored_step_is_protected_anew(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(6)
    job = ShardJob(fleet.daemons)
    job.save(1)
    job.wait_protected(1)
    fleet.lose(2)
    fleet.daemons[2], *_ = fleet.start(1, failpoints="protect.before=stop@1")
    job = ShardJob(fleet.daemons)
    restored, _ = job.restore()
    wait_until(lambda: fleet.daemons[2].is_stopped, "the fresh node to halt")
    fleet.daemons[0].restart()
    job.rejoin(fleet.daemons[0])
    fleet.daemons[2].cont()
    job.wait_whole(restored, losses=2)
    check_whole(fleet, job, 1, (0, 5))


def test_a_coordinator_that_comes_back_does_not_ask_for_what_the_run_has_left_behind(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(4)
    job = ShardJob(fleet.daemons, protect="2+2")
    job.save(1)
    job.wait_protected(1)
    job = ShardJob(fleet.daemons, protect="2+2")
    job.restore()
    for step in (2, 3):
        job.save(step)
        job.wait_protected(step)
    fleet.daemons[0].restart()
    job.rejoin(fleet.daemons[0])
    wait_until(
        lambda: (job.marks["protected"], job.marks["protecting"]) == (3, None), "step 3 to be known as protected"
    )
    job.save(4)
    job.wait_protected(4)
    assert not job.marks["not_protected"]
    assert not [daemon.log for daemon in fleet.daemons if "is not in memory here" in daemon.log]


def test_a_coordinator_that_has_yet_to_hear_from_every_node_costs_no_snapshot(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(
        4,
    )
    job = ShardJob(fleet.daemons, protect="2+2")
    for step in (1, 2, 3):
        job.save(step)
        job.wait_protected(step)
    fleet.daemons[3].stop()  # it does not tell what it holds
    fleet.daemons[0].restart()
    job.rejoin(fleet.daemons[0])
    wait_until(lambda: job.marks["staged"] == 3, "step 3 to be known as staged")
    job.save(4, ranks=[0, 1, 2])
    fleet.daemons[3].cont()
    job.save(4, ranks=[3])
    job.wait_protected(4)
    assert not job.marks["dead"]


# --- flipped bits -------------------------------------------------------------------------------------------------
def test_a_bit_flipped_in_a_slot_before_it_is_pulled_is_named_and_no_parity_is_made_of_it(
    make_fleet: MakeFleet,
) -> None:
    fleet = make_fleet(6, flags=("--protect-deadline", 1))
    job = ShardJob(fleet.daemons)
    job.save(1)
    job.wait_protected(1)
    job.save(2, ranks=range(5))
    flip_image_block(fleet.daemons[2], step=2, block=3)
    job.save(2, ranks=[5])
    wait_until(lambda: job.not_protected(2), "protection of step 2 to be given up")
    reason = job.not_protected(2)
    assert reason.startswith("ProtectFailed: node ")
    assert f"node {fleet.daemons[2].status()['node_id']} at" in reason
    assert "does not match its CRC-32C" in reason
    spoiled = STRIPES.stripe_of(2, 3 // STRIPES.piece_blocks)
    every = {fragment for position in range(6) for fragment in STRIPES.parity_of(position)}
    made = {fragment for held in fleet.parity(2).values() for fragment in held}
    assert made == {(stripe, row) for stripe, row in every if stripe != spoiled}
    assert job.marks["protected"] == 1
    job.save(3)
    job.wait_protected(3)
    check_whole(fleet, job, 3, (2, 4))


def test_another_fragment_serves_where_one_has_a_flipped_bit(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(6)
    job = ShardJob(fleet.daemons)
    job.save(1)
    job.wait_protected(1)
    fleet.lose(4)
    for piece in range(4):  # the first parity of every stripe that the lost node gave a piece to
        stripe = STRIPES.stripe_of(4, piece)
        holder = STRIPES.parity_positions(stripe)[0]
        flip_fragment(fleet.daemons[holder], 1, stripe, 0)
    fleet.replace(4)
    restored, sources = ShardJob(fleet.daemons).restore()
    assert restored.step == 1
    assert sources[4] == "reconstruction"
    assert fleet.daemons[4].log.count("source set aside") == 4


def test_with_too_few_fragments_that_are_whole_the_next_candidate_serves(make_fleet: MakeFleet, tmp_path: Path) -> None:
    tier = f"file://{tmp_path}/tier"
    fleet = make_fleet(6, tiers=[f"{tier},every=1"])
    job = ShardJob(fleet.daemons)
    job.save(1, persist=True)
    job.wait_durable(1)
    job.save(2)
    job.wait_protected(2)
    wait_until(lambda: not any(fleet.parity(1).values()), "the parity of step 1 to be freed on every node")
    fleet.lose(0, 4)
    stripe = next(s for s in range(6) if not {0, 4} & set(STRIPES.parity_positions(s)))  # two pieces lost, no parity
    holder = STRIPES.parity_positions(stripe)[1]
    flip_fragment(fleet.daemons[holder], 2, stripe, 1)
    fleet.replace(0, 4)
    job = ShardJob(fleet.daemons)
    assert [(c.snapshot.step, list(c.sources)) for c in job.candidates().candidates] == [(2, ["memory"]), (1, [tier])]
    restored, sources = job.restore()
    assert restored.step == 1
    assert sources[0] == sources[4] == tier
    assert "does not match its CRC-32C" in fleet.daemons[0].log


# --- full memory --------------------------------------------------------------------------------------------------
SLOTS_BYTES = 3 * 828_384  # what three slots of the default shard take, as they are made when a rank joins
PARITY_BYTES = 2 * 205_000  # a step's on one node, at most


@pytest.mark.parametrize("steps_protected", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_where_memory_has_no_room_for_parity_the_reason_is_told_and_saves_go_on(
    make_fleet: MakeFleet, steps_protected: int
) -> None:
    memory = SLOTS_BYTES + steps_protected * PARITY_BYTES + PARITY_BYTES // 3
    fleet = make_fleet(6, options_of=lambda p: {"memory": f"{memory}"} if p == 1 else {})
    name = fleet.daemons[1].status()["node_id"]
    job = ShardJob(fleet.daemons, is_prepared=True)
    for step in range(1, steps_protected + 1):
        job.save(step)
        job.wait_protected(step)
    for step in range(steps_protected + 1, steps_protected + 5):
        job.save(step)
        wait_until(lambda step=step: job.not_protected(step), f"protection of step {step} to be given up")  # type: ignore[misc]
        assert job.not_protected(step).startswith(f"ProtectFailed: node {name}: memory is full: ")
        assert "parity of " in job.not_protected(step)
    assert job.marks["protected"] == (steps_protected or None)
    if steps_protected:
        check_whole(fleet, job, steps_protected, (2, 3))  # with what the full node lacks, too much for the later steps
