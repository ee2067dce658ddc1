"""Flight Recorder dumps of a small job that stands still, as torch writes them: only what is open, one file a rank."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ckptd.format.timings import Op
from tests.detect.stalled_job import Call, Job

_NAMES = {
    Op.ALL_GATHER: "nccl:_all_gather_base",
    Op.REDUCE_SCATTER: "nccl:_reduce_scatter_base",
    Op.ALL_REDUCE: "nccl:all_reduce",
    Op.BARRIER: "nccl:all_reduce_barrier",
}


def entry(**changed: Any) -> dict[str, Any]:
    return {
        "record_id": 1,
        "pg_id": 0,
        "process_group": ("0", "default_pg"),
        "collective_seq_id": 5,
        "p2p_seq_id": 0,
        "op_id": 5,
        "profiling_name": "nccl:all_reduce",
        "time_created_ns": 1_000_000_000,
        "input_sizes": [[16, 2]],
        "input_dtypes": ["BFloat16"],
        "state": "scheduled",
        "time_discovered_started_ns": None,
        "time_discovered_completed_ns": None,
        "retired": False,
        "timeout_ms": 180_000,
        "is_p2p": False,
    } | changed


def dump(
    entries: list[dict[str, Any]], groups: Mapping[str, list[int]], status: Mapping[str, tuple[int, int]]
) -> dict[str, Any]:
    return {
        "version": "2.9",
        "pg_config": {
            name: {"name": name, "desc": "default_pg" if name == "0" else "TENSOR", "ranks": str(ranks)}
            for name, ranks in groups.items()
        },
        "nccl_version": "2.27.3",
        "pg_status": {
            pg_id: {
                "last_enqueued_collective": enqueued,
                "last_started_collective": -1,
                "last_completed_collective": completed,
            }
            for pg_id, (enqueued, completed) in status.items()
        },
        "entries": entries,
    }


def write(folder: Path, name: str, value: Any, as_json: bool = False) -> None:
    (folder / name).write_bytes(json.dumps(value).encode() if as_json else pickle.dumps(value, protocol=2))


def write_job(
    folder: Path,
    job: Job,
    stuck: Mapping[int, int] | None = None,
    prefix: str = "_dump_",
    as_json: bool = False,
    without: Collection[int] = (),
) -> None:
    """``stuck``: ranks whose device failed, so that so many operations that peers finished stay open on it."""
    for rank in set(range(job.world)) - set(without):
        value = _dump_of(job, rank, (stuck or {}).get(rank, 0))
        write(folder, f"{prefix}{rank}", value, as_json)


def _dump_of(job: Job, rank: int, stale: int) -> dict[str, Any]:
    names = {name: str(number) for number, name in enumerate(job.communicators)}
    own = [name for name, group in job.communicators.items() if rank in group.members]
    pg_ids = {name: 2 * place for place, name in enumerate(own)}  # numbers of the process leave gaps
    calls = job.programs[rank][: job.entered[rank]]
    is_open = [not job.is_done(call, rank) for call in calls]
    first_open = max(0, len(calls) - stale) if stale else len(calls)
    is_open = [flag or place >= first_open for place, flag in enumerate(is_open)]
    counters: Counter[tuple[str, bool]] = Counter()
    status = dict.fromkeys(own, (0, 0))
    entries = []
    for place, (call, flag) in enumerate(zip(calls, is_open, strict=True)):
        counters[call.communicator, call.is_p2p] += 1
        number = counters[call.communicator, call.is_p2p]
        status[call.communicator] = (number, status[call.communicator][1] if flag else number)
        if flag:
            entries.append(
                entry(
                    pg_id=pg_ids[call.communicator],
                    process_group=(names[call.communicator], job.communicators[call.communicator].label),
                    collective_seq_id=counters[call.communicator, False],
                    p2p_seq_id=number if call.is_p2p else 0,
                    profiling_name=_profiling_name(job, call, rank),
                    time_created_ns=10**18 + 1_000_000 * place + rank,
                    is_p2p=call.is_p2p,
                )
            )
    groups = {names[name]: list(job.communicators[name].members) for name in own}
    return dump(entries, dict(sorted(groups.items())), {str(pg_ids[name]): status[name] for name in own})


def _profiling_name(job: Job, call: Call, rank: int) -> str:
    if not call.is_p2p:
        return _NAMES[call.op]
    members = job.communicators[call.communicator].members
    own, peer = members.index(rank), members.index(call.peer)
    return f"nccl:send {own}->{peer}" if call.op is Op.SEND else f"nccl:recv {own}<-{peer}"
