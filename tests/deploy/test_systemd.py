"""The unit of systemd: what can be told of it without systemd, and the daemon at work within its limits."""

from __future__ import annotations

import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import tomllib
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from harness import TINY_TRAINER, Stage, free_port
from processes import CKPTD, clean_environment, run_cli, wait_until

from ckptd.arena.budget import RESERVE_BYTES
from ckptd.config import load_settings, parse_size

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy/systemd"
UNIT = FOLDER / "ckptd.service"
DROP_IN = FOLDER / "ckptd.service.d/node.conf"
CONFINED = Path(__file__).with_name("confined.py")
MOST_EXPOSED = 2.0
UID = "64123"  # of nobody


def settings_of(unit: Path) -> dict[str, list[str]]:
    """The values of each setting, in order."""
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        name, separator, value = line.partition("=")
        if separator and not line.startswith(("#", "[")):
            found.setdefault(name, []).append(value)
    return found


def one(name: str, unit: Path = UNIT) -> str:
    (value,) = settings_of(unit)[name]
    return value


def seconds(text: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(s|min)", text).groups()  # type: ignore[union-attr]
    return int(number) * (60 if unit == "min" else 1)


needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is missing: apt install systemd"
)


# --- what systemd says of it --------------------------------------------------------------------------------------
@needs_systemd
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    installed = tmp_path / "ckptd.service"
    installed.write_text(UNIT.read_text().replace("/opt/ckptd/bin/ckptd", str(CKPTD)))
    shutil.copytree(DROP_IN.parent, tmp_path / "ckptd.service.d")
    done = subprocess.run(["systemd-analyze", "verify", installed], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@needs_systemd
def test_the_unit_is_little_exposed() -> None:
    limit = str(int(MOST_EXPOSED * 10))
    command = ["systemd-analyze", "security", "--offline=true", f"--threshold={limit}", str(UNIT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    level = re.search(r"Overall exposure level for ckptd.service: ([\d.]+)", done.stdout)
    assert level is not None
    assert float(level[1]) <= MOST_EXPOSED


@needs_systemd
@pytest.mark.skipif(os.getuid() != 0, reason="only root can make folders of another user")
def test_the_user_is_a_system_user_and_owns_the_arena_before_anybody_else(tmp_path: Path) -> None:
    for kind in ("sysusers", "tmpfiles"):
        folder = tmp_path / f"usr/lib/{kind}.d"
        folder.mkdir(parents=True)
        shutil.copy(FOLDER / f"ckptd.{kind}", folder / "ckptd.conf")
    for folder in ("etc", "dev/shm"):
        (tmp_path / folder).mkdir(parents=True)
    subprocess.run(["systemd-sysusers", f"--root={tmp_path}"], check=True, capture_output=True)
    subprocess.run(["systemd-tmpfiles", f"--root={tmp_path}", "--create", "ckptd.conf"], check=True)
    name, _, uid, *_ = (tmp_path / "etc/passwd").read_text().splitlines()[0].split(":")
    assert name == one("User") == one("Group")
    assert int(uid) < 1000
    arena = tmp_path / flags()["--arena"].lstrip("/")
    assert (arena.stat().st_uid, stat.S_IMODE(arena.stat().st_mode)) == (int(uid), 0o700)


# --- what it says itself ------------------------------------------------------------------------------------------
def flags() -> dict[str, str]:
    command, verb, *rest = one("ExecStart").split()
    assert (Path(command).name, verb) == ("ckptd", "serve")
    return dict(zip(rest[::2], rest[1::2], strict=True))


def test_the_command_line_is_one_of_this_version() -> None:
    shown = run_cli("serve", "--help", COLUMNS="200").stdout
    assert [flag for flag in flags() if f"{flag} " not in shown] == []


def test_the_socket_lies_in_the_folder_that_systemd_makes() -> None:
    assert Path(flags()["--socket"]).parent == Path("/run") / one("RuntimeDirectory")
    assert one("RuntimeDirectoryMode") == "0750"
    assert one("RuntimeDirectoryPreserve") == "yes"


def test_nothing_of_the_unit_takes_the_slots_away() -> None:
    found = settings_of(UNIT)
    assert flags()["--arena"].startswith("/dev/shm/")
    assert found["RemoveIPC"] == ["no"]
    taking = ["DynamicUser", "PrivateDevices", "RootDirectory", "RootImage", "TemporaryFileSystem", "InaccessiblePaths"]
    assert [name for name in taking if name in found] == []


def test_uids_are_seen_as_they_are() -> None:
    assert "PrivateUsers" not in settings_of(UNIT)


def test_a_drain_is_not_cut_short() -> None:
    deadline_s = load_settings({}).drain_deadline_s
    assert seconds(one("TimeoutStopSec")) > deadline_s
    assert seconds(one("WatchdogSec")) >= 60


def test_a_daemon_comes_back_for_ever_whatever_ended_it() -> None:
    found = settings_of(UNIT)
    assert (found["Restart"], found["StartLimitIntervalSec"]) == (["on-failure"], ["0"])
    assert "RestartPreventExitStatus" not in found
    # That a port is taken for a moment exits as wrong settings do.
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="ckptd-test-") as folder:
            place = ["--socket", f"{folder}/d.sock", "--arena", f"{folder}/arena", "--memory", "1MiB"]
            done = run_cli("serve", *place, "--listen", address, "--insecure")
    assert done.rc not in (0, int(one("SuccessExitStatus"))), done
    assert "cannot listen" in done.stderr


def test_no_setting_is_given_twice() -> None:
    lists = {"SystemCallFilter", "DeviceAllow"}
    assert [name for name, values in settings_of(UNIT).items() if len(values) > 1 and name not in lists] == []


def test_the_example_settings_are_settings(tmp_path: Path) -> None:
    example = FOLDER / "ckptd.toml"
    for file in ("tls.crt", "tls.key", "ca.crt"):
        (tmp_path / file).touch()
    here = tmp_path / "ckptd.toml"
    here.write_text(example.read_text().replace("/etc/ckptd", str(tmp_path)))
    assert load_settings({"config": here}).listen


def test_storage_that_is_away_at_boot_delays_the_daemon_and_does_not_cancel_it() -> None:
    """A failed dependency ends a start job for good: Restart= is for what did start."""
    for unit in (UNIT, DROP_IN):
        assert not {"Requires", "RequiresMountsFor", "BindsTo", "Requisite"} & settings_of(unit).keys()


def test_the_example_drop_in_fits_the_example_settings() -> None:
    example: dict[str, Any] = tomllib.loads((FOLDER / "ckptd.toml").read_text())
    limit_bytes = parse_size(one("MemoryMax", DROP_IN).replace("G", "GiB"))
    assert limit_bytes >= parse_size(example["memory"]) + RESERVE_BYTES
    tiers = {tier.split(",")[0].removeprefix("file://") for tier in example["tiers"]}
    assert set(one("ReadWritePaths", DROP_IN).split()) == tiers
    mounts = {f"{tier.strip('/').replace('/', '-')}.mount" for tier in tiers}
    assert set(one("Wants", DROP_IN).split()) == set(one("After", DROP_IN).split()) == mounts
    checked = {line.removeprefix("+/usr/bin/mountpoint -q ") for line in settings_of(DROP_IN)["ExecStartPre"]}
    assert checked == tiers


# --- at work within its limits ------------------------------------------------------------------------------------
@pytest.fixture
def arena() -> Iterator[Path]:
    folder = Path(f"/dev/shm/ckptd-test-confined-{os.getpid()}")
    folder.mkdir(mode=0o700)
    os.chown(folder, int(UID), int(UID))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that another user may enter, which tmp_path is not."""
    path = Path(tempfile.mkdtemp(prefix="ckptd-confined-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def can_confine() -> str:
    """Why this machine cannot."""
    missing = [name for name in ("unshare", "setpriv", "systemd-analyze", "mount") if shutil.which(name) is None]
    if missing:
        return f"{missing[0]} is missing: apt install util-linux systemd"
    if os.getuid() != 0:
        return "only root can become another user"
    ready = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False)
    release = tuple(int(part) for part in re.findall(r"\d+", os.uname().release)[:2])
    return "mounts are not allowed here" if ready.returncode else "Linux 6.3 is needed" if release < (6, 3) else ""


def confined(*folders: Path) -> list[str]:
    """What runs the command that follows with no more than the unit leaves it."""
    return ["unshare", "-m", sys.executable, str(CONFINED), str(UNIT), UID, *map(str, folders), "--"]


READERS = """
from ckptd.health.kernel_log import KernelLogSource
from ckptd.health.system import CpuSource, MemorySource, PressureSource, TcpSource
from ckptd.health.tcp import PeerTcpSource
for kind in (KernelLogSource, CpuSource, MemorySource, PressureSource, TcpSource, PeerTcpSource):
    try:
        kind().read()
    except OSError as error:
        print(kind.name, type(error).__name__, error.errno)
"""


@pytest.mark.slow
def test_the_health_of_the_node_is_read_as_well_as_by_root() -> None:
    if why := can_confine():
        pytest.skip(why)
    command = [sys.executable, "-c", READERS]
    by_root = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    by_the_unit = subprocess.run([*confined(), *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (by_the_unit.stdout, by_the_unit.returncode) == (by_root.stdout, 0), by_the_unit.stderr


@pytest.mark.slow
def test_a_daemon_works_with_no_more_than_the_unit_leaves_it(stage: Stage, folder: Path, arena: Path) -> None:
    if why := can_confine():
        pytest.skip(why)
    run, tier = folder / "run", folder / "tier"
    for path in (run, tier):
        path.mkdir()
        os.chown(path, int(UID), int(UID))
    address = run / "notify"
    http = f"127.0.0.1:{free_port()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(address))
        systemd.settimeout(1)
        os.chown(address, int(UID), int(UID))
        command = [
            *confined(run, tier),
            str(CKPTD),
            "serve",
            "--socket",
            str(run / "d.sock"),
            "--arena",
            str(arena),
            "--http",
            http,
        ]
        command += ["--memory", "64MiB", "--tier", f"file://{tier},every=1"]
        log = folder / "log"
        with log.open("wb") as output:
            environment = clean_environment(NOTIFY_SOCKET=str(address), WATCHDOG_USEC="20000000")
            daemon = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        stage.on_close(lambda: daemon.poll() is None and (daemon.kill(), daemon.wait()))

        def came(message: bytes) -> bool:
            assert daemon.poll() is None, log.read_text()
            with suppress(TimeoutError):
                return message in systemd.recv(4096)
            return False

        wait_until(lambda: came(b"READY=1"), "READY=1")
        status = Path(f"/proc/{daemon.pid}/status").read_text()
        assert re.search(rf"Uid:\s+{UID}\s", status)
        assert re.search(r"Seccomp:\s+2", status)
        assert re.search(r"CapEff:\s+0*400000000\n", status)  # CAP_SYSLOG
        trainer = stage.script(
            TINY_TRAINER, "--steps", 3, "--wait", "durable", env={"CKPTD_DAEMON": f"unix://{run}/d.sock"}
        )
        assert trainer.finish()["durable"] == 3, log.read_text()
        assert run_cli("verify", "tiny", "--socket", run / "d.sock").rc == 0
        with urllib.request.urlopen(f"http://{http}/metrics", timeout=10) as page:
            assert b"ckptd_snapshot_step" in page.read()
        wait_until(lambda: came(b"WATCHDOG=1"), "a keep-alive")
    daemon.terminate()
    assert daemon.wait(30) == 0, log.read_text()
    assert "Operation not permitted" not in log.read_text()
