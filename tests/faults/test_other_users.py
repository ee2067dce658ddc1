"""Runs belong to the user that began them: another uid reads, writes and lists nothing of theirs."""

from __future__ import annotations

import os
import shutil

import pytest
from harness import DaemonProcess, Stage, run_cli

NOBODY = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")
pytestmark = pytest.mark.skipif(
    os.getuid() != 0 or shutil.which("setpriv") is None, reason="only root can become another user"
)


@pytest.fixture
def saved(stage: Stage, daemon: DaemonProcess) -> DaemonProcess:
    """A daemon with a run of root; its gRPC socket opened to all, so that only the daemon's own checks are left."""
    stage.trainer(daemon, "--steps", 2, "--wait", "staged").finish()
    daemon.socket.chmod(0o666)
    return daemon


def test_another_user_may_not_even_connect_by_default(stage: Stage, daemon: DaemonProcess) -> None:
    rc, stdout, stderr = run_cli("verify", "tiny", "--socket", daemon.socket, prefix=NOBODY)
    assert rc in (1, 6)
    assert "Traceback" not in stdout + stderr


@pytest.mark.parametrize("verb", [("verify", "tiny"), ("show", "tiny", 2), ("prune", "tiny"), ("ls", "tiny")])
def test_a_verb_of_another_user_is_refused_in_one_line(saved: DaemonProcess, verb: tuple[object, ...]) -> None:
    rc, stdout, stderr = run_cli(*verb, "--socket", saved.socket, prefix=NOBODY)
    assert rc == 1
    assert stdout == ""
    assert "belongs to uid:0, you are uid:65534" in stderr
    assert len(stderr.strip().splitlines()) <= 2


def test_the_runs_of_others_are_not_listed(saved: DaemonProcess) -> None:
    _, stdout, _ = run_cli("ls", "--socket", saved.socket, prefix=NOBODY)
    assert "tiny" not in stdout


def test_slots_cannot_be_opened_by_their_path(saved: DaemonProcess) -> None:
    for path in (saved.arena, *saved.slot_files()):
        assert path.stat().st_mode & 0o077 == 0


def test_a_slot_is_handed_over_to_no_other_user(saved: DaemonProcess) -> None:
    """Asked on the fd socket itself, as a client would, by a process of another uid."""
    import subprocess
    import sys

    slot = saved.slot_files()[0].name
    fd_socket = saved.socket.with_name("d.fd.sock")
    script = f"""
import json, socket, struct
s = socket.socket(socket.AF_UNIX); s.connect({str(fd_socket)!r})
def ask(request):
    body = json.dumps(request).encode(); s.sendall(struct.pack(">I", len(body)) + body)
    data, fds, _, _ = socket.recv_fds(s, 65536, 1)
    return json.loads(data[4:]), fds
token = ask({{"op": "session"}})[0]["token"]
for writable in (False, True):
    reply, fds = ask({{"op": "slot", "token": token, "slot": {slot!r}, "writable": writable}})
    print(reply["error"]["name"], len(fds))
"""
    python = os.path.realpath(sys.executable)
    done = subprocess.run([*NOBODY, shutil.which("python3") or python, "-c", script], capture_output=True, text=True)
    if "Permission denied" in done.stderr:
        pytest.skip("the other user has no Python to run here")
    assert done.stdout.split("\n")[:2] == ["NotPermitted 0", "NotPermitted 0"], done.stderr
