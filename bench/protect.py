"""Protection between daemons on this machine, against bare gRPC streams of the same bytes between as many processes.

A daemon and a rank a node. What counts is the time from the last seal until the daemon of rank 0 says that the step is
protected, checksums, coding and the way of the watermarks included; the parts of it come from the daemons' own metrics:
until the first and the last node began (they hear of a staged step), pulling and encoding, and until it was heard that
all had ended. The limit moves the same pieces between the same processes, m images into each, in turn with it. Beside
it the memory of parity: what a generation takes of the longest image, and how many generations there is memory for.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from bench.grpc_limit import BarePeers
from bench.peers import DaemonProcess, PeerJob, heard, peers, protection_streams, pulled_bytes, scrape, value
from bench.rig import MIB, report
from ckptd.erasure.stripes import Stripes
from ckptd.model import Geometry, SnapshotId
from ckptd_api.v1 import types_pb2

WARM_UP = 3  # both generations of parity and all slots are made by then
_PAUSE_S = 0.5


class Round(NamedTuple):
    """One protected snapshot, seconds: in all, and its parts."""

    protect: float
    until_first_began: float
    until_last_began: float
    pull: float
    until_heard: float


def protect(job: PeerJob, watch: Iterator[types_pb2.Watermarks], step: int) -> Round:
    """Save and wait until it is protected."""
    before = [value(scrape(daemon.http), "ckptd_protect_seconds_sum") for daemon in job.daemons]
    sealed = job.save_all(step)
    known = heard(watch, step)
    pages = [scrape(daemon.http) for daemon in job.daemons]
    began = [value(page, "ckptd_snapshot_timestamp_seconds", level="staged") for page in pages]
    took = [value(page, "ckptd_protect_seconds_sum") - was for page, was in zip(pages, before, strict=True)]
    ended = max(start + seconds for start, seconds in zip(began, took, strict=True))
    return Round(known - sealed, min(began) - sealed, max(began) - sealed, ended - min(began), known - ended)


def parity_held(daemons: Sequence[DaemonProcess], step: int, image_bytes: int, m: int) -> dict[str, float]:
    """Memory of parity at the node that has most: of one generation, of the longest image, and in generations."""
    shares, generations = [], []
    for daemon in daemons:
        files = daemon.status()["parity"]
        newest = [f["size_bytes"] for f in files if f["state"] == "sealed" and f["snapshot"]["step"] == step]
        shares.append(sum(newest) / image_bytes)
        generations.append(len(files) / m)
    return {"parity_per_image": max(shares), "generations_held": max(generations)}


def measure(geometry: Geometry, size_bytes: int, rounds: int) -> dict[str, float | int | str]:
    k, m = geometry
    nodes = k + m
    memory = int(size_bytes * (3.1 + 2.2 * m / k)) + 32 * MIB
    with peers(nodes, memory) as daemons:
        job = PeerJob(daemons, size_bytes, str(geometry))
        watch, http = job.watch(), [daemon.http for daemon in daemons]
        for step in range(1, WARM_UP + 1):
            protect(job, watch, step)
        image = job.image(0, SnapshotId(job.incarnation, WARM_UP))
        block_bytes = job.roster.block_bytes
        image_bytes = image.blocks * block_bytes
        plan = protection_streams(Stripes.plan(geometry, [image.blocks] * nodes), image.blocks, block_bytes)
        with BarePeers(nodes, image_bytes) as bare:
            bare.seconds(plan)
            before = pulled_bytes(http)
            limits, ours = [], []
            for number in range(rounds):
                limits.append(bare.seconds(plan))
                time.sleep(_PAUSE_S)
                ours.append(protect(job, watch, WARM_UP + 1 + number))
                time.sleep(_PAUSE_S)
        moved = (pulled_bytes(http) - before) // rounds
        held = parity_held(daemons, WARM_UP + rounds, image_bytes, m)
        job.close()
    parts = {f"{name}_s": statistics.median(getattr(one, name) for one in ours) for name in Round._fields}
    pairs = list(zip(limits, ours, strict=True))
    return {
        "geometry": str(geometry),
        "image_bytes": image_bytes,
        "block_bytes": block_bytes,
        "bytes_moved": moved,
        "bytes_of_limit": sum(stream.size_bytes for streams in plan.values() for stream in streams),
        "bare_s": statistics.median(limits),
        **parts,
        "ratio": statistics.median(limit / one.protect for limit, one in pairs),
        "ratio_of_pulling": statistics.median(limit / one.pull for limit, one in pairs),
        **held,
        "parity_beyond_percent": 100 * (held["parity_per_image"] - m / k),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size-mib", type=int, default=128, help="image of a node")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--protect", default="4+2", metavar="K+M")
    arguments = parser.parse_args()
    report("protect", measure(Geometry.parse(arguments.protect), arguments.size_mib * MIB, arguments.rounds))


if __name__ == "__main__":
    main()
