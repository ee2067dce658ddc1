"""The edges of the command: help, usage errors, daemons that are not there, sessions, and what serve is given."""

from __future__ import annotations

import json
import os
import signal
import socket as sockets
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import pytest
from fake_daemon import CKPTD, Ckptd, FakeDaemon, row
from processes import heed_interrupts, wait_until

import ckptd as package
from ckptd.cli import channel
from ckptd.cli.main import run
from ckptd.config import Settings
from ckptd.errors import DaemonUnreachable
from ckptd_api.v1 import operator_pb2 as pb

VERBS = ("serve", "status", "ls", "show", "verify", "prune", "doctor")


def test_help_names_every_verb_and_the_exit_codes(ckptd: Ckptd) -> None:
    result = ckptd("--help")
    assert result.returncode == 0
    for verb in VERBS:
        assert f"\n  {verb} " in result.stdout
    assert "6 daemon unreachable" in " ".join(result.stdout.split())
    assert ckptd("--version").stdout == f"ckptd {package.__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_takes_socket_and_json(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert "--socket P" in text
    assert "--json" in text


def test_help_and_ls_import_neither_the_daemon_nor_zarr() -> None:
    code = (
        "import sys; from ckptd.cli.main import run; run(['--help']); run(['ls', '--socket', '/nope/d.sock']);"
        "sys.exit(any(m in sys.modules for m in ('zarr', 'ckptd.serve', 'ckptd.tiers', 'torch', 'rich.table')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(
    "arguments", [["ls", "--nope"], ["nope"], ["show", "gpt"], ["show", "gpt", "x"], ["serve", "--slots", "x"]]
)
def test_a_usage_error_exits_2_with_one_line_and_a_hint(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert [line.partition(":")[0] for line in shown.err.splitlines()] == ["ckptd", "hint"]
    assert run([*arguments, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == 2


def test_without_a_verb_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    assert "Usage: ckptd" in capsys.readouterr().err


# --- daemons that do not answer -----------------------------------------------------------------------------------
@pytest.mark.parametrize("verb", [["status"], ["ls"], ["show", "gpt", "1"], ["verify", "gpt"], ["prune", "gpt"]])
def test_no_daemon_exits_6_and_names_the_socket(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*verb, "--socket", "/nope/d.sock", "--json"]) == 6
    shown = capsys.readouterr()
    assert "/nope/d.sock" in shown.err
    assert "ckptd serve" in shown.err
    assert json.loads(shown.out)["error"]["name"] == "DaemonUnreachable"


def test_a_socket_that_nobody_listens_on_exits_6() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in ("d.sock", "d.fd.sock"):
            sockets.socket(sockets.AF_UNIX).bind(f"{folder}/{name}")
        assert run(["status", "--socket", f"{folder}/d.sock"]) == 6


def test_a_port_that_nobody_listens_on_exits_6(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["status", "--socket", "127.0.0.1:1"]) == 6
    assert "127.0.0.1:1" in capsys.readouterr().err


def test_a_daemon_that_hangs_is_given_up_at_the_deadline(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    daemon.operator.answers["GetStatus"] = lambda request: (released.wait(5), pb.GetStatusResponse())[1]
    daemon.operator.answers["Verify"] = lambda request: iter(lambda: released.wait(5), True)
    with channel.connect(str(daemon.socket)) as session:
        with pytest.raises(DaemonUnreachable, match=r"did not answer in time"):
            session.unary(session.stub.GetStatus, pb.GetStatusRequest(), 0.2)
        with pytest.raises(DaemonUnreachable, match=r"said nothing for 0.2 s"):
            list(session.stream(session.stub.Verify, pb.VerifyRequest(), 0.2))
    released.set()


def test_an_older_daemon_that_lacks_a_call_is_said_so(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["ls", "--socket", str(daemon.socket)]) == 1
    assert "does not know this call" in capsys.readouterr().err


# --- sessions -----------------------------------------------------------------------------------------------------
def test_an_error_of_the_fd_socket_is_raised_again(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.frame = {"error": {"name": "NotPermitted", "message": "uid 7 may not", "hint": "ask"}}
    assert run(["status", "--socket", str(daemon.socket)]) == 1
    assert capsys.readouterr().err == "ckptd: error: uid 7 may not\nhint: ask\n"


def test_a_daemon_on_tcp_opens_a_session_by_call(daemon: FakeDaemon, ckptd: Ckptd) -> None:
    daemon.operator.answers["ListCheckpoints"] = pb.ListCheckpointsResponse(rows=[row()])
    assert ckptd("ls", CKPTD_DAEMON=f"127.0.0.1:{daemon.port}").returncode == 0
    assert ckptd("ls", "--socket", f"127.0.0.1:{daemon.port}", CKPTD_DAEMON="unix:///nope").returncode == 0


@pytest.mark.parametrize(
    ("named", "path"),
    [
        ("unix:///a/d.sock", "/a/d.sock"),
        ("unix:/a/d.sock", "/a/d.sock"),
        ("/a/d.sock", "/a/d.sock"),
        ("d.sock", f"{Path.cwd()}/d.sock"),
        ("node3:7070", None),
        ("[::1]:7070", None),
    ],
)
def test_a_daemon_is_named_by_path_url_or_host_and_port(named: str, path: str | None) -> None:
    assert channel.unix_path(named) == (Path(path) if path else None)


# --- interrupted --------------------------------------------------------------------------------------------------
def test_ctrl_c_exits_130_without_a_traceback(daemon: FakeDaemon) -> None:
    released = threading.Event()
    daemon.operator.answers["Verify"] = lambda request: iter(lambda: released.wait(60), True)
    process = subprocess.Popen(
        [CKPTD, "verify", "gpt", "--socket", daemon.socket],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )
    wait_until(lambda: daemon.operator.requests, "the call")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    released.set()
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_an_interrupt_that_falls_into_a_destructor_is_not_lost() -> None:
    code = """
import signal, time
from ckptd.cli import main
class Gone:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
def run(arguments):
    Gone()
    try:
        time.sleep(20)
    except KeyboardInterrupt:
        return main.EXIT_INTERRUPTED
    return 0
main.run = run
raise SystemExit(main.main())
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=30, preexec_fn=heed_interrupts)
    assert done.returncode == 130


def test_a_reader_that_leaves_causes_no_noise(daemon: FakeDaemon) -> None:
    daemon.operator.answers["ListCheckpoints"] = pb.ListCheckpointsResponse(rows=[row(step) for step in range(5000)])
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.run(
        [CKPTD, "ls", "gpt", "--socket", daemon.socket], stdout=writing, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writing)
    assert process.stderr == ""


# --- serve --------------------------------------------------------------------------------------------------------
def test_serve_hands_its_flags_to_the_daemon_as_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    served: list[Settings] = []
    server: Any = ModuleType("ckptd.serve.server")
    server.serve = lambda settings: served.append(settings) or 0
    monkeypatch.setitem(sys.modules, "ckptd.serve.server", server)
    monkeypatch.setenv("CKPTD_INSECURE", "1")
    flags = "--memory 1GiB --tier file:///a,keep=2 --tier file:///b --slots 4 --listen 127.0.0.1:0 --domain rack=r1"
    more = f"--socket {tmp_path}/d.sock --arena {tmp_path} --drain-deadline 5 --stage-deadline 7 --protect-max 6+2"
    assert run(["serve", *flags.split(), *more.split(), "--log-level", "debug"]) == 0
    (settings,) = served
    assert settings.memory_bytes == 1 << 30
    assert settings.tiers == ("file:///a,keep=2", "file:///b")
    assert (settings.slots, settings.listen, settings.insecure) == (4, "127.0.0.1:0", True)
    assert (settings.drain_deadline_s, settings.stage_deadline_s) == (5, 7)
    assert (settings.domains, settings.protect_max, settings.log_level) == (("rack=r1",), "6+2", "debug")


def test_serve_refuses_before_anything_is_started(ckptd: Ckptd) -> None:
    result = ckptd("serve", "--listen", "0.0.0.0:7070")
    assert result.returncode == 2
    assert [line.partition(":")[0] for line in result.stderr.splitlines()] == ["ckptd", "hint"]
    assert "--tls-cert" in result.stderr


def test_an_unknown_error_of_the_transport_is_one_line(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(request: Any) -> None:
        raise RuntimeError("boom")

    daemon.operator.answers["GetStatus"] = fail
    assert run(["status", "--socket", str(daemon.socket)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ckptd: error: call to {daemon.socket} failed: {grpc.StatusCode.UNKNOWN.name}: ")
