"""Timelines of production jobs as steps: the parquet files of ByteDance's StragglerAnalysis. Layer: ``replay``.

A file has a row for each operation of each worker in some sampled steps: global ``rank``, ``dp_rank``, ``stage``,
``step``, ``optype``, ``start_ts`` and ``duration`` in seconds. Invariants: workers' clocks are never compared, only
durations count; step numbers may have holes; who the slow one is, is not decided here.

Computation is recorded, so self time is its union, and not the step without its communication as where only operations
of communicators are seen: the waiting that these files do not record (the mean of the loss over data-parallel ranks,
say) would count as the work of those who wait. Time in neither, a late launch or a wait for input, is nobody's.

Where tensor-parallel ranks are not recorded one by one, the first of them has the timeline of all: it stands for the
ranks of its data-parallel index and stage. The others have no rows. Bytes are not recorded, so there are no samples.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ckptd.detect.layout import Layout
from ckptd.detect.positions import position
from ckptd.detect.records import Timings
from ckptd.errors import Corrupt, InvalidRequest
from ckptd.format.timings import POSITIONS, SELF, Mask, Rows
from ckptd.replay.layout_file import REPLAY_HINT, Sizes, read_sizes

Ids = npt.NDArray[np.int64]
Seconds = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

_WHOLE: Final = ("rank", "dp_rank", "stage", "step")
_TIMES: Final = ("start_ts", "duration")
_NAMES: Final = ("rank", "dp_rank", "stage", "step", "optype", "start_ts", "duration")

# Kinds of operations by parts of their names, the first that is found; what has none of them is computation. Clipping
# gradients takes the norm over all ranks: in the time of it who comes first waits.
_POINT_TO_POINT: Final = ("send", "recv", "pp-comm", "p2p")
_SYNCHRONISING: Final = (
    "all-reduce",
    "allreduce",
    "gather",
    "reduce-scatter",
    "all-to-all",
    "alltoall",
    "barrier",
    "clip",
)
_ROOTED: Final = ("broadcast", "reduce", "scatter")
_COMPUTATION: Final = -1
# What positions are called, for those who read evidence.
_COMPUTATIONS: Final = {position(name): name for name in ("forward-compute", "backward-compute", "optimizer")}
POSITION_NAMES: Final = tuple(_COMPUTATIONS.get(place, "") for place in range(POSITIONS))
# Of one file: rows, characters of a name, and steps of all workers together.
MOST_EVENTS: Final = 1 << 24
_MOST_CHARACTERS: Final = 128
MOST_STEPS: Final = 1 << 22
_PART_OF_PASSES: Final = "-compute"


def read_timelines(path: Path, layout_file: Path) -> tuple[Timings, Layout]:
    """The steps of each recorded worker in the parquet file ``path``, and who runs what by ``layout_file``.

    Raises:
        InvalidRequest: a file is not there or not of this kind, the two contradict each other, or pyarrow is missing.
        Corrupt: the parquet file is damaged.
    """
    sizes = read_sizes(layout_file)
    events = _read(path)
    if not len(events.rank):
        raise InvalidRequest(f"timeline {path} has no operations")
    if int(events.rank.min()) < 0 or int(events.rank.max()) >= sizes.world_size:
        raise InvalidRequest(
            f"timeline {path} has rank {events.rank.max()}, layout {layout_file} {sizes.world_size} ranks",
            "give the layout of the same job",
        )
    workers, first = np.unique(events.rank, return_index=True)
    steps_known = len(np.unique(events.step))
    if len(workers) * steps_known > MOST_STEPS:
        raise InvalidRequest(f"timeline {path} has {len(workers)} workers and {steps_known} steps, too many to judge")
    layout = _layout(workers, events.stage[first], events.dp_rank[first], sizes)
    steps = _steps(events)
    return Timings(sizes.world_size, ("",) * sizes.world_size, steps), layout


@dataclass(frozen=True, slots=True)
class _Events:
    """Columns (n,). ``name``: index into ``names``."""

    rank: Ids
    dp_rank: Ids
    stage: Ids
    step: Ids
    start_s: Seconds
    duration_s: Seconds
    name: Ids
    names: tuple[str, ...]

    @property
    def is_time(self) -> Bools:
        return np.asarray(np.isfinite(self.start_s) & np.isfinite(self.duration_s) & (self.duration_s >= 0))


def _read(path: Path) -> _Events:
    try:
        import pyarrow  # type: ignore[import-untyped]
        from pyarrow import parquet
    except ImportError as error:
        raise InvalidRequest(f"{path}: reading a timeline needs pyarrow", REPLAY_HINT) from error
    if not path.is_file():
        raise InvalidRequest(f"timeline {path} is not a file")
    try:
        missing = set(_NAMES) - set(parquet.read_schema(path).names)
        if missing:
            raise InvalidRequest(f"timeline {path} has no column {', '.join(sorted(missing))}")
        events = parquet.read_metadata(path).num_rows
        if events > MOST_EVENTS:
            raise InvalidRequest(f"timeline {path} has {events} operations, more than {MOST_EVENTS}")
        table = parquet.read_table(path, columns=list(_NAMES))
        return _columns(table)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise Corrupt(
            f"timeline {path} cannot be decoded: {error}", "it is not a parquet file, or a damaged one"
        ) from error


def _columns(table: Any) -> _Events:
    """ValueError: a column holds something else, or nothing in a row."""
    whole = [table[name].to_numpy().astype(np.int64, casting="same_kind") for name in _WHOLE]
    times = [table[name].to_numpy().astype(np.float64) for name in _TIMES]
    names = table["optype"].unique().to_pylist()
    if not all(isinstance(name, str) and len(name) <= _MOST_CHARACTERS for name in names):
        raise ValueError(f"an operation has no name of up to {_MOST_CHARACTERS} characters")
    names.sort()
    place = {name: at for at, name in enumerate(names)}
    name = np.fromiter((place[name] for name in table["optype"].to_pylist()), np.int64, len(table))
    rank, dp_rank, stage, step = whole
    return _Events(rank, dp_rank, stage, step, times[0], times[1], name, tuple(names))


def _layout(workers: Ids, stages: Ids, dp_ranks: Ids, sizes: Sizes) -> Layout:
    """Peers as the file names them. If the axes can be ordered so that the ranks come out as recorded, the ranks that
    are not recorded have their place too; else only those that are."""
    for order in itertools.permutations(("pp", "dp", "tp")):
        shape = [{"pp": sizes.pp, "dp": sizes.dp, "tp": sizes.inner}[axis] for axis in order]
        index = dict(zip(order, np.unravel_index(workers, shape), strict=True))
        if (index["pp"] == stages).all() and (index["dp"] == dp_ranks).all():
            return Layout.from_sizes(sizes.dp, sizes.pp, sizes.inner, order=order)
    return _layout_of_recorded(workers, stages, dp_ranks, sizes)


def _layout_of_recorded(workers: Ids, stages: Ids, dp_ranks: Ids, sizes: Sizes) -> Layout:
    program, data, replica = (np.full(sizes.world_size, -1, np.int64) for _ in range(3))
    stage = np.zeros(sizes.world_size, np.int64)
    _, shared = np.unique(np.stack([stages, dp_ranks]), axis=1, return_inverse=True)
    shared = shared.reshape(-1)
    # The how-manieth of its data-parallel index and stage: the tensor-parallel index.
    order = np.argsort(shared, kind="stable")
    inner = np.empty(len(workers), np.int64)
    inner[order] = np.arange(len(workers)) - np.searchsorted(shared[order], shared[order])
    data[workers], stage[workers], replica[workers] = shared, stages, dp_ranks
    program[workers] = stages * (int(inner.max()) + 1) + inner
    return Layout(program, data, stage, (("pp", sizes.pp), ("dp", sizes.dp), ("tp", sizes.inner)), replica=replica)


def _steps(events: _Events) -> dict[int, Rows]:
    """SELF rows by rank."""
    ranks, steps = np.unique(events.rank), np.unique(events.step)
    pairs = np.searchsorted(ranks, events.rank) * len(steps) + np.searchsorted(steps, events.step)
    kinds = np.array([_kind(name) for name in events.names], np.int64)[events.name]
    is_time = events.is_time
    count = len(ranks) * len(steps)
    begins, ends = np.full(count, np.inf), np.full(count, -np.inf)
    np.minimum.at(begins, pairs[is_time], events.start_s[is_time])
    np.maximum.at(ends, pairs[is_time], (events.start_s + events.duration_s)[is_time])

    def busy(kind: int) -> Seconds:
        chosen = is_time & (kinds == kind)
        starts = events.start_s[chosen] - begins[pairs[chosen]]
        return _union(pairs[chosen], starts, starts + events.duration_s[chosen], count)

    rows = np.zeros(count, SELF)
    rows["step"] = np.tile(steps, len(ranks))
    rows["self_s"] = busy(_COMPUTATION)
    rows["waits_s"] = np.stack([busy(kind) for kind in range(3)], axis=1)
    is_there = np.isfinite(begins)
    rows["length_s"][is_there] = (ends - begins)[is_there]
    rows["gaps_s"] = _by_name(events, pairs, is_time & (kinds == _COMPUTATION), rows["self_s"])
    rows["mask"] = np.where(_is_incomplete(events, pairs, count), Mask.INCOMPLETE, Mask.NONE)
    return {
        rank: of_rank[of_rank_is_there]
        for rank, of_rank, of_rank_is_there in zip(
            ranks.tolist(), rows.reshape(len(ranks), -1), is_there.reshape(len(ranks), -1), strict=True
        )
    }


def _kind(name: str) -> int:
    """Which of the waits an operation counts as; _COMPUTATION: none."""
    kinds = ((_POINT_TO_POINT, 2), (_SYNCHRONISING, 0), (_ROOTED, 1))
    found = (kind for parts, kind in kinds if any(part in name.lower() for part in parts))
    return next(found, _COMPUTATION)


def _union(groups: Ids, starts: Seconds, ends: Seconds, count: int) -> Seconds:
    """Length of the union of the intervals of each of ``count`` groups; starts are not below 0."""
    order = np.lexsort((starts, groups))
    groups, starts, ends = groups[order], starts[order], ends[order]
    # Groups one behind the other on one line, so that what one group has reached never reaches into the next.
    offset = groups * (float(ends.max(initial=0.0)) + 1.0)
    reached = np.maximum.accumulate(ends + offset) - offset
    before = np.concatenate([[0.0], reached[:-1]])
    before[1:][groups[1:] != groups[:-1]] = 0.0
    lengths = np.maximum(ends - np.maximum(starts, before), 0.0)
    return np.bincount(groups, lengths, count).astype(np.float64)


def _by_name(events: _Events, pairs: Ids, chosen: Bools, self_s: Seconds) -> npt.NDArray[np.float64]:
    """Self time by position, which is the name of the computation; (pairs, POSITIONS)."""
    positions = np.array([position(name) for name in events.names], np.int64)[events.name]
    flat = np.bincount(
        pairs[chosen] * POSITIONS + positions[chosen], events.duration_s[chosen], len(self_s) * POSITIONS
    )
    gaps = flat.reshape(-1, POSITIONS)
    total = gaps.sum(axis=1)
    # Computations that overlap count once in self time; positions keep their shares.
    scale = np.divide(self_s, total, out=np.zeros_like(total), where=total > 0)
    return np.asarray(gaps * scale[:, None])


def _is_incomplete(events: _Events, pairs: Ids, count: int) -> Bools:
    """Steps with a time that is none, or not as many passes forward and backward as most workers of the stage had."""
    is_pass = np.array([_PART_OF_PASSES in name for name in events.names], np.bool_)[events.name]
    passes = np.bincount(pairs[is_pass], minlength=count)
    is_incomplete = np.bincount(pairs, ~events.is_time, count) > 0
    there, at = np.unique(pairs, return_index=True)
    _, alike = np.unique(np.stack([events.stage[at], events.step[at]]), axis=1, return_inverse=True)
    order = np.argsort(alike.reshape(-1), kind="stable")
    edges = np.flatnonzero(np.diff(alike.reshape(-1)[order])) + 1
    for of_group in np.split(there[order], edges):
        is_incomplete[of_group] |= passes[of_group] != np.median(passes[of_group])
    return np.asarray(is_incomplete)
