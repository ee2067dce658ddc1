"""Parquet timelines as ByteDance publishes them, made up: a pipeline of workers of which some are slow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "straggler_traces"
STEPS = (16, 21, 27, 29, 34, 404, 408, 413, 414, 802, 811, 1204)
FORWARD_S, BACKWARD_S, MICROBATCHES = 0.1, 0.2, 4


def write_layout(path: Path, **sizes: int) -> Path:
    path.write_text("trial_name: X\nrun_id: 0\n" + "".join(f"{key}: {value}\n" for key, value in sizes.items()))
    return path


def timeline(
    workers: Sequence[tuple[int, int, int]],
    slow: Mapping[int, float] | None = None,
    steps: Sequence[int] = STEPS,
    seed: int = 0,
) -> dict[str, list]:
    """Columns. ``workers``: rank, stage and dp_rank each; ``slow``: factor by rank. All workers leave a step together,
    and so that they do, those that are faster wait: in the reduce-scatter, and before it for something unrecorded."""
    slow, random = slow or {}, np.random.default_rng(seed)
    columns: dict[str, list] = {
        name: [] for name in ("rank", "stage", "dp_rank", "step", "optype", "start_ts", "duration")
    }

    def add(worker: tuple[int, int, int], step: int, name: str, start_s: float, end_s: float) -> None:
        rank, stage, dp_rank = worker
        values = (rank, stage, dp_rank, step, name, start_s, end_s - start_s)
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)

    for step in steps:
        worst_s = 2 * MICROBATCHES * (FORWARD_S + BACKWARD_S) * max([1.0, *slow.values()])
        for worker in workers:
            rank, stage, _ = worker
            # Stages do unequal work, by design.
            factor = slow.get(rank, 1.0) * (1.0 + 0.3 * stage)
            at = 0.01 * rank
            for _ in range(MICROBATCHES):
                for name, length_s in (("forward", FORWARD_S), ("backward", BACKWARD_S)):
                    add(worker, step, f"{name}-recv", at, at + 0.01)
                    at += 0.01
                    length_s *= factor * random.normal(1.0, 0.005)
                    add(worker, step, f"{name}-compute", at, at + length_s)
                    at += length_s
            rest_s = max(worst_s - at, 0.1)
            add(worker, step, "grads-reduce-scatter", at + rest_s / 2, at + rest_s)
            add(worker, step, "optimizer-clip-main-grad", at + rest_s, at + rest_s + 0.02)
            add(worker, step, "optimizer", at + rest_s + 0.02, at + rest_s + 0.05)
    return columns


def write_timeline(path: Path, columns: Mapping[str, list]) -> Path:
    types = {
        "rank": pa.int16(),
        "stage": pa.int8(),
        "dp_rank": pa.int8(),
        "step": pa.int64(),
        "optype": pa.dictionary(pa.int8(), pa.string()),
        "start_ts": pa.float32(),
        "duration": pa.float32(),
    }
    arrays = {name: pa.array(values).cast(types[name]) for name, values in columns.items()}
    parquet.write_table(pa.table(arrays), path)
    return path
