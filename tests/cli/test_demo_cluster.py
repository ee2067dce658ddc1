"""``ckptd demo --nodes N --kill M``: the whole play, what it refuses, and that it leaves nothing behind."""

from __future__ import annotations

import json
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from processes import CKPTD, clean_environment, wait_until

from ckptd.cli.demo import cluster_acts
from ckptd.cli.demo.cluster_acts import ClusterOutcome, Fate, plot
from ckptd.cli.demo.journal import Comparison
from ckptd.cli.demo.processes import descendants, is_running
from ckptd.cli.main import run
from ckptd.config import default_arena

ADDRESS = "127.0.0.1:7101"
MOVED = (ADDRESS, "127.0.0.1:7102")
STEPS = 24


@pytest.mark.slow
@pytest.mark.timeout(420)
@pytest.mark.parametrize(
    ("nodes", "lost"), [(3, (0,)), (6, (0, 5)), (6, (1, 4))], ids=["rank 0 of 3", "rank 0 and another of 6", "two of 6"]
)
def test_lost_nodes_are_reconstructed_and_the_run_ends_with_the_bits_of_the_undisturbed_one(
    tmp_path: Path, nodes: int, lost: tuple[int, ...]
) -> None:
    seed = next(seed for seed in range(1000) if plot(nodes, len(lost), STEPS, seed).lost == lost)
    done = subprocess.run(
        [CKPTD, "demo", "--nodes", str(nodes), "--kill", str(len(lost)), "--seed", str(seed), "--json"],
        env=clean_environment(TMPDIR=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    shown = json.loads(done.stdout)
    assert shown["is_good"]
    assert shown["is_every_loss_equal"]
    assert shown["are_weights_equal"]
    fates = shown["fates"]
    is_lost = [node in lost for node in range(nodes)]
    assert [fate["is_lost"] for fate in fates] == is_lost
    assert [fate["restored_from"] for fate in fates] == ["reconstruction" if gone else "memory" for gone in is_lost]
    assert [fate["address"] != fate["address_before"] for fate in fates] == is_lost
    (restored,) = {fate["restored_step"] for fate in fates}
    assert shown["protected_step"] <= restored <= shown["killed_at_step"]
    assert restored < shown["protected_again"] <= shown["steps"] == STEPS
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_interrupted_demo_of_several_nodes_leaves_no_process_and_no_file(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [CKPTD, "demo", "--nodes", "2"], env=clean_environment(TMPDIR=str(tmp_path)), stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: list(tmp_path.glob("ckptd-demo-*/*.journal")), "the first step", 90)
    sockets = [path for path in tmp_path.glob("ckptd-demo-*/*.sock") if not path.name.endswith(".fd.sock")]
    arenas = [default_arena(path) for path in sockets]
    assert len(arenas) == 2
    assert all(arena.exists() for arena in arenas)
    started = descendants(process.pid)
    assert len(started) >= 4  # a daemon and a rank each
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 130
    assert not list(tmp_path.iterdir())
    assert not [arena for arena in arenas if arena.exists()]
    assert not [pid for pid in started if is_running(pid)]


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        (["--nodes", "3", "--kill", "3"], "any m may be lost, and --kill is m: at most 2 here"),
        (["--nodes", "2", "--kill", "7"], "at most 1 here"),
        (["--nodes", "1", "--kill", "2"], "with --nodes 4 any 2 may be lost"),
        (["--kill", "2"], "with --nodes 4 any 2 may be lost"),
    ],
)
def test_more_losses_than_parity_are_refused_in_one_line_and_a_hint(
    flags: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["demo", *flags]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert [line.partition(":")[0] for line in shown.err.splitlines()] == ["ckptd", "hint"]
    assert hint in shown.err
    assert run(["demo", *flags, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["name"] == "InvalidRequest"


def test_any_nodes_may_be_lost_in_the_second_quarter_of_the_run() -> None:
    plots = [plot(6, 2, STEPS, seed) for seed in range(200)]
    assert len({story.lost for story in plots}) == 15  # every pair of six
    assert {story.step for story in plots} == set(range(6, 13))
    assert plot(6, 2, STEPS, 7) == plots[7]


@pytest.mark.parametrize(
    ("is_lost", "addresses", "restored", "is_recovered"),
    [
        (False, (ADDRESS, ADDRESS), {"step": 8, "source": "memory"}, True),
        (False, (ADDRESS, ADDRESS), {"step": 8, "source": "reconstruction"}, False),
        (True, MOVED, {"step": 8, "source": "reconstruction"}, True),
        (True, MOVED, {"step": 9, "source": "peer"}, True),
        (True, MOVED, {"step": 8, "source": "memory"}, False),
        (True, MOVED, {"step": 7, "source": "reconstruction"}, False),
        (True, (ADDRESS, ADDRESS), {"step": 8, "source": "reconstruction"}, False),
        (True, MOVED, None, False),
    ],
)
def test_a_rank_has_recovered_from_the_right_place_at_what_was_protected_or_not_at_all(
    is_lost: bool, addresses: tuple[str, str], restored: dict[str, Any] | None, is_recovered: bool
) -> None:
    events = [{"event": "restored", "rank": 0, "step": 3, "source": "memory", "seconds": 0.1}]
    events += [{"event": "restored", "rank": 1, "seconds": 0.1, **restored}] if restored else []
    fate = cluster_acts._fate(1, is_lost, 8, events, addresses)
    assert fate.is_recovered is is_recovered
    assert fate.restored_step == (restored and restored["step"])


def test_an_outcome_is_good_only_when_every_rank_came_back_at_one_step_and_every_bit_is_equal() -> None:
    fate = Fate(0, False, ADDRESS, ADDRESS, 8, "memory", 0.1, is_recovered=True)
    same = Comparison(2.5, is_every_loss_equal=True, are_weights_equal=True)
    outcome = ClusterOutcome((fate, replace(fate, node=1)), 9, 8, 3.0, 24, same)
    assert outcome.is_good
    assert not replace(outcome, fates=(fate, replace(fate, restored_step=9))).is_good
    assert not replace(outcome, fates=(fate, replace(fate, is_recovered=False))).is_good
    assert not replace(outcome, comparison=replace(same, are_weights_equal=False)).is_good
    assert not replace(outcome, comparison=replace(same, is_every_loss_equal=False)).is_good
