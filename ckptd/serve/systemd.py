"""Whether the daemon is alive in earnest, and what systemd is told of it: sd_notify(3), systemd.service(5).

Layer: ``serve``. Invariants: without NOTIFY_SOCKET nothing is sent; a keep-alive follows only a look that found the
upkeep ticking and a call from outside answered, so a daemon that is wedged is ended and started again, which costs no
snapshot, while one that is only busy is left at its work; nothing here raises.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ckptd.serve.node import Node
from ckptd.serve.upkeep import Upkeep

_LOOK_EVERY_S: Final = 5.0
_ANSWER_S: Final = 5.0
_SILENCE_S: Final = 30.0
# Of calls that wait for a thread, on end. Streams of slow clients and a flood of calls pass; a deadlock does not.
_BUSY_S: Final = 600.0
_NO_METHOD: Final = "/ckptd.Alive/NoSuchMethod"
_OPTIONS: Final = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0))

Check = Callable[[], str]  # what is wrong; "": nothing
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Systemd:
    """Where to send messages ("": nowhere), and how long systemd waits for a keep-alive (0: it does not)."""

    address: str = ""
    watchdog_s: float = 0.0

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str]) -> Systemd:
        """Takes the variables out of ``environment``: a command of --on-fault is not to speak for the daemon."""
        address = environment.pop("NOTIFY_SOCKET", "")
        watchdog_us = environment.pop("WATCHDOG_USEC", "")
        is_meant = environment.pop("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        return cls(address, int(watchdog_us) / 1e6 if is_meant and watchdog_us.isdecimal() else 0.0)

    @property
    def silence_s(self) -> float:
        """How long the upkeep may be silent: half of what systemd waits for, so that the daemon is first to know."""
        return self.watchdog_s / 2 or _SILENCE_S

    @property
    def look_every_s(self) -> float:
        return min(_LOOK_EVERY_S, self.watchdog_s / 4 or _LOOK_EVERY_S)

    def tell(self, **variables: object) -> None:
        """Send variables of sd_notify(3). One that cannot be sent is lost: its deadline acts."""
        if not self.address:
            return
        # A line is a variable, whatever an error says.
        message = "\n".join(f"{name}={' '.join(str(value).split())}" for name, value in variables.items())
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.settimeout(1.0)
            notify.connect("\0" + self.address[1:] if self.address.startswith("@") else self.address)
            notify.send(message.encode())


class Pulse:
    """A thread that looks every few seconds whether the daemon is alive."""

    def __init__(self, systemd: Systemd, checks: Sequence[Check], describe: Callable[[], str]) -> None:
        self._found = ""
        self._looked_at_s = time.monotonic()
        self._systemd = systemd
        self._checks = checks
        self._describe = describe
        self._is_stopping = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    @property
    def problem(self) -> str:
        """What the last look found, "" while the daemon is alive; a look that does not end is found too."""
        if time.monotonic() - self._looked_at_s > self._systemd.silence_s + _ANSWER_S:
            return "looking whether the daemon is alive does not end"
        return self._found

    def start(self) -> None:
        """The daemon is ready: say so, and look from now on."""
        self._looked_at_s = time.monotonic()
        self._systemd.tell(READY=1)
        self._thread.start()

    def begin_stopping(self) -> None:
        """The daemon was told to end: while it is alive it may take longer than TimeoutStopSec."""
        self._is_stopping = True
        self._systemd.tell(STOPPING=1)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            before, self._found = self._found, self._look()
            self._looked_at_s = time.monotonic()
            if self._found and self._found != before:
                log.error("not alive", problem=self._found)
                self._systemd.tell(STATUS=f"not alive: {self._found}")
            self._stop.wait(self._systemd.look_every_s)

    def _look(self) -> str:
        try:
            problem = next(filter(None, (check() for check in self._checks)), "")
            if not problem:
                self._systemd.tell(**self._signs())
        except Exception as error:  # a thread's boundary: what cannot be looked at is not alive, and is looked at again
            log.exception("looking whether the daemon is alive")
            return str(error) or type(error).__name__
        return problem

    def _signs(self) -> dict[str, object]:
        signs: dict[str, object] = {"STATUS": self._describe()}
        if self._systemd.watchdog_s:
            signs["WATCHDOG"] = 1
        if self._is_stopping:
            # As long as three looks and their calls may take: the first that fails is the last that counts.
            signs["EXTEND_TIMEOUT_USEC"] = int(3 * (self._systemd.look_every_s + _ANSWER_S) * 1e6)
        return signs


def upkeep_check(upkeep: Upkeep, silence_s: float) -> Check:
    """The upkeep takes the locks of runs and arena at every tick: a deadlock there stops it."""

    def check() -> str:
        return f"the upkeep is silent for more than {silence_s:g} s" if upkeep.silent_s > silence_s else ""

    return check


def call_check(path: Path, busy_s: float = _BUSY_S) -> Check:
    """Call the gRPC socket at ``path`` as a trainer does: by a connection of its own, which a socket that was deleted
    does not get. The server answers a call of no method itself, and one of health on a thread of its pool: while all of
    those are taken the daemon is busy, and alive, until no call of health was answered for ``busy_s``."""
    answered_s = time.monotonic()
    is_busy = False

    def check() -> str:
        nonlocal answered_s, is_busy
        with grpc.insecure_channel(f"unix:{path}", _OPTIONS) as channel:
            code = _code_of(channel.unary_unary(_NO_METHOD), b"")
            if code is not grpc.StatusCode.UNIMPLEMENTED:
                return f"{path} does not answer: {code.name}"
            code = _code_of(health_pb2_grpc.HealthStub(channel).Check, health_pb2.HealthCheckRequest())
        now_s = time.monotonic()
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            if not is_busy:
                log.warning("every thread for calls is taken", socket=str(path))
            is_busy = True
            silent_s = now_s - answered_s
            return f"{path} has had no thread for a call for {silent_s:.0f} s" if silent_s > busy_s else ""
        if code is not grpc.StatusCode.OK:
            return f"{path} does not answer: {code.name}"
        answered_s, is_busy = now_s, False
        return ""

    return check


def _code_of(call: Callable[..., object], request: object) -> grpc.StatusCode:
    try:
        call(request, timeout=_ANSWER_S)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def describe(node: Node) -> str:
    """What goes on here, for people: "2 runs, 8 ranks, draining"."""
    runs = node.node_runs()
    ranks = [sum(rank.state == "joined" for rank in list(run.ranks.values())) for run in runs]
    text = f"{_count(sum(map(bool, ranks)), 'run')}, {_count(sum(ranks), 'rank')}"
    return text + (", draining" if any(run.is_draining for run in runs) else "")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
