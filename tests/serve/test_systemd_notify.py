"""What systemd would be told by a real daemon, on a real datagram socket: ready, alive, stuck, ending."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from harness import Stage, wait_until
from processes import PATIENCE_S

from ckptd.cli.channel import connect
from ckptd.serve.server import _STREAMS
from ckptd.serve.systemd import Pulse, Systemd, call_check
from ckptd_api.v1 import node_pb2_grpc

WATCHDOG_S = 2.0
WEDGED = "upkeep.tick=sleep:600@2"
Message = dict[str, str]


class Receiver:
    """What systemd listens at; ``messages`` keeps what came."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.messages: list[Message] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)

    def next(self, timeout_s: float = PATIENCE_S) -> Message | None:
        """The next message, or None when there is none for so long."""
        self._socket.settimeout(timeout_s)
        try:
            text = self._socket.recv(4096).decode()
        except TimeoutError:
            return None
        self.messages.append(dict(line.split("=", 1) for line in text.split("\n")))
        return self.messages[-1]

    def until(self, is_it: Callable[[Message], bool], what: str) -> Message:
        deadline_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline_s:
            if (message := self.next()) is not None and is_it(message):
                return message
        raise AssertionError(f"waited for {what}; came: {self.messages[-5:]}")

    def empty(self) -> None:
        """Take what was sent before."""
        while self.next(0.001) is not None:
            pass

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Receiver]:
    receiver = Receiver(str(tmp_path / "notify"))
    yield receiver
    receiver.close()


def watched(systemd: Receiver) -> dict[str, str]:
    return {"NOTIFY_SOCKET": systemd.address, "WATCHDOG_USEC": str(int(WATCHDOG_S * 1e6))}


def is_keep_alive(message: Message) -> bool:
    return message.get("WATCHDOG") == "1"


# --- a real daemon ------------------------------------------------------------------------------------------------
def test_ready_is_told_when_the_sockets_are_open(stage: Stage, systemd: Receiver) -> None:
    daemon = stage.daemon(env=watched(systemd), wait=False)
    systemd.until(lambda m: m.get("READY") == "1", "READY=1")
    assert daemon.status()["pid"] == daemon.pid
    assert daemon.socket.with_name("d.fd.sock").exists()
    assert systemd.messages[0] == {"STATUS": "taking up what is in the arena"}


def test_the_status_counts_runs_and_ranks(stage: Stage, systemd: Receiver) -> None:
    daemon = stage.daemon(env=watched(systemd))
    systemd.until(lambda m: m.get("STATUS") == "0 runs, 0 ranks", "an idle daemon's status")
    trainer = stage.trainer(daemon, "--steps", 99, "--wait", "staged", "--hold-at", 1)
    trainer.wait_event("holding")
    told = systemd.until(lambda m: m.get("STATUS", "").startswith("1 run, 1 rank"), "the status of one rank")
    assert is_keep_alive(told)


@pytest.mark.slow
def test_a_stopped_daemon_sends_no_keep_alive(stage: Stage, systemd: Receiver) -> None:
    daemon = stage.daemon(env=watched(systemd))
    systemd.until(is_keep_alive, "a keep-alive")
    daemon.stop()
    wait_until(lambda: daemon.is_stopped, "the daemon to stop")
    systemd.empty()
    assert systemd.next(WATCHDOG_S) is None
    daemon.cont()
    systemd.until(is_keep_alive, "a keep-alive after SIGCONT")


def test_a_wedged_daemon_sends_no_keep_alive_though_it_answers(stage: Stage, systemd: Receiver) -> None:
    daemon = stage.daemon(env=watched(systemd), failpoints=WEDGED, http=True)
    told = systemd.until(lambda m: "not alive" in m.get("STATUS", ""), "word of the silent upkeep")
    assert "upkeep is silent" in told["STATUS"]
    assert daemon.status()["pid"] == daemon.pid
    status, body = daemon.get("/livez")
    assert status == 503
    assert "upkeep is silent" in body
    assert systemd.next(WATCHDOG_S) is None


@pytest.mark.slow
def test_a_wedged_daemon_that_the_watchdog_ends_says_where_it_was(stage: Stage, systemd: Receiver) -> None:
    daemon = stage.daemon(env=watched(systemd), failpoints=WEDGED)
    systemd.until(lambda m: "not alive" in m.get("STATUS", ""), "word of the silent upkeep")
    daemon.signal(signal.SIGABRT)
    assert daemon.wait_exit() == -signal.SIGABRT
    assert "upkeep.py" in daemon.log
    assert "failpoints.py" in daemon.log


def test_a_daemon_whose_socket_was_deleted_is_not_alive(stage: Stage, systemd: Receiver) -> None:
    daemon = stage.daemon(env=watched(systemd), http=True)
    systemd.until(is_keep_alive, "a keep-alive")
    assert daemon.get("/livez") == (200, "ok\n")
    daemon.socket.unlink()
    systemd.until(lambda m: "does not answer" in m.get("STATUS", ""), "word of the socket")
    assert daemon.get("/livez")[0] == 503


def threads_of(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


@pytest.mark.slow
def test_a_daemon_whose_every_thread_for_streams_is_taken_answers_calls_and_is_alive(
    stage: Stage, systemd: Receiver
) -> None:
    daemon = stage.daemon(env={**watched(systemd), "WATCHDOG_USEC": "30000000"}, http=True)
    is_over = threading.Event()

    def never_sent() -> Iterator[object]:
        is_over.wait(PATIENCE_S)
        yield from ()

    with grpc.insecure_channel(f"unix:{daemon.socket}", (("grpc.use_local_subchannel_pool", 1),)) as channel:
        with connect(daemon.address) as session:
            write = node_pb2_grpc.NodeServiceStub(channel).Write
            calls = [write.future(never_sent(), metadata=session._metadata) for _ in range(_STREAMS + 8)]
        wait_until(lambda: threads_of(daemon.pid) > _STREAMS, "the daemon to run out of threads for streams")
        assert daemon.status()["runs"] == []
        systemd.until(is_keep_alive, "a keep-alive all the same")
        assert daemon.get("/livez") == (200, "ok\n")
        is_over.set()
        for call in calls:
            call.cancel()


@pytest.mark.slow
def test_a_daemon_that_drains_asks_for_time_and_lives_on(stage: Stage, systemd: Receiver) -> None:
    daemon = stage.tier_daemon(env=watched(systemd), failpoints="drain.before=sleep:2")
    stage.trainer(daemon, "--steps", 1, "--wait", "staged", "--ignore-close").finish()
    daemon.signal(signal.SIGTERM)
    systemd.until(lambda m: m.get("STOPPING") == "1", "STOPPING=1")
    told = systemd.until(lambda m: "EXTEND_TIMEOUT_USEC" in m, "a wish for time")
    assert int(told["EXTEND_TIMEOUT_USEC"]) > WATCHDOG_S * 1e6
    assert is_keep_alive(told)
    assert told["STATUS"].endswith("draining")
    assert daemon.wait_exit() == 0


# --- the call from outside ----------------------------------------------------------------------------------------
@pytest.fixture
def one_thread(tmp_path: Path) -> Iterator[tuple[Path, ThreadPoolExecutor, grpc.Server]]:
    """A socket whose server has one thread for calls, that pool, and the server."""
    path, pool = tmp_path / "d.sock", ThreadPoolExecutor(1)
    server = grpc.server(pool)
    servicer = health.HealthServicer()
    servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    server.add_insecure_port(f"unix:{path}")
    server.start()
    yield path, pool, server
    server.stop(0).wait()
    pool.shutdown()


def test_a_server_that_is_busy_is_alive_for_long_but_not_for_ever(
    one_thread: tuple[Path, ThreadPoolExecutor, grpc.Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckptd.serve.systemd._ANSWER_S", 0.3)
    path, pool, _ = one_thread
    patient, impatient = call_check(path), call_check(path, busy_s=0.1)
    assert (patient(), impatient()) == ("", "")
    is_free = threading.Event()
    pool.submit(is_free.wait, PATIENCE_S)
    assert patient() == ""
    assert "has had no thread for a call for" in impatient()
    is_free.set()
    wait_until(lambda: not impatient(), "a thread for the call")


def test_a_server_that_is_gone_or_stands_does_not_answer(
    one_thread: tuple[Path, ThreadPoolExecutor, grpc.Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckptd.serve.systemd._ANSWER_S", 0.3)
    path, _, server = one_thread
    server.stop(0).wait()
    assert call_check(path)() == f"{path} does not answer: UNAVAILABLE"
    stands = tmp_path / "stands.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(stands))
        listener.listen()
        assert call_check(stands)() == f"{stands} does not answer: DEADLINE_EXCEEDED"


# --- the messages -------------------------------------------------------------------------------------------------
def test_the_variables_are_not_left_to_commands_that_the_daemon_starts() -> None:
    environment = {"NOTIFY_SOCKET": "/run/x", "WATCHDOG_USEC": "60000000", "WATCHDOG_PID": str(os.getpid()), "A": "b"}
    assert Systemd.from_environment(environment) == Systemd("/run/x", 60.0)
    assert environment == {"A": "b"}


def test_a_watchdog_meant_for_another_process_is_none() -> None:
    environment = {"NOTIFY_SOCKET": "/run/x", "WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "1"}
    assert Systemd.from_environment(environment).watchdog_s == 0.0


@pytest.mark.parametrize("watchdog_s", [0.0, 1.0, 20.0, 60.0])
def test_looks_come_often_enough_for_the_watchdog(watchdog_s: float) -> None:
    systemd = Systemd("/run/x", watchdog_s)
    assert 0 < systemd.look_every_s <= (watchdog_s or 60.0) / 4
    assert systemd.silence_s <= (watchdog_s or 60.0) / 2


def test_an_abstract_address_is_reached() -> None:
    receiver = Receiver(f"@ckptd-test-{os.getpid()}")
    Systemd(receiver.address).tell(READY=1, STATUS="1 run")
    assert receiver.next() == {"READY": "1", "STATUS": "1 run"}
    receiver.close()


def test_a_value_of_many_lines_sets_no_other_variable(systemd: Receiver) -> None:
    Systemd(systemd.address).tell(STATUS="not alive: of\nWATCHDOG=1\nall things")
    assert systemd.next() == {"STATUS": "not alive: of WATCHDOG=1 all things"}


def test_nobody_at_the_address_disturbs_nothing(tmp_path: Path) -> None:
    Systemd(str(tmp_path / "nobody")).tell(READY=1)
    Systemd().tell(READY=1)


def test_a_check_that_raises_is_a_problem_until_it_does_not(tmp_path: Path, systemd: Receiver) -> None:
    answers: list[str | Exception] = [ZeroDivisionError("of all things"), "stuck"]

    def check() -> str:
        answer = answers.pop(0) if answers else ""
        if isinstance(answer, Exception):
            raise answer
        return answer

    pulse = Pulse(Systemd(systemd.address, 0.04), [check], lambda: "fine")
    pulse.start()
    assert systemd.next() == {"READY": "1"}
    assert systemd.next() == {"STATUS": "not alive: of all things"}
    assert systemd.next() == {"STATUS": "not alive: stuck"}
    assert systemd.next() == {"STATUS": "fine", "WATCHDOG": "1"}
    pulse.close()
    assert pulse.problem == ""


def test_a_look_that_does_not_end_is_a_problem(systemd: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptd.serve.systemd._ANSWER_S", 0.01)
    is_free = threading.Event()

    def describe_behind_a_lock() -> str:
        is_free.wait(PATIENCE_S)
        return "fine"

    pulse = Pulse(Systemd(systemd.address, 0.04), [], describe_behind_a_lock)
    pulse.start()
    wait_until(lambda: "does not end" in pulse.problem, "the look to be missed")
    is_free.set()
    wait_until(lambda: not pulse.problem, "the next look")
    pulse.close()
