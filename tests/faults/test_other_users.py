"""Runs belong to the user that began them: another uid reads, writes and lists nothing of theirs."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
from pathlib import Path
from typing import Any

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


def ask_as_nobody(fd_socket: Path, *requests: dict[str, Any]) -> list[str]:
    """What the fd socket answers to a child of another uid that asks for each of ``requests``."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(fd_socket))
                token = _ask(connection, {"op": "session"})[0]["token"]
                for request in requests:
                    reply, fds = _ask(connection, {"token": token, **request})
                    os.write(write_end, f"{reply.get('error', {}).get('name')} {len(fds)}\n".encode())
        finally:
            os._exit(0)
    os.close(write_end)
    os.waitpid(child, 0)
    with os.fdopen(read_end) as answers:
        return answers.read().splitlines()


def _ask(connection: socket.socket, request: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
    body = json.dumps(request).encode()
    connection.sendall(struct.pack(">I", len(body)) + body)
    data, fds, _, _ = socket.recv_fds(connection, 65536, 1)
    return json.loads(data[4:]), list(fds)


def test_a_slot_is_handed_over_to_no_other_user(saved: DaemonProcess) -> None:
    wanted = {"op": "slot", "slot": saved.slot_files()[0].name}
    answers = ask_as_nobody(fd_socket(saved), {**wanted, "writable": False}, {**wanted, "writable": True})
    assert answers == ["NotPermitted 0", "NotPermitted 0"]


def test_the_last_operations_of_a_rank_are_written_by_no_other_user(saved: DaemonProcess) -> None:
    incarnation = saved.status()["runs"][0]["incarnation"]
    wanted = {"op": "black_box", "run": "tiny", "incarnation": incarnation, "rank": 0}
    assert ask_as_nobody(fd_socket(saved), wanted) == ["NotPermitted 0"]


@pytest.mark.parametrize(
    "wrong", [{"run": "none"}, {"incarnation": "?"}, {"incarnation": "9-9"}, {"rank": 7}, {"rank": "0"}, {"rank": None}]
)
def test_memory_for_a_rank_that_did_not_join_is_refused(saved: DaemonProcess, wrong: dict[str, Any]) -> None:
    about = {"run": "tiny", "incarnation": saved.status()["runs"][0]["incarnation"], "rank": 0}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(fd_socket(saved)))
        token = _ask(connection, {"op": "session"})[0]["token"]
        reply, fds = _ask(connection, {"op": "black_box", "token": token, **about, **wrong})
        assert "name" in reply["error"]
        assert fds == []
        assert _ask(connection, {"op": "session"})[0]["token"]


def fd_socket(daemon: DaemonProcess) -> Path:
    return daemon.socket.with_name("d.fd.sock")
