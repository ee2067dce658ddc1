"""A link that becomes slow between nodes of a real job, and what ``ckptd faults`` names: the link, a node, or others.

Each case is a job on gloo with a rank, a daemon and a network namespace for each node (``detector_fabric``); amid it
the link of one node to the switch gets a quarter of its rate. A case is right when that node, or a link that ends
there, is named within ``WITHIN`` operations of the job and nobody else is ever named for sure. An operation is a
collective of the gradients, or a transfer to one neighbour. Needs root, and namespaces; uses nothing outside of them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import trustme

from bench.detector_fabric import RECEIVING, SENDING, SIDES, Fabric, fabric
from bench.detector_link_job import Traffic
from bench.detector_nursery import Nursery
from bench.rig import MIB, report

RATE_MBIT_S = 200.0
SLOWDOWN = 4.0
WITHIN = 50
AFTERWARDS = 10  # operations in which others may still be named
WARM_UP_STEPS = 3
POLL_S = 0.1
START_S = 60.0
OPERATION_MOST_S = 5.0
PORT = 7070
CKPTD = Path(sys.executable).with_name("ckptd")


@dataclass(frozen=True)
class Case:
    """The link of node ``victim`` is slow from step ``at_step`` on, on these ``sides``; -1: none is."""

    mode: str
    nodes: int
    victim: int
    sides: tuple[str, ...]
    at_step: int
    congestion: str = "cubic"
    compute_s: float = 0.1
    size_bytes: int = 2 * MIB


@dataclass
class Result:
    """``suspected`` and ``confirmed``: operations from the injection to the answer that names it; None: never.
    ``before``: what was found before the injection. ``innocents``: places that do not have the fault and are named,
    each with whether that was for sure."""

    case: Case
    suspected: int | None = None
    confirmed: int | None = None
    named_s: float | None = None
    before: list[dict[str, Any]] = field(default_factory=list)
    innocents: dict[tuple[str, tuple[str, ...]], bool] = field(default_factory=dict)
    faults: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_right(self) -> bool:
        is_in_time = self.suspected is not None and self.suspected <= WITHIN
        return not any(self.innocents.values()) and (is_in_time or self.case.victim < 0)


def _authority(folder: Path, addresses: list[str]) -> dict[str, str]:
    """Certificate, key and authority for all nodes, by the option that takes each."""
    ca = trustme.CA()
    issued = ca.issue_cert(*addresses, common_name="node")
    paths = {part: str(folder / f"{part}.pem") for part in ("ca", "cert", "key")}
    ca.cert_pem.write_to_path(paths["ca"])
    issued.cert_chain_pems[0].write_to_path(paths["cert"])
    issued.private_key_pem.write_to_path(paths["key"])
    return paths


class Cluster:
    """A daemon on each node of a fabric, and the ranks of one job."""

    def __init__(self, net: Fabric, folder: Path) -> None:
        self.net, self.folder = net, folder
        self.arena = Path("/dev/shm") / folder.name
        self._pems = _authority(folder, [net.address(at) for at in range(net.count)])
        self._processes: list[subprocess.Popen[bytes]] = []
        self._nursery: Nursery | None = None

    def socket(self, at: int) -> Path:
        return self.folder / f"{at}.sock"

    def start_daemons(self) -> None:
        for at in range(self.net.count):
            command = [*self.net.within(at), CKPTD, "serve", "--socket", self.socket(at), "--memory", "32MiB"]
            command += ["--arena", self.arena / str(at), "--listen", f"{self.net.address(at)}:{PORT}"]
            command += [text for part, path in self._pems.items() for text in (f"--tls-{part}", path)]
            self._start(command, f"daemon-{at}.log")
        until = time.monotonic() + START_S
        while not all(self.socket(at).with_suffix(".fd.sock").exists() for at in range(self.net.count)):
            if time.monotonic() > until or any(process.poll() is not None for process in self._processes):
                raise RuntimeError(f"a daemon did not start: {self.folder}")
            time.sleep(0.05)

    def watch(self) -> Path:
        """A file with an answer of ``ckptd faults``, asked on the first node, in each line."""
        command = [*self.net.within(0), CKPTD, "faults", "--watch", "--json", "--socket", self.socket(0)]
        return self._start(command, "faults.json")

    def _start(self, command: list[Any], name: str) -> Path:
        with open(self.folder / name, "wb") as out:
            self._processes.append(subprocess.Popen([str(part) for part in command], stdout=out, stderr=out))
        return self.folder / name

    def start_ranks(self, traffic: Traffic) -> None:
        self._nursery = Nursery()
        for rank in range(self.net.count):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": "0",
                "WORLD_SIZE": str(self.net.count),
                "MASTER_ADDR": self.net.address(0),
                "MASTER_PORT": "29500",
                "GLOO_SOCKET_IFNAME": "eth0",
                "CKPTD_DAEMON": f"unix://{self.socket(rank)}",
                "CKPTD_RUN": "link",
                "CKPTD_WARM_UP_STEPS": str(WARM_UP_STEPS),
            }
            journal = str(self.folder / f"rank-{rank}.journal")
            argv = ["link", self.net.namespace(rank), json.dumps(asdict(traffic)), journal]
            output = str(self.folder / f"rank-{rank}.log")
            self._nursery.fork(argv, {**os.environ, **environment}, output)

    def step(self) -> int:
        """The last that rank 0 has done; 0: none."""
        journal = self.folder / "rank-0.journal"
        lines = journal.read_text().splitlines() if journal.exists() else []
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def close(self) -> None:
        if self._nursery is not None:
            self._nursery.close()  # and the ranks with it
        for process in self._processes:
            process.kill()
            process.wait()
        shutil.rmtree(self.arena, ignore_errors=True)


@contextmanager
def cluster(case: Case) -> Iterator[Cluster]:
    """Everything of a case; what it wrote is kept in CKPTD_BENCH_KEEP."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ckptd-link-")))
        net = stack.enter_context(fabric(f"ckptd{os.getpid()}", case.nodes, RATE_MBIT_S, case.congestion))
        made = Cluster(net, folder)
        stack.callback(made.close)
        yield made
        if kept := os.environ.get("CKPTD_BENCH_KEEP"):
            shutil.copytree(folder, Path(kept) / folder.name, ignore=shutil.ignore_patterns("*.sock", "*.pem"))


def run_case(case: Case, patience_operations: int) -> Result:
    """One job, until shortly after its fault is confirmed, or so many operations after the injection."""
    result = Result(case)
    steps = case.at_step + patience_operations
    with cluster(case) as made:
        made.start_daemons()
        answers = made.watch()
        made.start_ranks(Traffic(case.mode, 2 * steps, case.compute_s, case.size_bytes))
        nodes = _wait_for_step(made, case.at_step, result, answers)
        if case.victim >= 0:
            made.net.limit(case.victim, RATE_MBIT_S / SLOWDOWN, case.sides)
        injected_s, at_step, result.before = time.monotonic(), made.step(), result.faults
        until = injected_s + OPERATION_MOST_S * patience_operations
        while (step := made.step()) < min(steps, at_step + (result.confirmed or steps) + AFTERWARDS):
            if time.monotonic() > until:
                raise RuntimeError(f"the job does not get on: {made.folder}")
            time.sleep(POLL_S)
            _take(result, _latest(answers), step - at_step, nodes)
            if result.suspected is not None and result.named_s is None:
                result.named_s = time.monotonic() - injected_s
    return result


def _wait_for_step(made: Cluster, step: int, result: Result, answers: Path) -> list[str]:
    """The nodes' names, once the job is at ``step``. What is found before that is an innocent."""
    until = time.monotonic() + START_S + OPERATION_MOST_S * step
    while made.step() < step:
        if time.monotonic() > until:
            raise RuntimeError(f"the job does not get on: {made.folder}")
        time.sleep(POLL_S)
    nodes = [(made.arena / str(at) / "node_id").read_text().strip() for at in range(made.net.count)]
    _take(result, _latest(answers), -1, nodes)
    return nodes


def _latest(answers: Path) -> list[dict[str, Any]]:
    whole = answers.read_bytes().rpartition(b"\n")[0].splitlines()
    found: list[dict[str, Any]] = json.loads(whole[-1])["faults"] if whole and whole[-1].startswith(b"{") else []
    return found


def _take(result: Result, found: list[dict[str, Any]], operations: int, nodes: list[str]) -> None:
    victim = nodes[result.case.victim] if result.case.victim >= 0 and operations >= 0 else None
    result.faults = found
    for fault in found:
        named = {*fault["nodes"], *(nodes[rank] for rank in fault["ranks"])}
        is_sure = fault["confidence"] != "suspect"
        is_of_network = fault["kind"] in ("slow_link", "slow_comm")
        is_new = all(fault["first_seen_s"] != old["first_seen_s"] for old in result.before)
        if victim in named and len(named) <= 2 and is_of_network:
            if is_new:
                result.suspected = operations if result.suspected is None else result.suspected
                result.confirmed = operations if is_sure and result.confirmed is None else result.confirmed
        elif named:
            place = fault["kind"], tuple(sorted(named))
            result.innocents[place] = is_sure or result.innocents.get(place, False)


def cases(seed: int, count: int) -> Iterator[Case]:
    chance = random.Random(seed)
    for number in range(count):
        mode, nodes = ("ddp", "ring")[number % 2], (4, 8)[number // 2 % 2]
        sides = chance.choice((SIDES, SIDES, (SENDING,), (RECEIVING,)))
        victim = chance.randrange(nodes)
        yield Case(mode, nodes, victim, sides, chance.randint(45, 65), chance.choice(("cubic", "cubic", "bbr")))


def show(result: Result) -> str:
    case = result.case
    where = f"{case.mode:4} {case.nodes} nodes, {'+'.join(case.sides)} of {case.victim}, {case.congestion}"
    seen = [(f["kind"], f["ranks"], f["confidence"]) for f in result.faults]
    named = f"suspected after {result.suspected}, confirmed after {result.confirmed} operations"
    innocents = f"innocents suspected {len(result.innocents)}, confirmed {sum(result.innocents.values())}"
    return f"{'right' if result.is_right else 'WRONG'}  {where}: {named}; {innocents}; {seen}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=24)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--skip", type=int, default=0, help="cases of the seed that are left out")
    parser.add_argument("--healthy", action="store_true", help="slow no link down: whom does it name?")
    parser.add_argument("--patience", type=int, default=80, metavar="OPERATIONS")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that namespaces are removed
    results = []
    for case in list(cases(arguments.seed, arguments.cases))[arguments.skip :]:
        result = run_case(replace(case, victim=-1) if arguments.healthy else case, arguments.patience)
        results.append(result)
        sys.stderr.write(show(result) + "\n")
    for mode in sorted({result.case.mode for result in results}):
        _report(mode, [result for result in results if result.case.mode == mode])


def _report(mode: str, results: list[Result]) -> None:
    suspected = [result.suspected for result in results if result.suspected is not None]
    confirmed = [result.confirmed for result in results if result.confirmed is not None]
    figures: dict[str, float | int | str] = {
        "mode": mode,
        "cases": len(results),
        "right": sum(result.is_right for result in results) / len(results),
        "with_innocents_suspected": sum(bool(result.innocents) for result in results),
        "with_innocents_confirmed": sum(any(result.innocents.values()) for result in results),
    }
    if suspected:
        figures |= {"median_operations": statistics.median(suspected), "most_operations": max(suspected)}
        figures |= {"median_s": statistics.median(result.named_s for result in results if result.named_s is not None)}
    if confirmed:
        figures |= {"confirmed": len(confirmed), "median_confirmed_operations": statistics.median(confirmed)}
    report("detector_link", figures)


if __name__ == "__main__":
    main()
