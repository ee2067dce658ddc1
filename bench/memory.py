"""Memory of the daemon beyond the slots it was told to hold, at 4 GiB of slots, with a tier and snapshots going on."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from bench.rig import MIB, daemon, report, trained, warm_up
from ckptd_client import Checkpointer


def private_bytes(pid: int) -> tuple[int, int]:
    """(private memory, shared memory) of a process, bytes: anonymous and file pages against shared memory pages."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    kib = {name: int(fields[name].split()[0]) for name in ("RssAnon", "RssFile", "RssShmem")}
    return (kib["RssAnon"] + kib["RssFile"]) * 1024, kib["RssShmem"] * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size-mib", type=int, default=1340)
    parser.add_argument("--snapshots", type=int, default=8)
    arguments = parser.parse_args()
    model, optimizer = trained(arguments.size_mib * MIB)
    most = shared = 0
    with daemon("4GiB", "--tier", "file://{folder}/tier,keep=1") as (address, pid, _):
        with Checkpointer({"m": model, "o": optimizer}, "memory", address, every=10**9) as c:
            warm_up(c, 3)
            for number in range(arguments.snapshots):
                snapshot = c.save(1000 + number, persist=number % 3 == 0)
                until = time.monotonic() + 4.0
                while time.monotonic() < until:
                    private, shared_now = private_bytes(pid)
                    most, shared = max(most, private), max(shared, shared_now)
                    time.sleep(0.05)
                snapshot.wait("staged", 60)
    report("memory", {"slots_mib": shared / MIB, "beyond_mib": most / MIB})


if __name__ == "__main__":
    main()
