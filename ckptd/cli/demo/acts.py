"""The plot of the demo: an undisturbed run, then the same run killed three ways, and whether anyone can tell.

Layer: ``cli``. Invariants: kills come at random steps of a seeded generator, in the order of ``ACTS``; nothing is said
to have recovered that did not restore from where it should.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from ckptd.cli.demo.processes import Job, Stage

Say = Callable[[str], None]
_REFERENCE: Final = "demo-reference"
_RUN: Final = "demo"


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
    final_loss: float
    is_every_loss_equal: bool
    are_weights_equal: bool

    @property
    def is_good(self) -> bool:
        return self.is_every_loss_equal and self.are_weights_equal and all(r.is_recovered for r in self.recoveries)


def kill_steps(steps: int, seed: int) -> list[int]:
    """One random step for each act, in its own part of the run and never at its edges."""
    chance = random.Random(seed)  # noqa: S311  a plot, not a secret
    part = steps // len(ACTS)
    return [number * part + chance.randint(3, part - 2) for number in range(len(ACTS))]


def play(stage: Stage, steps: int, seed: int, say: Say) -> Outcome:
    """Both runs; CkptdError when the demo itself cannot go on."""
    say("starting the daemon")
    stage.start_daemon()
    say(f"training {steps} steps undisturbed, for reference")
    reference = stage.start_job(_REFERENCE, steps, seed)
    expected = _finish(reference)
    say("training the same again, to be killed")
    job = stage.start_job(_RUN, steps, seed)
    recoveries = []
    for act, step in zip(ACTS, kill_steps(steps, seed), strict=True):
        job, recovery = _kill_and_recover(stage, job, act, step, (steps, seed), say)
        recoveries.append(recovery)
    found = _finish(job)
    losses = _losses(expected)
    return Outcome(
        tuple(recoveries),
        final_loss=float.fromhex(losses[steps][0]),
        is_every_loss_equal=losses == _losses(found),
        are_weights_equal=expected[-1]["weights"] == found[-1]["weights"],
    )


def _kill_and_recover(
    stage: Stage, job: Job, act: Act, step: int, training: tuple[int, int], say: Say
) -> tuple[Job, Recovery]:
    job.wait_for(lambda events: _last_step(events) >= step, f"step {step}")
    killed_at = time.monotonic()
    if act.takes_daemon:
        stage.kill_daemon()
    job.kill()
    before = job.events()
    say(f"killed {act.killed} at step {_last_step(before)}")
    if act.wipes_memory:
        stage.wipe_memory()
    if act.takes_daemon:
        stage.start_daemon()
    job = stage.start_job(_RUN, *training)
    events = job.wait_for(lambda events: any(e["event"] == "step" for e in events[len(before) :]), "it went on")
    downtime_s = time.monotonic() - killed_at
    recovery = _recovery(act, _last_step(before), events[len(before) :], downtime_s)
    say(f"step {recovery.restored_step} restored from {recovery.restored_from or 'nowhere: it began again'}")
    return job, recovery


def _recovery(act: Act, killed_at_step: int, events: list[dict[str, Any]], downtime_s: float) -> Recovery:
    restored = next((e for e in events if e["event"] == "restored"), None)
    if restored is None:
        return Recovery(act.killed, killed_at_step, None, None, None, downtime_s, None, is_recovered=False)
    came_from = "memory" if restored["source"] == "memory" else "tier"
    return Recovery(
        act.killed,
        killed_at_step,
        restored["step"],
        came_from,
        restored["seconds"],
        downtime_s,
        steps_lost=max(0, killed_at_step - restored["step"]),
        is_recovered=came_from == act.comes_from,
    )


def _finish(job: Job) -> list[dict[str, Any]]:
    """The whole journal of a run that ended well."""
    events = job.wait_for(lambda events: bool(events) and events[-1]["event"] == "end", "its end")
    job.process.wait()
    return events


def _last_step(events: list[dict[str, Any]]) -> int:
    return max((e["step"] for e in events if e["event"] == "step"), default=0)


def _losses(events: list[dict[str, Any]]) -> dict[int, list[str]]:
    """Every loss seen at each step, exact: one each, unless a step that was done again came out otherwise."""
    seen: dict[int, list[str]] = {}
    for event in events:
        if event["event"] == "step" and event["loss"] not in seen.setdefault(event["step"], []):
            seen[event["step"]].append(event["loss"])
    return seen
