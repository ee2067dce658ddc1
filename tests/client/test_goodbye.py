"""How a rank takes its leave: by ``close()`` or at the end of its program, once, with what ended it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_job import SOON_S, FakeDaemon, Job
from timed_alone import one_rank_group

from ckptd.errors import DaemonUnreachable
from ckptd_client import link as link_module
from ckptd_client import watch
from ckptd_client.timing import watching

PROGRAM = Path(__file__).with_name("goodbye_program.py")
NORMAL = f"Leave  {link_module.EXIT_S}"


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("normal", [NORMAL]),
        ("error", [f"Leave ValueError: too large {link_module.EXIT_S}"]),
        pytest.param(
            "hooked",
            ["hook too large", f"Leave ValueError: too large {link_module.EXIT_S}"],
            marks=pytest.mark.slow,
        ),
        pytest.param("prompt", [NORMAL], marks=pytest.mark.slow),  # an error at a prompt ends nothing
        ("interrupt", [NORMAL]),
        ("closed", ["Leave  5.0"]),
        pytest.param("forked", ["forked", NORMAL], marks=pytest.mark.slow),
        pytest.param("spawned", ["joined"], marks=pytest.mark.slow),
    ],
)
def test_a_program_that_ends_says_goodbye_once(how: str, said: list[str]) -> None:
    env = {**os.environ, "PYTHONPATH": str(PROGRAM.parents[1])}
    done = subprocess.run([sys.executable, PROGRAM, how], capture_output=True, text=True, timeout=60, env=env)
    assert done.stdout.splitlines() == said, done.stderr


def leaves(daemon: FakeDaemon) -> list[Any]:
    return [request for method, request in daemon.calls if method == "Leave"]


def joined(daemon: FakeDaemon) -> Job:
    job = Job([daemon])
    job.start()
    job.wait_joined()
    return job


def test_a_daemon_that_did_not_answer_before_hears_the_goodbye_if_it_can() -> None:
    daemon = FakeDaemon("a")
    job = joined(daemon)
    job.links[0].suspect(DaemonUnreachable("slow"))
    job.close()
    job.close()
    assert len(leaves(daemon)) == 1


def test_a_rank_that_never_joined_has_no_goodbye_to_say() -> None:
    daemon = FakeDaemon("a", is_up=False)
    job = Job([daemon])
    job.start()
    job.close()
    assert leaves(daemon) == []


def test_nobody_joins_after_the_goodbye() -> None:
    daemon = FakeDaemon("a")
    job = joined(daemon)
    job.close()
    with pytest.raises(DaemonUnreachable, match="goodbye"):
        job.links[0]._call_join()
    assert len(daemon.joins) == 1


def test_hooks_of_links_that_are_closed_are_taken_away_in_any_order() -> None:
    before = sys.excepthook
    first, second = joined(FakeDaemon("a")), joined(FakeDaemon("b"))
    second.close()
    first.close()
    assert sys.excepthook is before


@pytest.mark.parametrize(("error", "told"), [(ValueError("bad"), "ValueError: bad"), (SystemExit(1), "")])
def test_a_watch_that_an_exception_ends_tells_it(
    error: BaseException, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = FakeDaemon("a")
    monkeypatch.setattr(watching, "Daemon", lambda address: daemon)
    with one_rank_group():
        watched = watch("run")
        assert watched._link is not None
        assert watched._link.wait_joined(SOON_S) is None
        with pytest.raises(type(error)), watched:
            raise error
    assert [request.error for request in leaves(daemon)] == [told]
