"""What the doctor finds: each check against facts that are given, and the verb as a whole."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest
from fake_daemon import Ckptd, FakeDaemon

from ckptd.arena.budget import MemoryFacts
from ckptd.cli.checks import machine, memory, tiers
from ckptd.cli.main import run
from ckptd_api.v1 import operator_pb2 as pb

GIB = 1 << 30
ARENA = Path("/dev/shm/ckptd-x")
TMPFS = memory.Mount("/dev/shm", "tmpfs", "rw,nosuid")
MOUNTS = """\
overlay / overlay rw,relatime 0 0
tmpfs /dev tmpfs rw 0 0
shm /dev/shm tmpfs rw,nosuid,size=65536k 0 0
tmpfs /mnt/a\\040b tmpfs ro 0 0
/dev/sda1 /dev/shm ext4 rw 0 0
"""


def facts(free: int = 16 * GIB, limit: int | None = None, used: int = 0, held: int = 0) -> MemoryFacts:
    return MemoryFacts(free, limit, used, held)


# --- memory -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("path", "point", "kind"),
    [
        ("/dev/shm/ckptd-x", "/dev/shm", "ext4"),  # mounted over the earlier one
        ("/dev/shmx", "/dev", "tmpfs"),
        ("/home", "/", "overlay"),
        ("/mnt/a b/c", "/mnt/a b", "tmpfs"),
    ],
)
def test_the_mount_of_a_path_is_the_deepest_and_last(path: str, point: str, kind: str) -> None:
    mount = memory.mount_of(Path(path), MOUNTS)
    assert (mount.point, mount.kind) == (point, kind)


@pytest.mark.parametrize(
    ("wanted", "found", "mount", "size", "status", "fix"),
    [
        (8 * GIB, facts(), TMPFS, 32 * GIB, "ok", ""),
        (8 * GIB, facts(free=4 * GIB), TMPFS, 32 * GIB, "fail", "--shm-size"),
        (8 * GIB, facts(free=4 * GIB, held=6 * GIB), TMPFS, 32 * GIB, "ok", ""),
        (32 << 20, facts(free=64 << 20), TMPFS, 64 << 20, "warn", "container's default"),
        (GIB, facts(), memory.Mount("/data", "ext4", "rw"), 32 * GIB, "warn", "memory file system"),
        (GIB, facts(), memory.Mount("/dev/shm", "tmpfs", "ro,nosuid"), 32 * GIB, "fail", "writing"),
    ],
)
def test_shared_memory_must_be_memory_and_have_room(
    wanted: int, found: MemoryFacts, mount: memory.Mount, size: int, status: str, fix: str
) -> None:
    check = memory.shared_memory(ARENA, wanted, found, mount, size)
    assert check.status == status, check
    assert fix in check.fix
    assert mount.options in check.found


@pytest.mark.parametrize(
    ("found", "status"),
    [
        (facts(), "ok"),
        (facts(limit=16 * GIB, used=GIB), "ok"),
        (facts(limit=8 * GIB), "fail"),  # the reserve does not fit
        (facts(limit=10 * GIB, used=8 * GIB, held=8 * GIB), "ok"),  # what is held need not grow
    ],
)
def test_the_cgroup_must_have_room_for_what_the_arena_grows(found: MemoryFacts, status: str) -> None:
    assert memory.cgroup_memory(8 * GIB, found).status == status


def test_memory_of_others_in_the_mount_is_not_taken_for_ours(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(bytes(1 << 16))
    assert memory.facts_of(tmp_path / "arena").held_bytes == 0
    assert memory.facts_of(tmp_path).held_bytes >= 1 << 16


def test_locked_memory_matters_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (8 << 20, 8 << 20))
    assert memory.locked_memory(GIB, has_gpu=False).status == "ok"
    assert memory.locked_memory(GIB, has_gpu=True).status == "warn"
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY,) * 2)
    assert memory.locked_memory(GIB, has_gpu=True).status == "ok"


# --- the machine --------------------------------------------------------------------------------------------------
def test_remove_ipc_endangers_login_users_only(tmp_path: Path) -> None:
    assert machine.remove_ipc(tmp_path, 1000).status == "ok"  # no systemd
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    assert machine.remove_ipc(tmp_path, 999).status == "ok"
    assert machine.remove_ipc(tmp_path, 1000).status == "fail"
    assert "default" in machine.remove_ipc(tmp_path, 1000).found


def test_remove_ipc_is_read_from_the_file_and_its_drop_ins_in_order(tmp_path: Path) -> None:
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    drop_ins = tmp_path / "etc/systemd/logind.conf.d"
    drop_ins.mkdir(parents=True)
    (tmp_path / "etc/systemd/logind.conf").write_text("[Login]\n#RemoveIPC=yes\nRemoveIPC=no\n")
    assert machine.remove_ipc(tmp_path, 1000).status == "ok"
    (drop_ins / "10-a.conf").write_text("[Login]\nRemoveIPC = yes\n")
    assert machine.remove_ipc(tmp_path, 1000).status == "fail"
    (drop_ins / "20-b.conf").write_text("[Login]\nRemoveIPC=no\n")
    assert machine.remove_ipc(tmp_path, 1000).status == "ok"


@pytest.mark.parametrize(("value", "status"), [(None, "ok"), ("0", "ok"), ("false", "ok"), ("1", "warn")])
def test_fork_support_of_grpc_is_a_warning(value: str | None, status: str) -> None:
    check = machine.fork_support({} if value is None else {"GRPC_ENABLE_FORK_SUPPORT": value})
    assert check.status == status
    assert bool(check.fix) is (status != "ok")


def test_a_socket_folder_that_anyone_may_write_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert machine.socket_folder(folder / "d.sock", 0).status == "ok"
    assert "serve makes it" in machine.socket_folder(folder / "d.sock", 0).found
    folder.mkdir(mode=0o755)
    assert machine.socket_folder(folder / "d.sock", 0).status == "ok"
    folder.chmod(0o777)
    assert machine.socket_folder(folder / "d.sock", 0).status == "fail"
    folder.chmod(0o1777)
    assert machine.socket_folder(folder / "d.sock", 0).status == "ok"


def test_few_open_files_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 4096))
    assert machine.open_files().status == "warn"


# --- tiers --------------------------------------------------------------------------------------------------------
def test_a_tier_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    check = tiers.tier(f"file://{tmp_path},every=100,keep=2", 1 << 20)
    assert check.status == "ok"
    assert "GB/s written and synced" in check.found
    assert list(tmp_path.iterdir()) == []


def test_a_tier_that_cannot_serve_says_why(tmp_path: Path) -> None:
    assert tiers.tier(f"file://{tmp_path}/not-there", 0).status == "warn"
    assert tiers.tier("ftp://x", 0).status == "fail"
    assert tiers.tier(f"file://{tmp_path},keep=0", 0).status == "fail"
    assert tiers.tier(f"file://{tmp_path}", 1 << 60).status == "warn"


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_tier_that_may_not_be_written_fails(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    assert tiers.tier(f"file://{tmp_path}", 0).status == "fail"


# --- the verb -----------------------------------------------------------------------------------------------------
def test_the_doctor_needs_no_daemon(ckptd: Ckptd, tmp_path: Path) -> None:
    result = ckptd(
        "doctor", "--socket", "/tmp/ckptd-none/d.sock", "--memory", "1MiB", "--tier", f"file://{tmp_path}", "--json"
    )
    checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert result.returncode == (0 if all(check["status"] == "ok" for check in checks.values()) else 3)
    assert checks["daemon"]["status"] == "ok"
    assert "none to ask" in checks["daemon"]["found"]
    assert checks[f"tier file://{tmp_path}"]["status"] == "ok"
    for check in checks.values():
        assert set(check) == {"name", "status", "found", "fix"}
        assert (check["status"] == "ok") is (check["fix"] == "")


def test_the_doctor_shows_the_fix_and_exits_3(ckptd: Ckptd) -> None:
    result = ckptd("doctor", "--memory", "900TiB", GRPC_ENABLE_FORK_SUPPORT="1")
    assert result.returncode == 3
    assert "\nshared memory: enlarge it" in result.stdout
    assert "\ngRPC and fork: unset it" in result.stdout


def test_the_doctor_adds_what_the_daemon_says(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    answer = pb.GetStatusResponse(version="9.9.9", pid=77, problems=["no new slots"])
    answer.tiers.add(url="file:///b", is_healthy=False, problem="read-only")
    daemon.operator.answers["GetStatus"] = answer
    for named in (str(daemon.socket), f"127.0.0.1:{daemon.port}"):
        assert run(["doctor", "--memory", "1MiB", "--json", "--socket", named]) == 3
        checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
        assert "9.9.9" in checks["version skew"]["found"]
        assert checks["version skew"]["status"] == "warn"
        assert checks["daemon problem"]["found"] == "no new slots"
        assert checks["daemon tier file:///b"]["found"] == "read-only"


def test_the_doctor_refuses_settings_that_serve_would_refuse(ckptd: Ckptd) -> None:
    assert ckptd("doctor", "--memory", "lots").returncode == 2
