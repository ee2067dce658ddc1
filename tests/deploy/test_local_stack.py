"""deploy/local: a stack comes up whole, is mended by a second call, and goes without a trace."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from modules import module_at
from processes import clean_environment, wait_until

LOCAL = Path(__file__).parents[2] / "deploy" / "local"
MISSING = [name for name in ("prometheus", "prometheus-alertmanager") if shutil.which(name) is None]
START_S = 60.0


@pytest.fixture
def lifetimes() -> ModuleType:
    return module_at(LOCAL / "lifetimes.py")


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    state = tmp_path / "state"
    yield state
    call("down", state)


def call(script: str, state: Path, *options: str, path: str = os.environ["PATH"]) -> subprocess.CompletedProcess[str]:
    """Behind a proxy that does not answer, as on company networks."""
    return subprocess.run(
        [LOCAL / script, "--state", state, *options],
        env=clean_environment(PATH=path, http_proxy="http://127.0.0.1:9"),
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
    )


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def sleeper(lifetimes: ModuleType, folder: Path, script: str = "sleep 60") -> tuple[int, Path]:
    """A process that ``folder`` knows of, and that is ours to wait for."""
    pid_file = folder / "sleeper.pid"
    command = ["sh", "-c", f"{script} & echo up; wait; sleep 60"]
    pid = lifetimes.start(command, os.environ, folder / "log", pid_file)
    wait_until(lambda: (folder / "log").read_text() == "up\n", "the process to be up")
    return pid, pid_file


# --- processes ----------------------------------------------------------------------------------------------------
def test_a_process_is_known_by_its_file_until_it_has_ended(lifetimes: ModuleType, tmp_path: Path) -> None:
    pid, pid_file = sleeper(lifetimes, tmp_path)
    assert lifetimes.living(pid_file) == pid
    assert lifetimes.end([pid_file], 10.0) == [pid_file]
    assert lifetimes.living(pid_file) is None
    assert lifetimes.end([pid_file], 10.0) == []
    os.waitpid(pid, 0)
    os.killpg(pid, signal.SIGKILL)  # the sleep that it had started


def test_a_process_that_ignores_sigterm_is_killed(lifetimes: ModuleType, tmp_path: Path) -> None:
    pid, pid_file = sleeper(lifetimes, tmp_path, "trap '' TERM; sleep 60")
    lifetimes.end([pid_file], 0.1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    os.killpg(pid, signal.SIGKILL)


def test_a_process_that_took_over_a_number_is_left_alone(lifetimes: ModuleType, tmp_path: Path) -> None:
    pid, pid_file = sleeper(lifetimes, tmp_path)
    number, started, boot = pid_file.read_text().split()
    pid_file.write_text(f"{number} {int(started) - 1} {boot}\n")
    assert lifetimes.living(pid_file) is None
    assert lifetimes.end([pid_file], 0.0) == []
    assert is_running(pid)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@pytest.mark.parametrize("text", ["", "\n", "what?\n", "1 2\n", "-1 0 boot\n", "9" * 30])
def test_a_damaged_file_is_of_no_process(lifetimes: ModuleType, tmp_path: Path, text: str) -> None:
    pid_file = tmp_path / "damaged.pid"
    pid_file.write_text(text)
    assert lifetimes.living(pid_file) is None
    assert lifetimes.end([pid_file], 0.0) == []


# --- the stack ----------------------------------------------------------------------------------------------------
def test_a_program_that_is_missing_is_named_with_the_package_that_has_it(state: Path, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "dirname").symlink_to(shutil.which("dirname") or "")
    (programs / "python3").symlink_to(sys.executable)
    done = call("up", state, "--free-ports", path=str(programs))
    assert done.returncode == 1
    assert "apt install prometheus prometheus-alertmanager" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("script", ["up", "down"])
def test_a_folder_that_cannot_be_used_is_a_message(script: str, tmp_path: Path) -> None:
    blocked = tmp_path / "state"
    (blocked / "lock").mkdir(parents=True)
    done = call(script, blocked)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"deploy/local/{script}: ")
    assert str(blocked / "lock") in done.stderr


def test_a_file_in_the_place_of_the_folder_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "state").touch()
    done = call("up", tmp_path / "state")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)


def test_a_python_without_what_it_needs_is_a_message(state: Path) -> None:
    words = [sys.executable, "-S", LOCAL / "up.py", "--state", state]
    done = subprocess.run(words, env=clean_environment(), capture_output=True, text=True, timeout=START_S, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "No module named 'yaml': `make demo`" in done.stderr


def test_a_search_path_for_folders_leads_nowhere_else(state: Path) -> None:
    root = LOCAL.parents[1]
    done = subprocess.run(
        ["deploy/local/down", "--state", state],
        cwd=root,
        env=clean_environment(CDPATH=str(root)),
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, f"no stack in {state}\n")


def test_addresses_that_are_damaged_under_a_living_stack_are_a_message(
    lifetimes: ModuleType, state: Path, tmp_path: Path
) -> None:
    state.mkdir()
    pid, _ = sleeper(lifetimes, tmp_path)
    shutil.copy(tmp_path / "sleeper.pid", state / "node-1.pid")
    (state / "stack.json").write_text('{"prometheus": ')
    done = call("up", state)
    assert (done.returncode, done.stdout) == (1, "")
    assert "stack.json" in done.stderr
    assert "`deploy/local/down` first" in done.stderr
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_down_without_a_stack_says_so(state: Path) -> None:
    done = call("down", state)
    assert (done.returncode, done.stdout) == (0, f"no stack in {state}\n")


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"apt install {' '.join(MISSING)}")
def test_a_second_up_starts_only_what_does_not_run_and_down_leaves_nothing(state: Path) -> None:
    first = call("up", state, "--free-ports", "--json")
    assert first.returncode == 0, first.stderr
    about = json.loads(first.stdout)
    pids = pids_of(state)
    assert all(map(is_running, pids.values()))
    os.kill(pids["prometheus"], signal.SIGKILL)
    wait_until(lambda: not is_running(pids["prometheus"]), "Prometheus to be gone")
    second = call("up", state, "--free-ports", "--json")
    assert json.loads(second.stdout) == about
    changed = {name for name, pid in pids_of(state).items() if pid != pids[name]}
    assert changed == {"prometheus"}
    (state / "mine").write_text("not the stack's")
    last = pids_of(state)
    assert call("down", state).returncode == 0
    assert not any(map(is_running, last.values()))
    assert not any(Path(node["arena"]).exists() for node in about["nodes"])
    assert [path.name for path in state.iterdir()] == ["mine"]


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"apt install {' '.join(MISSING)}")
def test_a_daemon_that_cannot_start_is_named_with_its_last_words(tmp_path: Path) -> None:
    state = tmp_path / ("far" * 30)  # longer than the address of a socket may be
    done = call("up", state, "--free-ports")
    assert (done.returncode, done.stdout) == (1, "")
    assert "node-0 has ended" in done.stderr
    assert "choose a shorter folder" in done.stderr
    assert call("down", state).returncode == 0
    assert not state.exists()


def pids_of(state: Path) -> dict[str, int]:
    return {path.stem: int(path.read_text().split()[0]) for path in state.glob("*.pid")}
