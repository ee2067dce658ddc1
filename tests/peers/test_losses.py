"""Nodes lost with their memory at 4+2, every single one and every pair, in every phase of protection: what is restored
is the newest step that is complete by rule, bit for bit, and it is protected again on the nodes that took their place.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from daemon_nursery import DaemonNursery
from fleet import Fleet, MakeFleet
from harness import Nursery, Stage, wait_until
from shard_ranks import ShardJob

from ckptd.erasure.stripes import Stripes
from ckptd.errors import RestoreUndecided
from ckptd.model import Geometry, SnapshotId

NODES = range(6)
LOSSES = [*itertools.combinations(NODES, 1), *itertools.combinations(NODES, 2)]
FOR_EVER = "sleep:600"

Lost = tuple[int, ...]


def some(fast: Sequence[Lost]) -> list[Any]:
    """Every loss; those that are not in ``fast`` run in `make test-all` only."""
    return [pytest.param(lost, marks=() if lost in fast else pytest.mark.slow, id=name(lost)) for lost in LOSSES]


def name(lost: Lost) -> str:
    return "node-" + "-and-".join(map(str, lost))


def restore(fleet: Fleet, lost: Lost, **options: Any) -> tuple[ShardJob, SnapshotId]:
    """Fresh daemons take the place of the lost ones, and the job is started again: every byte is compared. What the
    survivors hold stays where it is, the rest is reconstructed."""
    fleet.replace(*lost)
    job = ShardJob(fleet.daemons, **options)
    snapshot, sources = job.restore()
    assert sources == {rank: "reconstruction" if rank in lost else "memory" for rank in NODES}
    return job, snapshot


# --- after protection ---------------------------------------------------------------------------------------------
class Home:
    """A fleet whose newest step is protected. It serves one loss after the other, each time mended; one that a test
    left broken is given up, and the next test gets a new one."""

    def __init__(self, nursery: Nursery, spawn: Any) -> None:
        self._nursery, self._spawn = nursery, spawn
        self._stage: Stage | None = None
        self.fleet: Fleet
        self.job: ShardJob
        self.newest: SnapshotId

    @contextmanager
    def whole(self) -> Iterator[None]:
        if self._stage is None:
            self._stage = Stage(self._nursery)
            self.fleet = Fleet(self._stage, 6, spawn=self._spawn)
            self.job = ShardJob(self.fleet.daemons)
            self.save(1)
        try:
            yield
        except BaseException:
            print(self._stage.report())
            self.close()
            raise

    def save(self, step: int) -> None:
        self.job.save(step)
        self.job.wait_protected(step)
        self.newest = SnapshotId(self.job.incarnation, step)

    def close(self) -> None:
        if self._stage is not None:
            self._stage.close()
            self._stage = None


@pytest.fixture(scope="module")
def home(nursery: Nursery, daemon_nursery: DaemonNursery) -> Iterator[Home]:
    home = Home(nursery, daemon_nursery.spawn)
    yield home
    home.close()


@pytest.mark.parametrize("lost", LOSSES, ids=name)
def test_nodes_lost_after_protection_are_reconstructed_and_protected_anew(home: Home, lost: Lost) -> None:
    with home.whole():
        if LOSSES.index(lost) % 4 == 2:  # else what was restored is lost again, with the parity that was made anew
            home.save(home.newest.step + 1)
        home.fleet.lose(*lost)
        home.job.close()
        home.job, restored = restore(home.fleet, lost)
        assert restored == home.newest
        home.job.wait_whole(restored, losses=2)


# --- before and amid protection -----------------------------------------------------------------------------------
@pytest.mark.parametrize("lost", some(fast=[(0,), (2, 5)]))
def test_nodes_lost_before_protection_of_the_newest_step_bring_back_the_step_before(
    make_fleet: MakeFleet, lost: Lost
) -> None:
    fleet = make_fleet(6, options_of=lambda _: {"failpoints": f"protect.before={FOR_EVER}@2"})
    job = ShardJob(fleet.daemons)
    job.save(1)
    job.wait_protected(1)
    job.save(2)
    job.wait_protecting(2)
    fleet.lose(*lost)
    assert not any(fleet.parity(2).values())
    job, restored = restore(fleet, lost)
    assert restored.step == 1
    job.wait_whole(restored, losses=2)
    job.save(2)
    job.wait_protected(2)


class Hold(NamedTuple):
    """Where nodes are held up while they protect step 2, and how many fragments they miss then."""

    at: str
    positions: Sequence[int]
    missing: int


# Two fragments a node and step, two batches a fragment: the second step begins at the third fragment, the fifth batch.
HOLDS = {
    "one node has made nothing": Hold(f"protect.before={FOR_EVER}@2", (3,), 2),
    "one fragment of a node is not sealed": Hold(f"protect.before_seal={FOR_EVER}@3", (1,), 1),
    "every node is amid a fragment": Hold(f"protect.batch={FOR_EVER}@5", NODES, 1),
}
ALWAYS = [
    ((3,), "one node has made nothing"),
    ((1, 4), "one fragment of a node is not sealed"),
    ((2, 5), "every node is amid a fragment"),
]
SHARD_BYTES = 5_000_000


def is_complete(lost: Lost, parity: dict[int, set[tuple[int, int]]]) -> bool:
    """Whether every stripe has k fragments on the nodes that are left, which hold that ``parity``."""
    geometry = Geometry(4, 2)
    left = {fragment for held in parity.values() for fragment in held}
    return all(
        sum(position not in lost for position, _ in Stripes(geometry, 1).data_of(stripe))
        + sum((stripe, row) in left for row in range(geometry.m))
        >= geometry.k
        for stripe in range(sum(geometry))
    )


@pytest.mark.parametrize(
    ("lost", "held"),
    [
        pytest.param(lost, held, marks=() if (lost, held) in ALWAYS else pytest.mark.slow, id=f"{name(lost)}-{held}")
        for lost, held in itertools.product(LOSSES, HOLDS)
    ],
)
def test_nodes_lost_amid_protection_bring_back_the_newest_step_that_is_complete(
    make_fleet: MakeFleet, lost: Lost, held: str
) -> None:
    hold = HOLDS[held]
    fleet = make_fleet(6, options_of=lambda p: {"failpoints": hold.at} if p in hold.positions else {})
    job = ShardJob(fleet.daemons, size_bytes=SHARD_BYTES)
    job.save(1)
    job.wait_protected(1)
    job.save(2)
    made = {position: 2 - hold.missing * (position in hold.positions) for position in NODES}
    wait_until(lambda: {p: len(f) for p, f in fleet.parity(2).items()} == made, "the rest of the parity", 60)
    fleet.lose(*lost)
    expected = 2 if is_complete(lost, fleet.parity(2)) else 1
    job, restored = restore(fleet, lost, size_bytes=SHARD_BYTES)
    assert restored.step == expected
    job.wait_whole(restored, losses=2)


# --- more than parity makes up for --------------------------------------------------------------------------------
def test_three_losses_are_named_and_the_tier_has_the_candidate(make_fleet: MakeFleet, tmp_path: Path) -> None:
    tier = f"file://{tmp_path}/tier"
    fleet = make_fleet(6, tiers=[f"{tier},every=2"])
    job = ShardJob(fleet.daemons)
    job.save(1)
    job.save(2, persist=True)
    job.wait_durable(2)
    job.save(3)
    job.wait_protected(3)
    fleet.lose(0, 2, 3)
    fleet.replace(0, 2, 3)
    job = ShardJob(fleet.daemons)
    found = job.candidates()
    assert len(found.notes) == 1
    assert "step 3 of incarnation 1-" in found.notes[0]
    assert "is not recoverable: the shards of ranks 0, 2, 3 are lost with 3 nodes" in found.notes[0]
    assert "newest durable is step 2" in found.notes[0]
    assert (found.candidates[0].snapshot.step, list(found.candidates[0].sources)) == (2, [tier])
    restored, sources = job.restore()
    assert restored.step == 2
    assert {sources[rank] for rank in (0, 2, 3)} == {tier}
    job.wait_whole(restored, losses=2)
    job.save(3)
    job.wait_protected(3)


def test_three_losses_without_a_tier_leave_the_restore_undecided(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(6)
    job = ShardJob(fleet.daemons)
    job.save(1)
    job.wait_protected(1)
    fleet.lose(1, 4, 5)
    fleet.replace(1, 4, 5)
    with pytest.raises(RestoreUndecided, match=r"step 1 .* is not recoverable: .* ranks 1, 4, 5 .* nothing is durable"):
        ShardJob(fleet.daemons).candidates()
    fleet.lose(0, 2, 3)  # the shards that were left: what remains is parity of nobody
    fleet.replace(0, 2, 3)
    assert not ShardJob(fleet.daemons).candidates().candidates
