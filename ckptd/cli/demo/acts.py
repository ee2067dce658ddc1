"""The plot with one node: an undisturbed run, then the same run killed three ways, and whether anyone can tell.

Layer: ``cli``. Invariants: kills come at random steps of a seeded generator, in the order of ``ACTS``; nothing is said
to have recovered that did not restore from where it should.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ckptd.cli.demo.journal import Comparison, Events, compare, last_step, restored
from ckptd.cli.demo.processes import Job
from ckptd.cli.demo.stage import NodeDaemon, Stage

Say = Callable[[str], None]
REFERENCE: Final = "demo-reference"
RUN: Final = "demo"


@dataclass(frozen=True)
class Act:
    """What is killed, and where the run must come back from."""

    killed: str
    takes_daemon: bool
    wipes_memory: bool
    comes_from: str


ACTS: Final = (
    Act("ranks", takes_daemon=False, wipes_memory=False, comes_from="memory"),
    Act("ranks and daemon", takes_daemon=True, wipes_memory=False, comes_from="memory"),
    Act("ranks, daemon and its memory", takes_daemon=True, wipes_memory=True, comes_from="tier"),
)


@dataclass(frozen=True)
class Recovery:
    """One act as it went. Seconds: ``restore_s`` is the restore itself, ``downtime_s`` from the kill to the first
    step that was new."""

    killed: str
    killed_at_step: int
    restored_step: int | None
    restored_from: str | None
    restore_s: float | None
    downtime_s: float
    steps_lost: int | None
    is_recovered: bool


@dataclass(frozen=True)
class Outcome:
    """The recoveries, and how the killed run compares with the undisturbed one."""

    recoveries: tuple[Recovery, ...]
    comparison: Comparison

    @property
    def is_good(self) -> bool:
        return self.comparison.is_good and all(r.is_recovered for r in self.recoveries)


def kill_steps(steps: int, seed: int) -> list[int]:
    """One random step for each act, in its own part of the run and never at its edges."""
    chance = random.Random(seed)  # noqa: S311  a plot, not a secret
    part = steps // len(ACTS)
    return [number * part + chance.randint(3, part - 2) for number in range(len(ACTS))]


def play(stage: Stage, steps: int, seed: int, say: Say) -> Outcome:
    """Both runs; CkptdError when the demo itself cannot go on."""
    say("starting the daemon")
    (daemon,) = stage.start_daemons("d", flags=["--tier", f"{stage.tier},every=1"])
    say(f"training {steps} steps undisturbed, for reference")
    expected = stage.start_torchrun(daemon, REFERENCE, steps, seed).finish()
    say("training the same again, to be killed")

    def start() -> Job:
        return stage.start_torchrun(daemon, RUN, steps, seed)

    job = start()
    recoveries = []
    for act, step in zip(ACTS, kill_steps(steps, seed), strict=True):
        job, recovery = _kill_and_recover(daemon, job, start, act, step, say)
        recoveries.append(recovery)
    return Outcome(tuple(recoveries), compare(expected, job.finish()))


def _kill_and_recover(
    daemon: NodeDaemon, job: Job, start: Callable[[], Job], act: Act, step: int, say: Say
) -> tuple[Job, Recovery]:
    job.wait_for(lambda events: last_step(events) >= step, f"step {step}")
    killed_at = time.monotonic()
    if act.takes_daemon:
        daemon.kill()
    job.kill()
    before = job.events()
    say(f"killed {act.killed} at step {last_step(before)}")
    if act.wipes_memory:
        daemon.wipe()
    if act.takes_daemon:
        daemon.start()
        daemon.wait_ready()
    job = start()
    events = job.wait_for(lambda events: last_step(events[len(before) :]) > 0, "it went on")
    downtime_s = time.monotonic() - killed_at
    recovery = _recovery(act, last_step(before), events[len(before) :], downtime_s)
    say(f"step {recovery.restored_step} restored from {recovery.restored_from or 'nowhere: it began again'}")
    return job, recovery


def _recovery(act: Act, killed_at_step: int, events: Events, downtime_s: float) -> Recovery:
    found = restored(events, rank=0)
    if found is None:
        return Recovery(act.killed, killed_at_step, None, None, None, downtime_s, None, is_recovered=False)
    came_from = "memory" if found["source"] == "memory" else "tier"
    return Recovery(
        act.killed,
        killed_at_step,
        found["step"],
        came_from,
        found["seconds"],
        downtime_s,
        steps_lost=max(0, killed_at_step - found["step"]),
        is_recovered=came_from == act.comes_from,
    )
