"""The processes of the demo: a daemon and a training job on a stage of their own, killed without mercy, and cleaned up.

Layer: ``cli``. Invariants: everything started is gone, and every file removed, when ``Stage.close`` returns; only
processes that were started here, and their children, are ever signalled, each by its id.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ckptd.config import default_arena
from ckptd.errors import CkptdError, DaemonUnreachable

TRAINING: Final = "ckptd_client.examples.train_gpt"
RANKS: Final = 2
_MEMORY: Final = "256MiB"
_READY_S: Final = 30.0
_QUIET_S: Final = 90.0
_POLL_S: Final = 0.01


class TrainingFailed(CkptdError):
    """The training job of the demo ended by itself, or stopped getting on."""


@dataclass
class Job:
    """A training job: torchrun and its ranks, and the journal that rank 0 writes."""

    process: subprocess.Popen[bytes]
    journal: Path
    output: Path

    def events(self) -> list[dict[str, Any]]:
        """Every line of the journal, those of earlier starts of the run first."""
        whole = self.journal.read_text().rpartition("\n")[0] if self.journal.exists() else ""
        return [json.loads(line) for line in whole.splitlines()]

    def kill(self) -> None:
        """SIGKILL torchrun and every rank, at once; they are gone when this returns."""
        killed = [self.process.pid, *descendants(self.process.pid)]
        for pid in killed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        _wait(lambda: not any(map(is_running, killed)), _READY_S, "the ranks to be gone")

    def wait_for(self, is_there: Callable[[list[dict[str, Any]]], bool], what: str) -> list[dict[str, Any]]:
        """The journal once ``is_there``; TrainingFailed, with what the job said last, when it ends or stands still."""
        before, since = -1, time.monotonic()
        while not is_there(events := self.events()):
            if self.process.poll() is not None and not is_there(self.events()):
                raise TrainingFailed(f"training ended ({self.process.returncode}) before {what}", self._last_words())
            if len(events) != before:
                before, since = len(events), time.monotonic()
            if time.monotonic() - since > _QUIET_S:
                raise TrainingFailed(f"training stood still for {_QUIET_S:g} s before {what}", self._last_words())
            time.sleep(_POLL_S)
        return events

    def _last_words(self) -> str:
        """What a rank raised, else the last lines, which are torchrun's summary of it."""
        lines = self.output.read_text(errors="replace").splitlines() if self.output.exists() else []
        raised = [line for line in lines if re.match(r"(\[rank\d+\]: )?[\w.]+(Error|Exception|Exit|Undecided)\b", line)]
        return "its last words: " + " | ".join(raised[-2:] or lines[-4:]) if lines else "it said nothing"


class Stage:
    """A temporary folder with a socket, a tier and journals, and an arena in shared memory."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ckptd-demo-"))
        self.socket = self.folder / "d.sock"
        self.tier = f"file://{self.folder}/tier"
        self._arena = default_arena(self.socket)
        self._daemon: subprocess.Popen[bytes] | None = None
        self._jobs: list[Job] = []

    # --- the daemon ------------------------------------------------------------------------------------------------
    def start_daemon(self) -> None:
        """Returns when it answers."""
        command = [sys.executable, "-m", "ckptd.cli.main", "serve", "--socket", str(self.socket)]
        command += ["--arena", str(self._arena), "--memory", _MEMORY, "--tier", f"{self.tier},every=1"]
        with self._log.open("ab") as log:
            self._daemon = self._start(command, log, {})
        _wait(self._is_answering, _READY_S, "the daemon to answer")

    def kill_daemon(self) -> None:
        """SIGKILL."""
        if self._daemon is not None:
            self._daemon.kill()
            self._daemon.wait()
            self._daemon = None

    def wipe_memory(self) -> None:
        """Remove the arena, as the loss of the node would."""
        shutil.rmtree(self._arena)

    def _is_answering(self) -> bool:
        from ckptd.cli import channel
        from ckptd_api.v1 import operator_pb2

        if self._daemon is not None and self._daemon.poll() is not None:
            lines = self._log.read_text(errors="replace").splitlines()
            raise DaemonUnreachable("the demo's daemon did not start", " | ".join(lines[-3:]))
        try:
            with channel.connect(str(self.socket)) as daemon:
                daemon.unary(daemon.stub.GetStatus, operator_pb2.GetStatusRequest(), 2.0)
        except CkptdError:
            return False
        return True

    @property
    def _log(self) -> Path:
        return self.folder / "daemon.log"

    # --- training --------------------------------------------------------------------------------------------------
    def start_job(self, run: str, steps: int, seed: int) -> Job:
        """Start (or start again) training of ``run`` to ``steps``."""
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), "-m", TRAINING]
        journal, output = self.folder / f"{run}.journal", self.folder / f"{run}.output"
        arguments = [run, "--steps", str(steps), "--seed", str(seed), "--journal", str(journal)]
        with output.open("ab") as log:
            # One thread per rank: two ranks on two cores, and sums that do not depend on how they are split.
            environment = {"CKPTD_DAEMON": f"unix://{self.socket}", "OMP_NUM_THREADS": "1"}
            process = self._start([sys.executable, *torchrun, *arguments], log, environment)
        self._jobs.append(Job(process, journal, output))
        return self._jobs[-1]

    def close(self) -> None:
        """End everything that runs and remove every file."""
        for job in self._jobs:
            if job.process.poll() is None:
                job.kill()
        self.kill_daemon()
        shutil.rmtree(self._arena, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, command: list[str], log: Any, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """In a session of its own, so that Ctrl-C is ours to handle, and without settings meant for other runs."""
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("CKPTD_", "TORCHELASTIC_"))}
        return subprocess.Popen(  # noqa: S603  our own interpreter and modules
            command, env=clean | environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def descendants(pid: int) -> list[int]:
    """Children of ``pid`` and theirs, as Linux tells."""
    found: list[int] = []
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that ended meanwhile has no children any more
            for child in map(int, listing.read_text().split()):
                found += [child, *descendants(child)]
    return found


def is_running(pid: int) -> bool:
    """False when it is gone, also when nobody has asked for its exit code yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _wait(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until:
            raise CkptdError(f"waited {timeout_s:g} s for {what}")
        time.sleep(_POLL_S)
