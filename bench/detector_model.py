"""A job of TP x PP x DP ranks, step by step, as their timings would show it; pure and seeded.

Within a stage the tensor ranks leave every position together; the stages of a replica wait for each other as in 1F1B;
the replicas meet in the data-parallel reduction. Whoever is faster waits, so the self time, the waits and the step add
up on every rank, and a victim's waits show what the slow rank's self time is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ckptd.detect.layout import Layout
from ckptd.format.timings import POSITIONS, SELF, Mask, Rows

Values = npt.NDArray[np.float32]

GAPS: Final = 8  # positions that the simulated program has
RANKS_PER_NODE: Final = 8
MICROBATCHES: Final = 8
_CHUNK: Final = 20  # steps at a time, for memory
_SHARES: Final = np.array([0.05, 0.2, 0.1, 0.2, 0.15, 0.1, 0.15, 0.05], np.float32)
_BACKWARD: Final = 2 / 3
_TRANSFER_S: Final = 0.02


@dataclass(frozen=True)
class Fault:
    """``ranks`` take ``factor`` times as long from step ``since`` on, ``a_step`` more with each step. ``every``: only
    in each n-th step. ``position``: only there, by the same time over all."""

    ranks: tuple[int, ...]
    factor: float
    since: int = 0
    a_step: float = 0.0
    every: int = 1
    position: int | None = None


@dataclass(frozen=True)
class Job:
    """Sizes, and how its steps differ although nothing is broken. ``stages``: compute of the last stage against the
    first; those between lie between."""

    dp: int = 32
    pp: int = 4
    tp: int = 8
    noise: float = 0.02
    imbalance: float = 0.0
    stall_share: float = 0.0
    stall: float = 0.5
    stages: float = 1.0
    checkpoint_every: int = 0
    is_masked: bool = True
    step_s: float = 1.0

    @property
    def world_size(self) -> int:
        return self.dp * self.pp * self.tp

    @property
    def layout(self) -> Layout:
        return Layout.from_sizes(self.dp, self.pp, self.tp)

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(f"node{rank // RANKS_PER_NODE}" for rank in range(self.world_size))


@dataclass(frozen=True)
class Steps:
    """``rows``: SELF, steps x ranks. ``late_s``: how long after the first of its data-parallel group each rank entered
    the reduction, steps x ranks: what the naive rule looks at."""

    rows: Rows
    late_s: Values


def simulate(job: Job, faults: tuple[Fault, ...], steps: int, seed: int, first: int = 0) -> Iterator[Steps]:
    """``steps`` steps from ``first`` on, a few at a time."""
    random = np.random.default_rng(seed)
    for start in range(first, first + steps, _CHUNK):
        yield _chunk(job, faults, np.arange(start, min(start + _CHUNK, first + steps)), random)


def self_times(job: Job, faults: tuple[Fault, ...], steps: npt.NDArray[Any], random: np.random.Generator) -> Values:
    """Self time by position, steps x pp x dp x tp x GAPS; rank order of ``Layout.from_sizes``."""
    shape = (len(steps), job.pp, job.dp, job.tp)
    whole = 1 + job.noise * random.standard_normal(shape, np.float32)
    if job.imbalance:
        # Of a replica: all of its stages and tensor ranks work on the same sequences.
        whole *= 1 + job.imbalance * random.uniform(-1, 1, (len(steps), 1, job.dp, 1)).astype(np.float32)
    whole *= np.linspace(1, job.stages, job.pp, dtype=np.float32)[:, None, None]
    gaps = 1 + job.noise * random.standard_normal((*shape, GAPS), np.float32)
    gaps *= _SHARES
    gaps *= (whole * (0.5 * job.step_s) / gaps.sum(axis=-1))[..., None]
    by_rank = gaps.reshape(len(steps), job.world_size, GAPS)
    for fault in faults:
        _slow_down(by_rank, fault, steps)
    if job.stall_share:
        # One position of a step takes longer by a share of the self time.
        hit = random.random((*shape[:1], job.world_size), np.float32) < job.stall_share
        at = random.integers(0, GAPS, int(hit.sum()))
        by_rank[(*np.nonzero(hit), at)] += job.stall * 0.5 * job.step_s
    return gaps


def _slow_down(gaps: Values, fault: Fault, steps: npt.NDArray[Any]) -> None:
    age = steps - fault.since
    more = np.where((age >= 0) & (age % fault.every == 0), fault.factor - 1 + fault.a_step * np.maximum(age, 0), 0.0)
    ranks = list(fault.ranks)
    if fault.position is None:
        gaps[:, ranks] *= (1 + more).astype(np.float32)[:, None, None]
    else:
        gaps[:, ranks, fault.position] += more.astype(np.float32)[:, None] * gaps[:, ranks].sum(axis=-1)


def _chunk(job: Job, faults: tuple[Fault, ...], steps: npt.NDArray[Any], random: np.random.Generator) -> Steps:
    gaps = self_times(job, faults, steps, random)
    is_checkpoint = (steps % job.checkpoint_every == 0) if job.checkpoint_every else np.zeros(len(steps), bool)
    # The copy out is not the same on any two ranks, and comes after the last position.
    gaps[is_checkpoint, ..., -1] += random.uniform(0.2, 0.6, gaps[is_checkpoint, ..., -1].shape) * job.step_s
    own = gaps.sum(axis=-1)
    in_tensor = gaps.max(axis=3).sum(axis=-1)  # steps x pp x dp: a stage, with the waits of its tensor ranks
    done = _pipeline(in_tensor)
    entered = np.broadcast_to(done[..., None], own.shape)
    left = done.max(axis=2, keepdims=True)  # the reduction of a stage and tensor index: over replicas
    end = left.max(axis=1, keepdims=True) + _TRANSFER_S * job.step_s  # the norm of all gradients: over everybody
    rows = np.zeros((len(steps), job.world_size), SELF)
    rows["step"] = steps[:, None]
    rows["mask"][is_checkpoint] = Mask.CHECKPOINT if job.is_masked else Mask.NONE
    flat = (len(steps), job.world_size)
    rows["self_s"] = own.reshape(flat)
    rows["length_s"] = np.broadcast_to(end[..., None], own.shape).reshape(flat)
    p2p = np.broadcast_to((done - in_tensor)[..., None], own.shape).reshape(flat)
    rows["waits_s"][..., 2] = p2p
    rows["waits_s"][..., 0] = rows["length_s"] - rows["self_s"] - p2p
    rows["gaps_s"][..., :GAPS] = gaps.reshape(*flat, GAPS)
    late = entered - entered.min(axis=2, keepdims=True)
    return Steps(rows, late.reshape(flat).astype(np.float32))


def _pipeline(stage_s: Values) -> Values:
    """When each stage of each replica is done, from what it has to do: steps x pp x dp. 1F1B: the first microbatch
    fills the pipeline, the slowest stage sets the pace, the last stage runs dry first."""
    one = stage_s / MICROBATCHES
    total = (MICROBATCHES - 1) * one.max(axis=1, keepdims=True) + one.sum(axis=1, keepdims=True)
    drained: Values = total - _BACKWARD * (np.cumsum(one, axis=1) - one)
    return drained


assert GAPS <= POSITIONS
