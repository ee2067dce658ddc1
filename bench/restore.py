"""Restore from daemon memory, checksums included, against a plain memcpy, and against dcp.load from page cache."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time

import torch.distributed.checkpoint as dcp

from bench.rig import Memcpy, OneRank, daemon, report, timed, warm_up


def main() -> None:
    rank = OneRank.from_arguments(__doc__)
    memcpy = Memcpy(rank.size_bytes)
    restored, copies = [], []
    with daemon("6GiB") as (address, _, _):
        with rank.checkpointer("restore", address) as c:
            warm_up(c)
            last = c.save(5000)
            last.wait("staged", 60)
        for _ in range(rank.rounds):
            with rank.checkpointer("restore", address) as c:
                copies.append(memcpy.seconds())
                started = time.perf_counter()
                result = c.restore(step=5000)  # by number: resuming from it again and again would be distrusted
                restored.append(time.perf_counter() - started)
                assert result is not None
                assert result.step == 5000
    folder = tempfile.mkdtemp(prefix="dcp-bench-")
    state = rank.state_dict()
    dcp.save(state, checkpoint_id=folder)
    loaded = timed(lambda: dcp.load(state, checkpoint_id=folder), 3)
    shutil.rmtree(folder)
    copy, ours = statistics.median(copies), statistics.median(restored)
    report(
        "restore",
        {
            "bytes": rank.size_bytes,
            "memcpy_s": copy,
            "restore_s": ours,
            "ratio_to_memcpy": copy / ours,
            "dcp_load_s": loaded,
            "times_faster_than_dcp_load": loaded / ours,
        },
    )


if __name__ == "__main__":
    main()
