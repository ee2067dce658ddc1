"""Every fault that pages, made for real: the right alert reaches a receiver, nothing misleads, and it resolves.

One local stack (deploy/local) for all: three daemons, Prometheus with the rules of deploy/prometheus, Alertmanager.
Each test has a job of its own, of real ranks on gloo, one on each node. Deadlines are for giving up; bench/alerting.py
measures how soon an alert is there.
"""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from harness import Nursery
from stack import Alert, Job, LocalStack, Receiver

from ckptd.format.blocks import HEADER_BYTES
from ckptd.format.slot import SlotState, decode_header, read_state

MISSING = [name for name in ("prometheus", "prometheus-alertmanager") if shutil.which(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(480),
    pytest.mark.skipif(bool(MISSING), reason=f"apt install {' '.join(MISSING)}"),
]
FIRED_S, RESOLVED_S = 60.0, 120.0
WINDOW_S = 300.0  # of increase() over corrupt copies: so long the alert lasts when all is well again
Begin = Callable[..., Job]


class Rotten(NamedTuple):
    job: Job
    alert: Alert


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture(scope="module")
def stack(receiver: Receiver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    stack = LocalStack(tmp_path_factory.mktemp("stack"), receiver)
    yield stack
    stack.close()


@pytest.fixture
def begin(stack: LocalStack, nursery: Nursery) -> Iterator[Begin]:
    """Starts a job of a fresh run, and returns when it has settled; it is gone after the test."""
    jobs: list[Job] = []

    def begin(*options: object) -> Job:
        jobs.append(Job(stack, nursery, f"alerts-{secrets.token_hex(4)}", options))
        jobs[-1].start()
        jobs[-1].wait_settled()
        return jobs[-1]

    yield begin
    for job in jobs:
        job.close()


@pytest.fixture(scope="module")
def rotten(stack: LocalStack, receiver: Receiver, nursery: Nursery) -> Iterator[Rotten]:
    """A job of whose snapshot a bit flips on node 1. Its alert lasts for long: other tests go on beside it."""
    job = Job(stack, nursery, "rotten", ["--only-first"])
    try:
        job.start()
        job.wait_settled()
        since_s = time.monotonic()
        flip_a_bit(Path(stack.nodes[1]["arena"]), job.run)
        yield Rotten(job, receiver.wait_fired("CkptdCorruptionFound", FIRED_S, since_s, run=job.run))
    finally:
        job.close()


def test_a_bit_that_flips_in_memory_is_told_with_its_node(stack: LocalStack, rotten: Rotten) -> None:
    labels = rotten.alert.labels
    assert (labels["node"], labels["place"], labels["severity"]) == (stack.node_id(1), "memory", "warning")


def test_a_daemon_that_is_killed_is_told_and_is_over_when_it_is_back(
    stack: LocalStack, receiver: Receiver, begin: Begin
) -> None:
    job = begin()
    instance, node, since_s = stack.nodes[2]["http"], stack.node_id(2), time.monotonic()
    stack.kill_daemon(2)
    alert = receiver.wait_fired("CkptdDaemonDown", FIRED_S, since_s, run=job.run, instance=instance)
    assert (alert.labels["node"], alert.labels["severity"]) == (node, "critical")
    stack.up()
    receiver.wait_resolved(alert, RESOLVED_S)
    assert stack.node_id(2) == node
    job.wait_steps(5)
    assert receiver.criticals(since_s) == {"CkptdDaemonDown"}
    job.finish()


def test_a_rank_that_is_stopped_is_told_with_its_node_and_is_over_when_it_goes_on(
    stack: LocalStack, receiver: Receiver, begin: Begin
) -> None:
    job = begin()
    since_s = time.monotonic()
    job.ranks[1].stop()
    alert = receiver.wait_fired("CkptdHang", FIRED_S, since_s, run=job.run)
    assert (alert.labels["node"], alert.labels["severity"]) == (stack.node_id(1), "critical")
    job.ranks[1].cont()
    job.wait_steps(5)
    receiver.wait_resolved(alert, RESOLVED_S)
    assert receiver.criticals(since_s) == {"CkptdHang"}
    job.finish()


def test_a_rank_that_computes_slowly_is_told_with_its_node_and_is_over_when_it_is_as_quick_as_the_others(
    stack: LocalStack, receiver: Receiver, begin: Begin
) -> None:
    job = begin()
    since_s = time.monotonic()
    with job.slowed(2, 2.0):
        alert = receiver.wait_fired("CkptdStraggler", FIRED_S, since_s, run=job.run, severity="warning")
        assert alert.labels["node"] == stack.node_id(2)
    receiver.wait_resolved(alert, RESOLVED_S)
    assert receiver.criticals(since_s) == set()
    job.finish()


def test_a_rank_that_is_killed_is_told_with_its_node_and_is_over_when_the_run_starts_again(
    stack: LocalStack, receiver: Receiver, begin: Begin
) -> None:
    job = begin()
    since_s = time.monotonic()
    job.ranks[1].kill()
    alert = receiver.wait_fired("CkptdRankDead", FIRED_S, since_s, run=job.run)
    assert (alert.labels["node"], alert.labels["severity"]) == (stack.node_id(1), "critical")
    job.start()
    assert job.ranks[0].wait_event("ready")["restored"] > 0
    receiver.wait_resolved(alert, RESOLVED_S)
    assert receiver.criticals(since_s) == {"CkptdRankDead"}
    job.finish()


def test_drains_that_find_no_space_are_told_and_are_over_when_there_is_room(
    stack: LocalStack, receiver: Receiver, begin: Begin
) -> None:
    if not stack.mount.is_mounted:
        pytest.skip("may not mount in a namespace of its own: run as root")
    job = begin()
    job.wait_mark("durable")
    since_s = time.monotonic()
    with stack.full_tier():
        alert = receiver.wait_fired("CkptdDrainFailing", FIRED_S, since_s, run=job.run)
        assert alert.labels["severity"] == "warning"
    receiver.wait_resolved(alert, RESOLVED_S)
    assert receiver.criticals(since_s) == set()
    job.finish()


def test_what_was_found_corrupt_is_over_when_it_has_been_whole_for_long(receiver: Receiver, rotten: Rotten) -> None:
    receiver.wait_resolved(rotten.alert, WINDOW_S + RESOLVED_S)
    told = [alert for alert in receiver.alerts if alert.labels.get("run") == rotten.job.run]
    assert not [a.labels for a in told if a.name == "CkptdCorruptionFound" and a.labels["severity"] == "critical"]


def flip_a_bit(arena: Path, run: str) -> None:
    """In the middle of the first segment of a sealed slot."""
    for path in arena.glob(f"{run}.*.slot"):
        page = memoryview(path.read_bytes())
        if read_state(page) is SlotState.SEALED:
            _, offset, size_bytes = list(decode_header(page, path.name)[0].layout.parts())[-1]
            with path.open("r+b") as file:
                file.seek(HEADER_BYTES + offset + size_bytes // 2)
                byte = file.read(1)[0]
                file.seek(-1, 1)
                file.write(bytes([byte ^ 1]))
            return
    raise AssertionError(f"no sealed slot of {run} in {arena}")
