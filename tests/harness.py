"""Real daemons, real trainers, real signals: what tests of more than one process are written with.

``Stage`` owns everything a test starts and removes it afterwards: folders, arenas, processes. Trainers are forked from
a nursery (``trainer_nursery``) that has torch imported already, so a restart costs milliseconds. No wait is a sleep:
each polls a condition until a deadline, and says what it waited for when that is over.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

from processes import (
    ANSWER_S,
    CKPTD,
    PATIENCE_S,
    CliResult,
    Signalled,
    clean_environment,
    free_port,
    run_cli,
    wait_until,
)

from bench.fork_server import ForkServer
from ckptd.cli import channel
from ckptd.cli.messages import plain
from ckptd.errors import CkptdError
from ckptd_api.v1 import operator_pb2

__all__ = ["CliResult", "DaemonProcess", "Nursery", "Stage", "TrainerProcess", "free_port", "run_cli", "wait_until"]
HERE = Path(__file__).parent
TINY_TRAINER = HERE / "tiny_trainer.py"


Spawn = Callable[[Sequence[str], Mapping[str, str], Path], Any]  # to a Popen, or what does for one


def _spawn(command: Sequence[str], env: Mapping[str, str], log_path: Path) -> subprocess.Popen[bytes]:
    with log_path.open("ab") as log:
        return subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)


class DaemonProcess(Signalled):
    """One `ckptd serve` in a folder of its own. It is ready when the constructor returns, unless ``wait`` is False.

    ``failpoints`` is CKPTD_FAILPOINTS of the daemon alone. ``flags`` are added to the command line. ``listen``:
    at any free port, or at this one. ``spawn`` starts the process: by default a new one of the installed command.
    """

    def __init__(
        self,
        *flags: object,
        tiers: Sequence[str] = (),
        memory: str = "64MiB",
        slots: int = 3,
        failpoints: str = "",
        env: Mapping[str, str] | None = None,
        http: bool = False,
        listen: bool | int = False,
        wait: bool = True,
        prefix: Sequence[str] = (),
        spawn: Spawn | None = None,
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ckptd-"))
        self.folder.chmod(0o755)
        self.socket = self.folder / "d.sock"
        self.arena = Path("/dev/shm") / f"ckptd-test-{secrets.token_hex(6)}"
        self.log_path = self.folder / "daemon.log"
        self.http = f"127.0.0.1:{free_port()}" if http else ""
        self.tiers = [t.format(folder=self.folder) for t in tiers]
        self.failpoints = failpoints
        self.env = dict(env or {})
        self._prefix = list(prefix)
        self._command: list[str] = ["serve", "--socket", str(self.socket), "--arena", str(self.arena)]
        self._command += ["--memory", memory, "--slots", str(slots), *map(str, flags)]
        self._command += ["--http", self.http] if self.http else []
        self.listen = f"127.0.0.1:{free_port() if listen is True else listen}" if listen else ""
        self._command += ["--listen", self.listen, "--insecure"] if self.listen else []
        for tier in self.tiers:
            self._command += ["--tier", tier]
        self._spawn = spawn or _spawn
        self.process: Any = None
        self.start(wait=wait)

    # --- life ----------------------------------------------------------------------------------------------------
    def start(self, *, wait: bool = True) -> None:
        env = clean_environment(**self.env)
        if self.failpoints:
            env["CKPTD_FAILPOINTS"] = self.failpoints
        self.process = self._spawn([*self._prefix, str(CKPTD), *self._command], env, self.log_path)
        self.pid = self.process.pid
        if wait:
            self.wait_ready()

    def wait_ready(self, timeout_s: float = PATIENCE_S) -> None:
        def is_ready() -> bool:
            assert self.is_alive, f"the daemon ended with {self.process and self.process.returncode}:\n{self.log}"
            try:
                self.status()
            except CkptdError:
                return False
            return True

        wait_until(is_ready, "the daemon to be ready", timeout_s)

    def set_flag(self, flag: str, value: object) -> None:
        """Restart with another value of a flag that was given."""
        self._command[self._command.index(flag) + 1] = str(value)
        self.restart()

    @property
    def address(self) -> str:
        return f"unix://{self.socket}"

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def kill(self) -> None:
        """SIGKILL, and gone when this returns."""
        if self.is_alive:
            self.signal(signal.SIGKILL)
        self.wait_exit()

    def terminate(self) -> int:
        """SIGTERM; the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait_exit()

    def wait_exit(self, timeout_s: float = PATIENCE_S) -> int:
        assert self.process is not None
        return self.process.wait(timeout_s)

    def restart(self, *, failpoints: str = "", env: Mapping[str, str] | None = None, wait: bool = True) -> None:
        """Kill it when it is alive and start it again, by default without failpoints."""
        self.kill()
        self.failpoints = failpoints
        if env is not None:
            self.env = dict(env)
        self.start(wait=wait)

    def close(self) -> None:
        if self.is_alive:
            with contextlib.suppress(ProcessLookupError):
                self.signal(signal.SIGKILL)
            self.wait_exit()
        shutil.rmtree(self.arena, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- questions -----------------------------------------------------------------------------------------------
    def cli(self, verb: str, *args: object, **env: str) -> CliResult:
        return run_cli(verb, *args, "--socket", self.socket, **env)

    def status(self) -> dict[str, Any]:
        with channel.connect(self.address) as daemon:
            return dict(plain(daemon.unary(daemon.stub.GetStatus, operator_pb2.GetStatusRequest(), ANSWER_S)))

    def rows(self, run: str) -> list[dict[str, Any]]:
        """One row a copy of a checkpoint, newest first."""
        with channel.connect(self.address) as daemon:
            request = operator_pb2.ListCheckpointsRequest(run=run)
            return list(plain(daemon.unary(daemon.stub.ListCheckpoints, request))["rows"])

    def steps(self, run: str, source: str = "memory", state: str | None = None) -> list[int]:
        """The steps of ``run`` held by ``source`` ("memory", "tier"), newest first."""
        return [
            row["snapshot"]["step"]
            for row in self.rows(run)
            if (row["source"] == "memory") == (source == "memory") and state in (None, row["state"])
        ]

    def findings(self, run: str) -> list[str]:
        """What `ckptd verify` finds, as "source: problem"."""
        with channel.connect(self.address) as daemon:
            answers = daemon.stream(daemon.stub.Verify, operator_pb2.VerifyRequest(run=run), 30.0)
            return sorted({f"{f.source}: {f.problem}" for answer in answers for f in answer.findings})

    def run_status(self, run: str) -> dict[str, Any]:
        """The newest incarnation of ``run`` as status tells it."""
        mine = [r for r in self.status()["runs"] if r["run"] == run]
        return max(mine, key=lambda r: int(r["incarnation"].split("-")[0]), default={})

    def watermark(self, run: str, level: str) -> int | None:
        """The newest step of the newest incarnation that is "staged", "protected" or "durable"."""
        marks = self.run_status(run).get("watermarks")
        return None if marks is None else marks[level]

    def wait_mark(self, run: str, level: str, step: int, timeout_s: float = PATIENCE_S) -> None:
        wait_until(lambda: (self.watermark(run, level) or -1) >= step, f"step {step} of {run} to be {level}", timeout_s)

    def slot_files(self) -> list[Path]:
        return sorted(self.arena.glob("*.slot"))

    def get(self, path: str) -> tuple[int, str]:
        """(status, body) of the HTTP page ``path``."""
        try:
            with urllib.request.urlopen(f"http://{self.http}{path}", timeout=ANSWER_S) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


class Nursery(ForkServer):
    """The process that trainers are forked from: one for the whole test session."""

    def __init__(self) -> None:
        super().__init__(
            [sys.executable, str(HERE / "trainer_nursery.py")], clean_environment(GRPC_ENABLE_FORK_SUPPORT="0")
        )


class TrainerProcess(Signalled):
    """A Python script as a process of its own, whose events are JSON lines that it appends to $TRAINER_EVENTS.

    A script that waits for the test (``tiny_trainer --hold-at``) polls for a file ``go-NAME`` in $TRAINER_CONTROL.
    """

    def __init__(
        self, nursery: Nursery, script: Path, args: Sequence[object] = (), env: Mapping[str, str] | None = None
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="trainer-"))
        self._events_path = self.folder / "events"
        self._events_path.touch()
        self.stderr_path = self.folder / "stderr"
        self._nursery = nursery
        self._returncode: int | None = None
        extra = {"TRAINER_EVENTS": str(self._events_path), "TRAINER_CONTROL": str(self.folder), **(env or {})}
        self.pid = nursery.fork([str(script), *map(str, args)], clean_environment(**extra), str(self.stderr_path))

    # --- life ----------------------------------------------------------------------------------------------------
    @property
    def returncode(self) -> int | None:
        """The exit code, minus the signal that ended it, or None while it runs."""
        if self._returncode is None:
            self._returncode = self._nursery.poll(self.pid)
        return self._returncode

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        wait_until(lambda: self.returncode is not None, f"trainer {self.pid} to end\n{self.stderr}", timeout_s)
        assert self._returncode is not None
        return self._returncode

    def finish(self, timeout_s: float = PATIENCE_S) -> dict[str, Any]:
        """Wait for a good end; its last event."""
        assert self.wait(timeout_s) == 0, self.stderr
        return self.events[-1]

    def kill(self) -> None:
        if self.returncode is None:
            self.signal(signal.SIGKILL)
        self.wait()

    def close(self) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.signal(signal.SIGKILL)
            self.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- events --------------------------------------------------------------------------------------------------
    @property
    def stderr(self) -> str:
        return self.stderr_path.read_text(errors="replace") if self.stderr_path.exists() else ""

    @property
    def events(self) -> list[dict[str, Any]]:
        whole = self._events_path.read_text().rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines()]

    def of(self, event: str) -> list[dict[str, Any]]:
        return [e for e in self.events if e["event"] == event]

    def wait_event(self, event: str, timeout_s: float = PATIENCE_S, **fields: Any) -> dict[str, Any]:
        """The first ``event`` whose fields are ``fields``; fails early when the trainer has ended without it."""

        def find() -> dict[str, Any] | None:
            is_over = self.returncode is not None
            found = [e for e in self.of(event) if all(e.get(k) == v for k, v in fields.items())]
            assert found or not is_over, f"trainer ended ({self._returncode}) without {event} {fields}\n{self.stderr}"
            return found[0] if found else None

        found = wait_until(find, f"event {event} {fields} of trainer {self.pid}", timeout_s)
        assert found is not None
        return found

    def wait_step(self, step: int, timeout_s: float = PATIENCE_S) -> dict[str, Any]:
        return self.wait_event("step", timeout_s, step=step)

    def hashes(self) -> dict[int, str]:
        """step -> hash of the state as it was after that step."""
        return {e["step"]: e["hash"] for e in self.of("step")}

    def release(self, name: object) -> None:
        """Let the trainer go on from its hold ``name``."""
        (self.folder / f"go-{name}").touch()


class Stage:
    """Starts daemons and trainers for one test; ``close`` ends them all and removes what they left."""

    def __init__(self, nursery: Nursery) -> None:
        self._nursery = nursery
        self.daemons: list[DaemonProcess] = []
        self.trainers: list[TrainerProcess] = []
        self._clean: list[Callable[[], None]] = []
        self._stores: list[Any] = []

    def daemon(self, *flags: object, **options: Any) -> DaemonProcess:
        self.daemons.append(DaemonProcess(*flags, **options))
        return self.daemons[-1]

    def tier_daemon(self, *flags: object, options: str = "every=1,keep=100", **more: Any) -> DaemonProcess:
        """With one tier: in the daemon's folder, every snapshot durable."""
        return self.daemon(*flags, tiers=[f"file://{{folder}}/tier,{options}"], **more)

    def script(
        self, path: Path, *args: object, daemon: DaemonProcess | None = None, env: Mapping[str, str] | None = None
    ) -> TrainerProcess:
        """Run any script as a trainer of ``daemon``."""
        address = {"CKPTD_DAEMON": daemon.address} if daemon else {}
        self.trainers.append(TrainerProcess(self._nursery, path, args, {**address, **(env or {})}))
        return self.trainers[-1]

    def trainer(
        self, daemon: DaemonProcess, *args: object, failpoints: str = "", env: Mapping[str, str] | None = None
    ) -> TrainerProcess:
        """``tiny_trainer`` with ``args`` (see its --help)."""
        points = {"CKPTD_FAILPOINTS": failpoints} if failpoints else {}
        return self.script(TINY_TRAINER, *args, daemon=daemon, env={**points, **(env or {})})

    def ranks(
        self, daemon: DaemonProcess, world_size: int, *args: object, envs: Mapping[int, Mapping[str, str]] | None = None
    ) -> list[TrainerProcess]:
        """``world_size`` tiny trainers of one job, without collectives: they share a store that lives here."""
        from datetime import timedelta

        import torch.distributed as dist

        store = dist.TCPStore(
            "127.0.0.1", 0, None, is_master=True, timeout=timedelta(seconds=60), wait_for_workers=False
        )
        self._stores.append(store)  # its server lives as long as this
        job = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
        own = envs or {}
        return [
            self.trainer(daemon, *args, env={**job, "RANK": str(r), "LOCAL_RANK": str(r), **own.get(r, {})})
            for r in range(world_size)
        ]

    def on_close(self, clean: Callable[[], None]) -> None:
        self._clean.append(clean)

    def report(self) -> str:
        """The logs of everything that was started, for a test that failed."""
        parts = [f"--- daemon {d.folder}\n{d.log}" for d in self.daemons]
        parts += [
            f"--- trainer {t.pid} ({t.returncode})\n{t.stderr}" + "\n".join(map(str, t.events[-12:]))
            for t in self.trainers
        ]
        return "\n".join(parts)

    def close(self) -> None:
        for trainer in self.trainers:
            trainer.close()
        for daemon in self.daemons:
            daemon.close()
        for clean in reversed(self._clean):
            clean()
