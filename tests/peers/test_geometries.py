"""Groups of every shape, images of every size: a fleet serves many runs, loses two nodes, and gives all of them back.

Each shape has a run of its own. All save and are protected, then the two nodes go, and each run is restored, compared
byte for byte, and protected again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from daemon_nursery import DaemonNursery
from fleet import Fleet
from harness import Nursery, Stage
from shard_ranks import ShardJob

LOST = (1, 2)
STEPS = (1, 2)


@dataclass(frozen=True)
class Shape:
    """``placement[rank]`` is the position of its daemon, ``geometries`` what groups come of ``protect``."""

    placement: Sequence[int]
    protect: str
    geometries: Sequence[str]
    size_of: Callable[[int, int], int] = lambda _rank, _step: 100_000

    def job(self, run: str, fleet: Fleet) -> ShardJob:
        placement = [fleet.daemons[position] for position in self.placement]
        return ShardJob(placement, run, self.protect, size_of=self.size_of)


def uneven(rank: int, step: int) -> int:
    return 1 + 40_000 * (rank * 5 % 7) + 70_001 * step


def one_is_huge(rank: int, _step: int) -> int:
    return {2: 20_000_000, 4: 3_000_000}.get(rank, 50_000 + rank)


SHAPES = {
    "five-auto": Shape(range(5), "auto", ["3+2"]),
    "seven-4-and-2": Shape(range(7), "4+2", ["5+2"]),
    "eight-4-and-2": Shape(range(8), "4+2", ["6+2"]),
    "two-mirrored": Shape((0, 1), "auto", ["1+1"]),
    "three-1-and-2": Shape((0, 1, 2), "1+2", ["1+2"]),
    "one-is-huge": Shape(range(6), "4+2", ["4+2"], one_is_huge),
    "uneven-and-other-sizes-each-step": Shape(range(5), "auto", ["3+2"], lambda r, s: uneven((r + s) % 5, s)),
    "two-ranks-a-node": Shape((0, 0, 1, 1, 2, 2, 3, 3), "auto", ["2+2"], uneven),
    "ranks-dealt-round": Shape((0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 2), "3+2", ["3+2"], uneven),
}


LARGE = {
    "thirteen-4-and-2": Shape(range(13), "4+2", ["5+2", "4+2"]),
    "thirteen-auto": Shape(range(13), "auto", ["11+2"]),
}


@contextmanager
def mended_fleet(
    count: int, shapes: Iterable[str], stage: Stage, nursery: DaemonNursery, memory: str
) -> Iterator[Fleet]:
    """``count`` nodes that protected a run of every shape, lost two, and got fresh ones in their place."""
    try:
        fleet = Fleet(stage, count, memory=memory, spawn=nursery.spawn)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda run: save(run, fleet), shapes))
        fleet.lose(*LOST)
        fleet.replace(*LOST)
        yield fleet
    finally:
        stage.close()


def save(run: str, fleet: Fleet) -> None:
    job = shape_of(run).job(run, fleet)
    for step in STEPS:
        job.save(step)
        job.wait_protected(step)
    job.close()


def shape_of(run: str) -> Shape:
    return {**SHAPES, **LARGE}[run]


@pytest.fixture(scope="module")
def mended(nursery: Nursery, daemon_nursery: DaemonNursery) -> Iterator[Fleet]:
    with mended_fleet(8, SHAPES, Stage(nursery), daemon_nursery, "160MiB") as fleet:
        yield fleet


@pytest.fixture(scope="module")
def mended_large(nursery: Nursery, daemon_nursery: DaemonNursery) -> Iterator[Fleet]:
    with mended_fleet(13, LARGE, Stage(nursery), daemon_nursery, "16MiB") as fleet:
        yield fleet


def check(run: str, fleet: Fleet) -> None:
    shape = shape_of(run)
    job = shape.job(run, fleet)
    restored, sources = job.restore()
    assert restored.step == STEPS[-1]
    assert sources == {r: "reconstruction" if at in LOST else "memory" for r, at in enumerate(shape.placement)}
    groups = job.daemons[0].run_status(run)["groups"]
    assert [f"{group['k']}+{group['m']}" for group in groups] == shape.geometries
    job.wait_whole(restored, losses=min(group["m"] for group in groups))
    job.close()


@pytest.mark.parametrize("run", SHAPES)
def test_two_lost_nodes_are_reconstructed_in_a_group_of(mended: Fleet, run: str) -> None:
    check(run, mended)


@pytest.mark.slow
@pytest.mark.parametrize("run", LARGE)
def test_two_lost_nodes_of_thirteen_are_reconstructed(mended_large: Fleet, run: str) -> None:
    check(run, mended_large)
