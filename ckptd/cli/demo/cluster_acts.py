"""The plot with several nodes: an undisturbed run, then the same run while nodes are lost for good, and whether anyone
can tell.

Layer: ``cli``. There is no tier: what is lost can only come back from the memory and the parity of the nodes that are
left. Invariants: the nodes and the step are of a seeded generator; nothing is said to have recovered that did not
restore, from where it should, at least what was protected when the nodes were lost.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ckptd.cli.demo.acts import REFERENCE, RUN, Say
from ckptd.cli.demo.journal import Comparison, Events, compare, last_step, restored
from ckptd.cli.demo.processes import Job, kill_at_once, wait_until
from ckptd.cli.demo.stage import LOOPBACK, NodeDaemon, Stage
from ckptd.errors import CkptdError

_FLAGS: Final = ("--listen", f"{LOOPBACK}:0", "--insecure")
_KEPT_COMES_FROM: Final = ("memory",)
_LOST_COMES_FROM: Final = ("reconstruction", "peer")


@dataclass(frozen=True)
class Plot:
    """Which nodes are lost, and the first step at which they may be."""

    lost: tuple[int, ...]
    step: int


@dataclass(frozen=True)
class Fate:
    """What became of a node and of its rank, which has the same number. ``address_before`` is of its first daemon."""

    node: int
    is_lost: bool
    address_before: str
    address: str
    restored_step: int | None
    restored_from: str | None
    restore_s: float | None
    is_recovered: bool


@dataclass(frozen=True)
class ClusterOutcome:
    """``downtime_s`` is from the kill to the first step that was new. ``protected_again`` is the newest step for which
    parity was in place on the old nodes and the fresh ones, once the run had gone on."""

    fates: tuple[Fate, ...]
    killed_at_step: int
    protected_step: int
    downtime_s: float
    protected_again: int
    comparison: Comparison

    @property
    def is_good(self) -> bool:
        is_one_step = len({fate.restored_step for fate in self.fates}) == 1
        return self.comparison.is_good and is_one_step and all(fate.is_recovered for fate in self.fates)


def plot(nodes: int, kill: int, steps: int, seed: int) -> Plot:
    """``kill`` of ``nodes``, rank 0's among them now and then, in the second quarter of the run."""
    chance = random.Random(seed)  # noqa: S311  a plot, not a secret
    return Plot(tuple(sorted(chance.sample(range(nodes), kill))), chance.randint(steps // 4, steps // 2))


def play(stage: Stage, nodes: int, kill: int, steps: int, seed: int, say: Say) -> ClusterOutcome:
    """Both runs; CkptdError when the demo itself cannot go on."""
    story = plot(nodes, kill, steps, seed)
    say(f"starting {nodes} daemons")
    daemons = stage.start_daemons(*(f"node{node}" for node in range(nodes)), flags=_FLAGS)
    addresses = [daemon.address for daemon in daemons]

    def train(run: str) -> Job:
        return stage.start_ranks(daemons, f"{nodes - kill}+{kill}", run, steps, seed)

    say(f"training {steps} steps undisturbed on {nodes} ranks, for reference")
    expected = train(REFERENCE).finish()
    say("training the same again, to lose nodes")
    job = train(RUN)
    protected_step = _wait_protected(job, daemons[0], story.step)
    killed_at = time.monotonic()
    _lose(story.lost, daemons, job)
    before = job.events()
    say(f"lost {_text(story.lost)} at step {last_step(before)}, of which {protected_step} is protected")
    fresh = stage.start_daemons(*(f"fresh{node}" for node in story.lost), flags=_FLAGS)
    for node, daemon in zip(story.lost, fresh, strict=True):
        daemons[node] = daemon
    job = train(RUN)
    events = job.wait_for(lambda events: last_step(events[len(before) :]) > 0, "it went on")
    downtime_s = time.monotonic() - killed_at
    say(f"went on from step {last_step(events[len(before) :]) - 1}")
    events = job.finish()
    return ClusterOutcome(
        tuple(
            _fate(node, node in story.lost, protected_step, events[len(before) :], (address, daemon.address))
            for node, (address, daemon) in enumerate(zip(addresses, daemons, strict=True))
        ),
        last_step(before),
        protected_step,
        downtime_s,
        _wait_protected_again(daemons[0]),
        compare(expected, events),
    )


def _lose(nodes: Sequence[int], daemons: Sequence[NodeDaemon], job: Job) -> None:
    """SIGKILL daemons and ranks of ``nodes`` and wipe their memory; then the other ranks, as a job's launcher does."""
    lost = [daemons[node].process for node in nodes] + [job.processes[node] for node in nodes]
    kill_at_once(process for process in lost if process is not None)
    for node in nodes:
        daemons[node].wipe()
    job.kill()


def _fate(node: int, is_lost: bool, protected_step: int, events: Events, addresses: tuple[str, str]) -> Fate:
    found = restored(events, rank=node)
    if found is None:
        return Fate(node, is_lost, *addresses, None, None, None, is_recovered=False)
    is_recovered = (
        found["source"] in (_LOST_COMES_FROM if is_lost else _KEPT_COMES_FROM)
        and found["step"] >= protected_step
        and (addresses[0] != addresses[1]) == is_lost
    )
    return Fate(node, is_lost, *addresses, found["step"], found["source"], found["seconds"], is_recovered)


def _wait_protected(job: Job, coordinator: NodeDaemon, step: int) -> int:
    """The newest protected step, once training has come to ``step`` and there is one."""
    protected: int | None = None

    def is_time(events: Events) -> bool:
        nonlocal protected
        protected = _protected(coordinator) if last_step(events) >= step else None
        return protected is not None

    job.wait_for(is_time, f"step {step} and a protected one")
    assert protected is not None
    return protected


def _wait_protected_again(coordinator: NodeDaemon) -> int:
    """The newest protected step of the run that went on; its daemons make parity also when its ranks have ended."""
    wait_until(lambda: _protected(coordinator) is not None, "the run to be protected again")
    return _protected(coordinator) or 0


def _protected(coordinator: NodeDaemon) -> int | None:
    """The newest protected step of the newest incarnation of the run; None when there is none, or no answer now."""
    try:
        runs = [run for run in coordinator.status().runs if run.run == RUN]
    except CkptdError:
        return None
    marks = max(runs, key=lambda run: run.incarnation.ordinal).watermarks if runs else None
    return marks.protected if marks is not None and marks.HasField("protected") else None


def _text(nodes: Sequence[int]) -> str:
    numbers = [str(node) for node in nodes]
    return f"node {numbers[0]}" if len(nodes) == 1 else f"nodes {', '.join(numbers[:-1])} and {numbers[-1]}"
