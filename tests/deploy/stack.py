"""The local stack with a job on it and somebody who is told: what tests and the bench of alerts are written with.

``LocalStack`` is deploy/local as a person starts it, its tier on a small file system of its own where mounting is
allowed. ``Receiver`` takes what Alertmanager tells. ``Job`` is a job of real ranks on gloo, one on each node.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from harness import Nursery, TrainerProcess
from processes import clean_environment, free_port, wait_until

from ckptd.cli import channel
from ckptd.cli.messages import plain
from ckptd_api.v1 import operator_pb2

HERE = Path(__file__).parent
LOCAL = HERE.parents[1] / "deploy" / "local"
LONG_JOB = HERE / "long_job.py"
WARM_UP_STEPS = 3
SETTLED_STEPS = 25  # beyond warm-up, and enough to know what is usual
START_S = 60.0


# --- who is told --------------------------------------------------------------------------------------------------
@dataclass
class Alert:
    """An alert as it was told. Seconds are those of ``time.monotonic``; ``resolved_s`` None: it fires."""

    labels: dict[str, str]
    annotations: dict[str, str]
    fired_s: float
    resolved_s: float | None = None

    @property
    def name(self) -> str:
        return self.labels["alertname"]


class Receiver:
    """A webhook of Alertmanager on loopback; ``alerts`` are all that were ever told, oldest first."""

    def __init__(self) -> None:
        self.alerts: list[Alert] = []
        told = self._told

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                told(body["alerts"])
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self._lock = threading.Lock()

    def _told(self, alerts: Sequence[Mapping[str, Any]]) -> None:
        now = time.monotonic()
        with self._lock:
            for told in alerts:
                open_one = next((a for a in self.alerts if a.labels == told["labels"] and a.resolved_s is None), None)
                if told["status"] == "firing" and open_one is None:
                    self.alerts.append(Alert(dict(told["labels"]), dict(told["annotations"]), now))
                elif told["status"] == "resolved" and open_one is not None:
                    open_one.resolved_s = now

    def find(self, name: str, since_s: float = 0.0, **labels: str) -> Alert | None:
        """The newest alert of that name and these labels that was told after ``since_s``."""
        with self._lock:
            found = [a for a in self.alerts if a.name == name and a.fired_s >= since_s]
        return next((a for a in reversed(found) if labels.items() <= a.labels.items()), None)

    def wait_fired(self, name: str, timeout_s: float, since_s: float = 0.0, **labels: str) -> Alert:
        found = wait_until(lambda: self.find(name, since_s, **labels), f"alert {name} {labels}; {self}", timeout_s)
        assert found is not None
        return found

    def wait_resolved(self, alert: Alert, timeout_s: float) -> None:
        wait_until(lambda: alert.resolved_s is not None, f"{alert.labels} to be resolved", timeout_s)

    def criticals(self, since_s: float) -> set[str]:
        """Names of all critical alerts told after ``since_s``."""
        return {a.name for a in self.alerts if a.fired_s >= since_s and a.labels.get("severity") == "critical"}

    def firing(self) -> list[Alert]:
        with self._lock:
            return [alert for alert in self.alerts if alert.resolved_s is None]

    def __str__(self) -> str:
        return "told so far: " + "; ".join(
            f"{a.labels}{'' if a.resolved_s is None else ' (over)'}" for a in self.alerts
        )

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


# --- the stack ----------------------------------------------------------------------------------------------------
class SmallMount:
    """A namespace in which a file system of ``size`` lies at ``path``; ``prefix`` runs a command where it is seen."""

    def __init__(self, path: Path, size: str) -> None:
        script = f'mount -t tmpfs -o size={size} none "{path}" && echo mounted && exec cat'
        self._process = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.is_mounted = self._process.stdout.readline() == "mounted\n"
        self.prefix = ["nsenter", "-t", str(self._process.pid), "-m"] if self.is_mounted else []

    def close(self) -> None:
        self._process.communicate()


class LocalStack:
    """deploy/local/up in ``state``; it runs when the constructor returns. A second ``up`` mends what was killed."""

    def __init__(self, state: Path, receiver: Receiver, tier_size: str = "64m") -> None:
        self.state = state
        self._receiver = receiver
        (state / "tier").mkdir(parents=True)
        self.mount = SmallMount(state / "tier", tier_size)
        try:
            self.up()
        except BaseException:
            self.close()
            raise

    def up(self) -> None:
        """As a person calls it, with a scrubber that hardly rests."""
        options = ["--state", str(self.state), "--free-ports", "--webhook", self._receiver.url, "--json"]
        self.about = json.loads(self.inside(str(LOCAL / "up"), *options))

    def inside(self, *command: str, is_checked: bool = True) -> str:
        """Run a command where the tier's file system is seen; what it wrote."""
        done = subprocess.run(
            [*self.mount.prefix, *command],
            env=clean_environment(CKPTD_SCRUB_EVERY="1"),
            capture_output=True,
            text=True,
            timeout=START_S,
            check=False,
        )
        assert done.returncode == 0 or not is_checked, done.stdout + done.stderr
        return done.stdout

    @property
    def nodes(self) -> list[dict[str, Any]]:
        """socket, arena, listen, http, pid of each node."""
        return list(self.about["nodes"])

    def status(self, node: int) -> dict[str, Any]:
        with channel.connect(f"unix://{self.nodes[node]['socket']}") as daemon:
            return dict(plain(daemon.unary(daemon.stub.GetStatus, operator_pb2.GetStatusRequest(), 5.0)))

    def node_id(self, node: int) -> str:
        return str(self.status(node)["node_id"])

    def query(self, expression: str) -> list[float]:
        """The values that Prometheus gives."""
        text = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"{self.about['prometheus']}/api/v1/query?{text}", timeout=5) as reply:
            return [float(row["value"][1]) for row in json.load(reply)["data"]["result"]]

    def kill_daemon(self, node: int) -> None:
        os.kill(self.nodes[node]["pid"], signal.SIGKILL)

    @contextlib.contextmanager
    def full_tier(self) -> Iterator[None]:
        """While the block runs, the tier has no space, also not what drains that failed give back."""
        filler = f"{self.about['tier']}/filler"
        filling = subprocess.Popen(
            [*self.mount.prefix, "sh", "-c", f'while :; do cat /dev/zero >>"{filler}"; sleep 0.2; done'],
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            yield
        finally:
            os.killpg(filling.pid, signal.SIGKILL)
            filling.wait()
            self.inside("rm", filler)

    def close(self) -> None:
        subprocess.run([LOCAL / "down", "--state", self.state], timeout=START_S, check=True, capture_output=True)
        self.mount.close()


# --- the job ------------------------------------------------------------------------------------------------------
@dataclass
class Job:
    """A rank on each node of the stack, of run ``run``; ``start`` begins it, and begins it again."""

    stack: LocalStack
    nursery: Nursery
    run: str
    options: Sequence[object] = ()
    ranks: list[TrainerProcess] = field(default_factory=list)

    def start(self) -> None:
        self.close()
        common = {
            "WORLD_SIZE": str(len(self.stack.nodes)),
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "CKPTD_RUN": self.run,
            "CKPTD_WARM_UP_STEPS": str(WARM_UP_STEPS),
            "OMP_NUM_THREADS": "1",
        }
        self.ranks = [
            TrainerProcess(
                self.nursery,
                LONG_JOB,
                self.options,
                {**common, "RANK": str(rank), "CKPTD_DAEMON": f"unix://{node['socket']}"},
            )
            for rank, node in enumerate(self.stack.nodes)
        ]

    def wait_settled(self) -> None:
        """Wait until it trains as usual and Prometheus knows it: what an alert counts has begun at 0."""
        self.wait_steps(SETTLED_STEPS)
        self.wait_mark("protected")
        known = f'count(instance_node_run:ckptd_ranks:last{{run="{self.run}"}} == 1)'
        wait_until(lambda: self.stack.query(known) == [len(self.ranks)], f"Prometheus to know {self.run}", START_S)

    def step(self) -> int:
        """The newest step that rank 0 has done; 0 before the first."""
        return max((event["step"] for event in self.ranks[0].of("step")), default=0)

    def wait_steps(self, count: int, timeout_s: float = START_S) -> None:
        """Wait until it has got on by ``count`` steps."""
        until = self.step() + count
        wait_until(lambda: self.step() >= until, f"{self.run} to get to step {until}\n{self.report()}", timeout_s)

    def wait_mark(self, level: str, timeout_s: float = START_S) -> None:
        """Wait until a step is "staged", "protected" or "durable"."""

        def is_there() -> bool:
            runs = [r for r in self.stack.status(0)["runs"] if r["run"] == self.run]
            assert not any(rank.returncode for rank in self.ranks), self.report()
            return any((r.get("watermarks") or {}).get(level) is not None for r in runs)

        wait_until(is_there, f"a step of {self.run} to be {level}\n{self.report()}", timeout_s)

    @contextlib.contextmanager
    def slowed(self, rank: int, times: float) -> Iterator[None]:
        """While the block runs, the compute of a rank takes so many times as long."""
        slow = self.ranks[rank].folder / "slow"
        fresh = slow.with_name("fresh")
        fresh.write_text(str(times))
        fresh.rename(slow)
        try:
            yield
        finally:
            slow.unlink()

    def finish(self) -> None:
        """End it as jobs end: every rank closes its Checkpointer."""
        (self.ranks[0].folder / "end").touch()
        for rank in self.ranks:
            assert rank.wait() == 0, rank.stderr

    def report(self) -> str:
        return "\n".join(f"--- rank {n} ({r.returncode})\n{r.stderr}" for n, r in enumerate(self.ranks))

    def close(self) -> None:
        for rank in self.ranks:
            rank.close()
        self.ranks = []
