"""Steps of a training loop while its state is being protected at a rate limit, against the same loop without.

Two daemons, each with a Checkpointer process whose state has one size: the first trains (one thread: an optimizer step
over the whole state, for protection takes memory bandwidth, and matrix products), the second only saves along. Either
has two runs, one with ``protect="1+1"`` and one with "off". A phase is a snapshot of one of them, waited for until it
is staged, and then steps that are timed; phases alternate, and the state is so large that protection outlasts a phase.
Both ends of protection are on this machine, so its cores carry twice what a node's would.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import TCPStore

from bench.peers import peers, pulled_bytes
from bench.rig import MIB, report, state_bytes, trained
from ckptd.config import parse_size
from ckptd.errors import CkptdError
from ckptd_client import Checkpointer, Snapshot

RUNS = {"protected": "1+1", "off": "off"}
_STEPS_BEFORE = 2
_MARGIN = 1.6  # how much longer protection goes on than the steps of a phase
_WARM_UP = 4
_WAIT_S = 120.0


class Rank:
    """A process with a Checkpointer for each of ``RUNS``. Rank 0 leads: what it saves, rank 1 saves too."""

    def __init__(self, size_bytes: int) -> None:
        torch.set_num_threads(1)
        self.model, self.optimizer = trained(size_bytes)
        state = {"m": self.model, "o": self.optimizer}
        self.rank = int(os.environ["RANK"])
        self._store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        self._store.set_timeout(timedelta(hours=1))
        self.checkpointers = {
            run: Checkpointer(state, run, every=10**9, protect=protect) for run, protect in RUNS.items()
        }
        self._orders = 0

    def save(self, run: str) -> Snapshot:
        """Lead a snapshot of ``run``."""
        self._order(run)
        return self.checkpointers[run].save(self._orders)

    def follow(self) -> None:
        """Save what rank 0 saves until it says that it is over."""
        while True:
            self._orders += 1
            order = self._store.get(f"order/{self._orders}").decode()
            if order == "end":
                return
            self.checkpointers[order].save(self._orders)

    def close(self) -> None:
        if self.rank == 0:
            self._order("end")
        for checkpointer in self.checkpointers.values():
            checkpointer.close()

    def _order(self, order: str) -> None:
        self._orders += 1
        self._store.set(f"order/{self._orders}", order)


def staged(rank: Rank, run: str) -> Snapshot:
    """A staged snapshot of ``run``: steps that are skipped, while slots are made, are tried again."""
    until = time.monotonic() + _WAIT_S
    while time.monotonic() < until:
        snapshot = rank.save(run)
        try:
            snapshot.wait("staged", 60)
        except CkptdError as error:
            print(f"{run}: {error}", file=sys.stderr)
            time.sleep(0.5)
        else:
            return snapshot
    raise RuntimeError(f"no snapshot of run {run} is staged")


def step_of(rank: Rank, step_s: float) -> Callable[[], None]:
    """A training step of about ``step_s``: the optimizer, and matrix products for the rest."""
    x = torch.randn(512, 512)

    def step(products: int) -> None:
        rank.optimizer.step()
        for _ in range(products):
            torch.mm(x, x)

    def seconds(products: int) -> float:
        started = time.perf_counter()
        step(products)
        return time.perf_counter() - started

    seconds(100)
    alone = statistics.median(seconds(0) for _ in range(5))
    product_s = (statistics.median(seconds(100) for _ in range(5)) - alone) / 100
    products = max(1, round((step_s - alone) / product_s))
    return lambda: step(products)


def phase(rank: Rank, run: str, step: Callable[[], None], phase_s: float, http: Sequence[str]) -> dict[str, Any]:
    """Seconds of each step in the ``phase_s`` after a snapshot of ``run``, as long as it is not protected yet. The
    first steps are not counted: protection begins in them."""
    snapshot = staged(rank, run)
    for _ in range(_STEPS_BEFORE):
        step()
    before, began = pulled_bytes(http), time.perf_counter()
    taken: list[float] = []
    is_throughout = True
    while is_throughout and time.perf_counter() - began < phase_s:
        started = time.perf_counter()
        step()
        ended = time.perf_counter()
        is_throughout = RUNS[run] == "off" or not snapshot.protected.done()
        if is_throughout:
            taken.append(ended - started)
    pulled = (pulled_bytes(http) - before) / (time.perf_counter() - began) / len(http)
    if RUNS[run] != "off":
        snapshot.wait("protected", _WAIT_S)
    time.sleep(0.5)
    return {"run": run, "steps_s": taken, "is_throughout": is_throughout, "pulled_bytes_s": pulled}


def rank_main(arguments: argparse.Namespace) -> None:
    rank = Rank(arguments.state_bytes)
    if rank.rank:
        rank.follow()
        rank.close()
        return
    http = arguments.http.split(",")
    for run in RUNS:
        for _ in range(_WARM_UP):
            snapshot = staged(rank, run)
            if RUNS[run] != "off":
                snapshot.wait("protected", _WAIT_S)
    step = step_of(rank, arguments.step_s)
    phase_s = arguments.steps * arguments.step_s
    phases = [phase(rank, run, step, phase_s, http) for _ in range(arguments.rounds) for run in RUNS]
    size = state_bytes(rank.model, rank.optimizer)
    rank.close()
    print(json.dumps({"bytes": size, "phases": phases}), flush=True)


def run_ranks(arguments: argparse.Namespace, size_bytes: int, rate: int) -> dict[str, Any]:
    """What rank 0 printed."""
    # Two runs, four slots each at most while they are made, two generations of parity of the one.
    memory = 16 * size_bytes + 64 * MIB
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    command = [sys.executable, "-m", "bench.interference", "--state-bytes", str(size_bytes)]
    command += ["--steps", str(arguments.steps), "--step-s", str(arguments.step_s), "--rounds", str(arguments.rounds)]
    with peers(2, memory, "--protect-rate", rate) as daemons:
        command += ["--http", ",".join(daemon.http for daemon in daemons)]
        job: Mapping[str, str] = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
        ranks = []
        for number, daemon in enumerate(daemons):
            own = {"RANK": str(number), "LOCAL_RANK": "0", "CKPTD_DAEMON": daemon.address, "OMP_NUM_THREADS": "1"}
            output = subprocess.PIPE if number == 0 else subprocess.DEVNULL
            ranks.append(subprocess.Popen(command, env={**os.environ, **job, **own}, stdout=output, text=True))
        try:
            printed, _ = ranks[0].communicate(timeout=1500)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    lines = [line for line in (printed or "").splitlines() if line.startswith("{")]
    if not lines:
        raise SystemExit("rank 0 failed")
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", default="64MiB", help="--protect-rate of the daemons")
    parser.add_argument("--step-s", type=float, default=0.15)
    parser.add_argument("--steps", type=int, default=16, help="steps of a phase, when they take --step-s")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--state-bytes", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--http", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.state_bytes:
        rank_main(arguments)
        return
    rate = parse_size(arguments.rate)
    size = int(_MARGIN * rate * arguments.step_s * (arguments.steps + _STEPS_BEFORE))
    result = run_ranks(arguments, size, rate)
    of = {run: [p for p in result["phases"] if p["run"] == run] for run in RUNS}
    ours, without = ([statistics.median(p["steps_s"]) for p in of[run]] for run in RUNS)
    ratios = [off / on for on, off in zip(ours, without, strict=True)]
    report(
        "interference",
        {
            "bytes": result["bytes"],
            "rate_mib_s": rate / MIB,
            "pulled_mib_s": statistics.median(p["pulled_bytes_s"] for p in of["protected"]) / MIB,
            "phases_protected_throughout": f"{sum(p['is_throughout'] for p in of['protected'])} of {len(ratios)}",
            "step_s": statistics.median(without),
            "step_protecting_s": statistics.median(ours),
            "ratio": statistics.median(ratios),
            "ratio_worst_pair": min(ratios),
        },
    )


if __name__ == "__main__":
    main()
