"""Processes of the demo: started in sessions of their own, killed without mercy; a training job and its journal.

Layer: ``cli``. Invariants: only processes that were started here, and their children, are ever signalled, each by its
id; what was killed is gone when the call returns.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ckptd.errors import CkptdError

PATIENCE_S: Final = 30.0
_QUIET_S: Final = 90.0
_POLL_S: Final = 0.01


class TrainingFailed(CkptdError):
    """The training job of the demo ended by itself, or stopped getting on."""


@dataclass
class Job:
    """A training job: its first process (torchrun, or rank 0), the other ranks where no torchrun starts them, and the
    journal that they write."""

    process: subprocess.Popen[bytes]
    journal: Path
    output: Path
    others: Sequence[subprocess.Popen[bytes]] = ()

    @property
    def processes(self) -> list[subprocess.Popen[bytes]]:
        return [self.process, *self.others]

    def events(self) -> list[dict[str, Any]]:
        """Every line of the journal, those of earlier starts of the run first."""
        whole = self.journal.read_text().rpartition("\n")[0] if self.journal.exists() else ""
        return [json.loads(line) for line in whole.splitlines()]

    def kill(self) -> None:
        """SIGKILL every process of the job, at once."""
        kill_at_once(self.processes)

    def wait_for(self, is_there: Callable[[list[dict[str, Any]]], bool], what: str) -> list[dict[str, Any]]:
        """The journal once ``is_there``; TrainingFailed, with what the job said last, when it ends or stands still."""
        before, since = -1, time.monotonic()
        while not is_there(events := self.events()):
            codes = [process.poll() for process in self.processes]
            if (any(codes) or None not in codes) and not is_there(self.events()):
                code = next(filter(None, codes), 0)
                raise TrainingFailed(f"training ended ({code}) before {what}", self._last_words())
            if len(events) != before:
                before, since = len(events), time.monotonic()
            if time.monotonic() - since > _QUIET_S:
                raise TrainingFailed(f"training stood still for {_QUIET_S:g} s before {what}", self._last_words())
            time.sleep(_POLL_S)
        return events

    def finish(self) -> list[dict[str, Any]]:
        """The whole journal, once the run has come to its end and every process too; else TrainingFailed."""
        events = self.wait_for(lambda events: bool(events) and events[-1]["event"] == "end", "its end")
        for process in self.processes:
            process.wait()
        return events

    def _last_words(self) -> str:
        """What a rank raised, else the last lines, which are torchrun's summary of it."""
        lines = self.output.read_text(errors="replace").splitlines() if self.output.exists() else []
        raised = [line for line in lines if re.match(r"(\[rank\d+\]: )?[\w.]+(Error|Exception|Exit|Undecided)\b", line)]
        return "its last words: " + " | ".join(raised[-2:] or lines[-4:]) if lines else "it said nothing"


def start(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """In a session of its own, so that Ctrl-C is ours to handle, and without settings meant for other runs."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("CKPTD_", "TORCHELASTIC_"))}
    with log.open("ab") as lines:
        return subprocess.Popen(  # noqa: S603  our own interpreter and modules
            command,
            env={**clean, **environment},
            stdin=subprocess.DEVNULL,
            stdout=lines,
            stderr=lines,
            start_new_session=True,
        )


def kill_at_once(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """SIGKILL those that still run, with their descendants; they are gone when this returns."""
    running = [process for process in processes if process.poll() is None]
    killed = [pid for process in running for pid in (process.pid, *descendants(process.pid))]
    for pid in killed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for process in running:
        process.wait()
    wait_until(lambda: not any(map(is_running, killed)), "what was killed to be gone")


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


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> None:
    """CkptdError when it is not so in time."""
    until = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until:
            raise CkptdError(f"waited {timeout_s:g} s for {what}")
        time.sleep(_POLL_S)
