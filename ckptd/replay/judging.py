"""Recorded timings judged as the analyst would have judged them live. Layer: ``replay``.

Invariants: the recording is seen in its order, a few steps at a time, and nothing of later steps is known before; the
clock is the recording's, so that the same file gives the same faults on any machine.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from ckptd.detect.compute_verdicts import with_places
from ckptd.detect.faultlog import RANKING
from ckptd.detect.hang import POST_MORTEM, judge_hang
from ckptd.detect.judge import SETTLE_S, Judge
from ckptd.detect.layout import Layout
from ckptd.detect.pictures import Scene
from ckptd.detect.records import Confidence, Fault, Timings
from ckptd.errors import InvalidRequest
from ckptd.format.timings import SELF, Rows
from ckptd.replay.flight_recorder import read_dumps
from ckptd.replay.layout_file import read_sizes
from ckptd.replay.recording import SUFFIX, Recording, read_recording
from ckptd.replay.timelines import POSITION_NAMES, read_timelines

# Windows of ten steps are judged each five: looking more often would find the same.
STRIDE_STEPS: Final = 5
_LOOK_S: Final = 1.0
# Different steps in a recording: ranks that each count otherwise are not of one job.
MOST_STEPS: Final = 1 << 16
_NONE: Final = np.zeros(0, SELF)


@dataclass(frozen=True, slots=True)
class Judged:
    """The faults that were found, and what was seen at the end. ``run`` and ``incarnation``: "" where not recorded."""

    faults: list[Fault]
    scene: Scene
    run: str = ""
    incarnation: str = ""


def judge_file(path: Path, layout_file: Path | None = None) -> list[Fault]:
    """The faults of ``examine_file``."""
    return examine_file(path, layout_file).faults


def examine_file(path: Path, layout_file: Path | None = None) -> Judged:
    """A recording of ckptd, a parquet timeline, or a folder of Flight Recorder dumps, judged.

    Raises InvalidRequest when ``path`` is none of these, Corrupt when it is damaged, FormatTooNew.
    """
    if path.is_dir():
        return _examine_dumps(path)
    if not path.is_file():
        raise InvalidRequest(f"{path} is not there")
    if zipfile.is_zipfile(path) or path.name.endswith(SUFFIX):
        recording = read_recording(path)
        if layout_file is not None:
            recording = replace(recording, layout=_layout(layout_file, recording.timings.world_size))
        return examine_recording(recording)
    if path.suffix != ".parquet":
        raise InvalidRequest(f"{path} is no recording", f"give a *{SUFFIX} or *.parquet file, or a folder of dumps")
    if layout_file is None:
        raise InvalidRequest(f"{path} does not say which ranks do the same work", "give --layout FILE too")
    judged = examine_recording(Recording(*read_timelines(path, layout_file)))
    return replace(judged, faults=[with_places(fault, POSITION_NAMES) for fault in judged.faults])


def _examine_dumps(folder: Path) -> Judged:
    """Dumps say what ranks were in the middle of, and nothing of steps."""
    states, communicators = read_dumps(folder)
    faults = judge_hang(states, communicators, POST_MORTEM)
    ranks = {rank for group in communicators.values() for rank in group.members} | {state.rank for state in states}
    nodes = {state.rank: state.node for state in states}
    judge = Judge([nodes.get(rank, "") for rank in range(max(ranks, default=0) + 1)])
    return Judged(faults, Scene.of(judge, states, communicators, faults))


def _layout(layout_file: Path, world_size: int) -> Layout:
    sizes = read_sizes(layout_file)
    if sizes.world_size != world_size:
        raise InvalidRequest(f"layout {layout_file} has {sizes.world_size} ranks, the recording {world_size}")
    return sizes.layout()


def judge_timings(timings: Timings, layout: Layout | None) -> list[Fault]:
    """What is slow. ``layout`` None: ranks have nobody to compare with, and only communication is judged."""
    return judge_recording(Recording(timings, layout))


def judge_recording(recording: Recording) -> list[Fault]:
    """The faults of ``examine_recording``."""
    return examine_recording(recording).faults


def examine_recording(recording: Recording) -> Judged:
    """What is slow, and what stood still when the recording was made; the most certain first.

    A fault that was over before the end is told if it was confirmed: a suspicion that did not last was none.
    """
    timings = recording.timings
    judge = Judge(timings.nodes, recording.layout)
    now_s = 0.0
    for steps, samples in _chunks(timings):
        if steps:
            ranks = np.concatenate([np.full(len(rows), rank) for rank, rows in steps.items()])
            judge.history.put(ranks, np.concatenate(list(steps.values())))
        for rank, rows in samples.items():
            judge.take(rank, _NONE, rows, timings.tables.get(rank, {}))
        now_s += _LOOK_S
        judge.weigh(recording.states, recording.communicators, now_s)
    _look(judge, recording, now_s)
    over = [logged.fault for logged in judge.log.resolved if logged.fault.confidence is not Confidence.SUSPECT]
    found = _distinct([*(logged.fault for logged in judge.log.open), *over])
    faults = [_told(fault, timings, judge.layout) for fault in found]
    scene = Scene.of(judge, recording.states, recording.communicators, faults)
    return Judged(faults, scene, recording.run, recording.incarnation)


def _chunks(timings: Timings) -> Iterator[tuple[dict[int, Rows], dict[int, Rows]]]:
    """SELF and SAMPLE rows by rank, of STRIDE_STEPS recorded steps at a time, in the order of steps."""
    every = [rows["step"] for rows in (*timings.steps.values(), *timings.samples.values()) if len(rows)]
    known = np.unique(np.concatenate([np.unique(steps) for steps in every])) if every else np.zeros(0, np.int64)
    if len(known) > MOST_STEPS:
        raise InvalidRequest(f"the recording has {len(known)} different steps, more than {MOST_STEPS}")
    ends = known[STRIDE_STEPS - 1 :: STRIDE_STEPS].tolist()
    ends += known[-1:].tolist() if len(known) % STRIDE_STEPS else []
    begin = None
    for end in ends:
        yield _between(timings.steps, begin, end), _between(timings.samples, begin, end)
        begin = end


def _between(table: Mapping[int, Rows], begin: int | None, end: int) -> dict[int, Rows]:
    """The rows of steps after ``begin``, up to ``end``, of the ranks that have some."""
    chosen = {}
    for rank, rows in table.items():
        is_in = rows["step"] <= end
        if begin is not None:
            is_in &= rows["step"] > begin
        if is_in.any():
            chosen[rank] = rows[is_in]
    return chosen


def _look(judge: Judge, recording: Recording, now_s: float) -> None:
    """Look at what ranks were in the middle of, as if it had been watched for as long as it is said to last."""
    gone = [state.gone_s for state in recording.states if state.gone_s is not None]
    longest_s = max((item.for_s for state in recording.states for item in state.pending), default=0.0)
    begin_s = max([now_s, *gone]) + SETTLE_S
    for at_s in (begin_s, begin_s + longest_s, begin_s + longest_s + _LOOK_S):
        judge.look(recording.states, recording.communicators, at_s)


def _distinct(found: Sequence[Fault]) -> list[Fault]:
    """Each fault once, with its highest confidence and the step in which it was first seen."""
    result: list[Fault] = []
    for fault in sorted(found, key=lambda each: -RANKING[each.confidence]):
        at = next((at for at, known in enumerate(result) if _is_same(known, fault)), None)
        if at is None:
            result.append(fault)
        elif fault.since_step >= 0:
            known = result[at]
            since = min(fault.since_step, known.since_step) if known.since_step >= 0 else fault.since_step
            result[at] = replace(known, since_step=since)
    return result


def _is_same(known: Fault, fault: Fault) -> bool:
    if known.kind is not fault.kind:
        return False
    is_shared = not (set(known.ranks).isdisjoint(fault.ranks) and set(known.nodes).isdisjoint(fault.nodes))
    return is_shared or (known.ranks, known.nodes) == (fault.ranks, fault.nodes)


def _told(fault: Fault, timings: Timings, layout: Layout | None) -> Fault:
    """With the ranks that the named ones stand for: same data and stage, and no timings of their own."""
    if layout is None:
        return fault
    shared = {int(layout.data[rank]) for rank in fault.ranks if rank in timings.steps} - {-1}
    unseen = [rank for rank in range(timings.world_size) if rank not in timings.steps]
    stands_for = [rank for rank in unseen if int(layout.data[rank]) in shared]
    if not stands_for:
        return fault
    return replace(fault, evidence={**fault.evidence, "stands_for_ranks": stands_for})
