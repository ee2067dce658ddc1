"""From save() to staged, checksums included, against a plain memcpy of the same bytes; cores otherwise idle."""

from __future__ import annotations

import argparse
import statistics
import time

from bench.rig import MIB, Memcpy, daemon, report, state_bytes, trained, warm_up
from ckptd_client import Checkpointer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size-mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    model, optimizer = trained(arguments.size_mib * MIB)
    size = state_bytes(model, optimizer)
    memcpy = Memcpy(size)
    staged, copies = [], []
    with (
        daemon("6GiB") as (address, _, _),
        Checkpointer({"m": model, "o": optimizer}, "stage", address, every=10**9) as c,
    ):
        warm_up(c)
        for number in range(arguments.rounds):
            copies.append(memcpy.seconds())
            started = time.perf_counter()
            c.save(1000 + number).wait("staged", 60)
            staged.append(time.perf_counter() - started)
    copy, stage = statistics.median(copies), statistics.median(staged)
    report("stage", {"bytes": size, "memcpy_s": copy, "staged_s": stage, "ratio": copy / stage})


if __name__ == "__main__":
    main()
