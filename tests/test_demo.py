"""``ckptd demo`` with one node: the whole play, what it refuses, and that it leaves nothing behind."""

from __future__ import annotations

import ast
import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import CKPTD, clean_environment, heed_interrupts, wait_until

from ckptd.cli.demo import acts
from ckptd.cli.demo.acts import ACTS, kill_steps
from ckptd.cli.demo.processes import descendants, is_running
from ckptd.cli.main import run
from ckptd.config import default_arena

ROOT = Path(__file__).parents[1]


def leftovers(tmp: Path) -> list[Path]:
    return list(tmp.glob("ckptd-demo-*"))


@pytest.mark.slow
def test_the_demo_recovers_three_times_and_ends_with_the_bits_of_the_undisturbed_run(tmp_path: Path) -> None:
    done = subprocess.run(
        [CKPTD, "demo", "--json", "--seed", "3"],
        env=clean_environment(TMPDIR=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    shown = json.loads(done.stdout)
    assert shown["is_good"]
    assert shown["is_every_loss_equal"]
    assert shown["are_weights_equal"]
    assert [r["restored_from"] for r in shown["recoveries"]] == ["memory", "memory", "tier"]
    planned = kill_steps(shown["steps"], 3)
    for recovery, step in zip(shown["recoveries"], planned, strict=True):
        assert step <= recovery["killed_at_step"] <= step + 3
        assert 0 <= recovery["steps_lost"] <= 4
    assert not leftovers(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_no_process_and_no_file(tmp_path: Path, number: int) -> None:
    process = subprocess.Popen(
        [CKPTD, "demo"],
        env=clean_environment(TMPDIR=str(tmp_path)),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )
    wait_until(lambda: list(tmp_path.glob("ckptd-demo-*/*.journal")), "the first step", 60)
    arena = default_arena(leftovers(tmp_path)[0] / "d.sock")
    assert arena.exists()
    started = descendants(process.pid)
    assert len(started) >= 4  # daemon, torchrun, two ranks
    process.send_signal(number)
    assert process.wait(30) == 130
    assert not leftovers(tmp_path)
    assert not arena.exists()
    assert not [pid for pid in started if is_running(pid)]


def test_without_torch_the_demo_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    assert run(["demo", "--json"]) == 1
    shown = capsys.readouterr()
    assert "torch, which is not installed" in shown.err
    assert json.loads(shown.out)["error"]["hint"] == "pip install 'ckptd[client]'"


def test_the_demo_itself_never_imports_torch() -> None:
    code = "import sys, ckptd.cli.demo.cluster_acts, ckptd.cli.demo.verb; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_kills_come_in_every_third_of_the_run_and_differ_by_seed() -> None:
    plots = {tuple(kill_steps(36, seed)) for seed in range(50)}
    assert len(plots) > 25
    for plot in plots:
        assert [step // 12 for step in plot] == list(range(len(ACTS)))
    assert kill_steps(36, 7) == kill_steps(36, 7)


def test_a_recovery_from_the_wrong_place_or_none_is_no_recovery() -> None:
    restored = {"event": "restored", "rank": 0, "step": 4, "source": "file:///t", "seconds": 0.1}
    events = [{**restored, "rank": 1, "source": "memory"}, restored, {"event": "step", "step": 5}]
    assert not acts._recovery(ACTS[0], 5, events, 1.0).is_recovered
    assert acts._recovery(ACTS[2], 5, events, 1.0).is_recovered
    assert acts._recovery(ACTS[2], 5, events, 1.0).steps_lost == 1
    assert not acts._recovery(ACTS[0], 5, events[2:], 1.0).is_recovered


def test_the_example_is_short_and_uses_only_the_public_interface() -> None:
    path = ROOT / "examples" / "train_gpt.py"
    text = path.read_text()
    assert len(text.splitlines()) < 200
    imported = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom) and "ckptd" in (n.module or "")]
    assert [(n.module, [a.name for a in n.names]) for n in imported] == [("ckptd_client", ["Checkpointer"])]
    assert path.resolve() == (ROOT / "client/ckptd_client/examples/train_gpt.py").resolve()
