"""Two ranks under torchrun, killed with SIGKILL and started again: every step has the bits it would have had."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import DaemonProcess, Stage
from processes import clean_environment

from ckptd.cli.demo.processes import Job

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("rank_program.py")
STEPS = 14


class Jobs:
    """Starts torchrun; ends what still runs."""

    def __init__(self, daemon: DaemonProcess, folder: Path) -> None:
        self._daemon = daemon
        self._folder = folder
        self._started: list[Job] = []

    def start(self, mode: str, run: str, ranks: int = 2) -> Job:
        journal, output = self._folder / f"{run}.journal", self._folder / f"{run}.output"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += [str(SCRIPT), mode, run, str(STEPS), str(journal)]
        env = clean_environment(CKPTD_DAEMON=self._daemon.address, OMP_NUM_THREADS="1")
        with output.open("ab") as log:
            process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        self._started.append(Job(process, journal, output))
        return self._started[-1]

    def close(self) -> None:
        for job in self._started:
            if job.process.poll() is None:
                job.kill()


@pytest.fixture
def durable_daemon(stage: Stage) -> DaemonProcess:
    return stage.tier_daemon()


@pytest.fixture
def jobs(durable_daemon: DaemonProcess, tmp_path: Path) -> Iterator[Jobs]:
    jobs = Jobs(durable_daemon, tmp_path)
    yield jobs
    jobs.close()


def hashes(events: list[dict[str, Any]]) -> dict[int, set[str]]:
    """Every hash seen at each step."""
    seen: dict[int, set[str]] = {}
    for event in events:
        if event["event"] == "step":
            seen.setdefault(event["step"], set()).add(event["hash"])
    return seen


def finish(job: Job) -> list[dict[str, Any]]:
    events = job.wait_for(lambda events: bool(events) and events[-1]["event"] == "end", "its end")
    assert job.process.wait(30) == 0, job.output.read_text()
    return events


def wait_step(job: Job, step: int) -> int:
    events = job.wait_for(lambda events: any(e.get("step", 0) >= step for e in events), f"step {step}")
    return len(events)


@pytest.mark.parametrize("mode", ["ddp", "fsdp", "fsdp-fused"])
def test_a_killed_job_goes_on_with_the_bits_of_one_that_was_not(
    mode: str, jobs: Jobs, durable_daemon: DaemonProcess
) -> None:
    expected = hashes(finish(jobs.start(mode, "calm")))
    job = jobs.start(mode, "killed")
    wait_step(job, 5)
    job.kill()
    job = jobs.start(mode, "killed")
    wait_step(job, 9)
    job.kill()
    durable_daemon.restart()
    events = finish(jobs.start(mode, "killed"))
    starts = [e for e in events if e["event"] == "ready"]
    assert len(starts) == 3
    assert starts[0]["restored"] is None
    for start, least in zip(starts[1:], (3, 7), strict=True):
        assert start["restored"] >= least
        assert start["source"] == "memory"
    assert hashes(events) == expected
    assert all(len(found) == 1 for found in expected.values())
