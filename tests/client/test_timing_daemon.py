"""What is reported arrives at a real daemon, also at one that was killed and started again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from harness import DaemonProcess, wait_until
from timed_alone import one_rank_group

from ckptd_client import watch
from ckptd_client.timing import collection as process
from ckptd_client.timing import heartbeat


@pytest.fixture(autouse=True)
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(heartbeat, "INTERVAL_S", 0.05)
    with one_rank_group():
        yield


def is_delivered() -> bool:
    """Rows leave the ring only when a daemon has taken them."""
    assert process._collection is not None
    recorder = process._collection.recorder
    return recorder.ring.written > 0 and recorder.ring.peek(1)[0] == b""


def test_a_daemon_takes_what_is_reported_before_and_after_its_death(daemon: DaemonProcess) -> None:
    with watch("watched", daemon.address) as watched:
        for step in range(3):
            dist.barrier()
            watched.step(step)
        wait_until(is_delivered, "the daemon to take the rows")
        daemon.kill()
        dist.barrier()
        watched.step(3)
        assert not is_delivered()
        daemon.restart()
        wait_until(is_delivered, "the new daemon to take the rows")
    assert process._collection is None
    assert daemon.status()["runs"][0]["run"] == "watched"
