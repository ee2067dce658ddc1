"""A lost node's image back from its peers, against moving as many bytes by bare gRPC from k processes into one.

One node of a k+m group is killed and its arena removed; a fresh daemon at its address gets its rank in the next start
of the job. What counts is the call of Fetch: finding who holds what, reading k fragments of every stripe, decoding,
checksums before and after, the sealed slot. Twice a round, with a node lost each time: right after the rank has joined,
when the fresh daemon still makes its slots (as a job comes back), and once they are made. The limit reads k times the
image, a stream from each of k processes into one, in turn with it.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time

from bench.grpc_limit import BarePeers, Stream
from bench.peers import DaemonProcess, PeerJob, heard, peers
from bench.rig import MIB, report
from ckptd.model import Geometry, SnapshotId
from ckptd_api.convert import incarnation_to_pb, snapshot_from_pb, snapshot_to_pb
from ckptd_api.v1 import node_pb2

_SLOTS = 3
_PAUSE_S = 0.5


def lose(daemon: DaemonProcess) -> None:
    """SIGKILL, and nothing is left of it; another starts with its address."""
    daemon.kill()
    shutil.rmtree(daemon.arena)
    daemon.start()


def fetch_s(job: PeerJob, lost: int, snapshot: SnapshotId) -> float:
    """Seconds that the rank of the lost node waits for its shard; RuntimeError when it came from anywhere but parity.

    It is read back and compared afterwards."""
    rank = job.ranks[lost]
    request = node_pb2.FetchRequest(
        run=job.run,
        incarnation=incarnation_to_pb(job.incarnation),
        snapshot=snapshot_to_pb(snapshot),
        rank=lost,
        world_size=len(job.ranks),
    )
    started = time.perf_counter()
    fetched = rank.call("Fetch", request)
    taken = time.perf_counter() - started
    if fetched.source != "reconstruction":
        raise RuntimeError(f"the shard came from {fetched.source}")
    rank.call("Release", node_pb2.ReleaseRequest(lease=fetched.lease))
    job.fetch(rank, snapshot)  # from memory now: compares every byte
    return taken


def recover(daemons: list[DaemonProcess], size_bytes: int, protect: str, lost: int, *, is_settled: bool) -> float:
    """Lose a node, start the job again, have the shard back. ``is_settled``: once the fresh daemon made its slots."""
    lose(daemons[lost])
    job = PeerJob(daemons, size_bytes, protect)
    try:
        snapshot = snapshot_from_pb(job.candidates().candidates[0].snapshot)
        until = time.monotonic() + 60
        while is_settled and not daemons[lost].status()["slots"]:
            if time.monotonic() > until:
                raise RuntimeError("the fresh daemon made no slots")
            time.sleep(0.05)
        if is_settled:
            time.sleep(_PAUSE_S)
            job.candidates()  # as a rank 0 does right before: the survey that Fetch relies on is a fresh one
        return fetch_s(job, lost, snapshot)
    finally:
        job.close()


def measure(geometry: Geometry, size_bytes: int, lost: int, rounds: int) -> dict[str, float | int | str]:
    k, m = geometry
    protect, memory = str(geometry), int(size_bytes * (3.2 + 2.2 * m / k)) + 32 * MIB
    with peers(k + m, memory, "--slots", _SLOTS) as daemons:
        job = PeerJob(daemons, size_bytes, protect)
        watch = job.watch()
        job.save_all(1)
        heard(watch, 1)
        image = job.image(lost, SnapshotId(job.incarnation, 1))
        image_bytes = image.blocks * job.roster.block_bytes
        job.close()
        recover(daemons, size_bytes, protect, lost, is_settled=True)
        limits, fresh, settled = [], [], []
        with BarePeers(k + 1, image_bytes) as bare:
            plan = {k: [Stream(server, 0, image_bytes) for server in range(k)]}
            bare.seconds(plan)
            for _ in range(rounds):
                fresh.append(recover(daemons, size_bytes, protect, lost, is_settled=False))
                time.sleep(_PAUSE_S)
                limits.append(bare.seconds(plan))
                time.sleep(_PAUSE_S)
                settled.append(recover(daemons, size_bytes, protect, lost, is_settled=True))
    return {
        "geometry": protect,
        "image_bytes": image_bytes,
        "bytes_read": k * image_bytes,
        "bare_s": statistics.median(limits),
        "fetch_s": statistics.median(fresh),
        "fetch_settled_s": statistics.median(settled),
        "ratio": statistics.median(limit / ours for limit, ours in zip(limits, fresh, strict=True)),
        "ratio_settled": statistics.median(limit / ours for limit, ours in zip(limits, settled, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size-mib", type=int, default=256, help="image of a node")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--protect", default="4+2", metavar="K+M")
    parser.add_argument("--lost", type=int, default=3, metavar="RANK", help="whose node is lost; that of 0 coordinates")
    arguments = parser.parse_args()
    geometry = Geometry.parse(arguments.protect)
    report("recover", measure(geometry, arguments.size_mib * MIB, arguments.lost, arguments.rounds))


if __name__ == "__main__":
    main()
