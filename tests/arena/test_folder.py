"""Whose the arena's folder is, and that one daemon at a time has it."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd.arena.arena import Arena
from ckptd.arena.folder import lock_folder
from ckptd.errors import ArenaLocked, InvalidRequest, NotPermitted

OTHER, DAEMON = 64124, 64123  # uids of nobody
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can make what belongs to others")


@pytest.fixture
def place() -> Iterator[Path]:
    """Open to everybody, as /dev/shm is; tmp_path lies in folders that are not."""
    path = Path(tempfile.mkdtemp(prefix="ckptd-folder-"))
    path.chmod(0o1777)
    yield path
    shutil.rmtree(path)


def test_a_new_folder_is_the_daemon_s_alone(tmp_path: Path) -> None:
    folder = tmp_path / "new/arena"
    fd = lock_folder(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o600
    with pytest.raises(ArenaLocked):
        lock_folder(folder)
    os.close(fd)
    os.close(lock_folder(folder))


@pytest.mark.parametrize("kind", ["file", "link to nothing"])
def test_what_is_no_folder_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "arena"
    path.touch() if kind == "file" else path.symlink_to(tmp_path / "nothing")
    with pytest.raises(InvalidRequest, match="is not a folder"):
        lock_folder(path)


def test_a_link_of_one_s_own_leads_to_the_arena(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "arena").symlink_to(tmp_path / "elsewhere")
    os.close(lock_folder(tmp_path / "arena"))
    assert (tmp_path / "elsewhere/lock").exists()


@needs_root
@pytest.mark.parametrize("kind", ["folder", "link", "target of a link", "lock"])
def test_what_another_user_made_is_refused(tmp_path: Path, kind: str) -> None:
    path, elsewhere = tmp_path / "arena", tmp_path / "elsewhere"
    if "link" in kind:
        elsewhere.mkdir()
        path.symlink_to(elsewhere)
    else:
        path.mkdir()
        (path / "lock").touch()
    theirs = {"folder": path, "link": path, "target of a link": elsewhere, "lock": path / "lock"}[kind]
    os.chown(theirs, OTHER, OTHER, follow_symlinks=False)
    with pytest.raises(NotPermitted, match=f"belongs to uid {OTHER}, and this daemon is uid {os.getuid()}") as refused:
        Arena(path, 1 << 20, 3).open()
    assert "choose another --arena" in refused.value.hint


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("as it was")
    (tmp_path / "arena").mkdir()
    (tmp_path / "arena/lock").symlink_to(precious)
    with pytest.raises(NotPermitted, match="is a symbolic link"):
        lock_folder(tmp_path / "arena")
    assert precious.read_text() == "as it was"


@needs_root
def test_a_folder_of_root_serves_another_user_but_not_what_root_locked(place: Path) -> None:
    """As a volume of Kubernetes is: of root, and open to the container's user."""

    def lock_as_daemon() -> str:
        code = (
            "import os, sys; os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))\n"
            "from pathlib import Path\n"
            "from ckptd.arena.folder import lock_folder\n"
            "from ckptd.errors import CkptdError\n"
            "try: print(lock_folder(Path(sys.argv[1])) > 0)\n"
            "except CkptdError as error: print(error)\n"
        )
        command = [sys.executable, "-c", "import ckptd.arena.folder\n" + code, str(place / "arena"), str(DAEMON)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    (place / "arena").mkdir()
    (place / "arena").chmod(0o777)
    assert lock_as_daemon() == "True\n"
    (place / "arena/lock").unlink()
    (place / "arena/lock").touch(0o600)
    assert "may not be opened by uid" in lock_as_daemon()
