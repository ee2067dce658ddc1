"""What the local stack is made of: addresses, folders, and the command of every program.

Pure but for looking for free ports and for programs. Above ``lifetimes``, below ``up`` and ``down``. A stack keeps its
addresses in ``stack.json`` of its folder, so that a second ``up`` means the same one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import lifetimes

REPOSITORY: Final = Path(__file__).resolve().parents[2]
STATE: Final = REPOSITORY / ".local"
NODES: Final = 3
_PROMETHEUS_PORT: Final = 19090  # not 9090 and 9093, where Debian's services listen once they are installed
_ALERTMANAGER_PORT: Final = 19093
_PEER_PORT: Final = 17071
_HTTP_PORT: Final = 19464
_ALERTMANAGERS: Final = ("prometheus-alertmanager", "alertmanager")  # Debian's name, and the project's own


class CannotStart(Exception):
    """Why there is no stack, and what to do about it."""


@dataclass(frozen=True)
class Addresses:
    """Ports on 127.0.0.1; ``peers`` and ``http`` by node. ``webhook``: where alerts are told, "" nowhere."""

    prometheus: int
    alertmanager: int
    peers: tuple[int, ...]
    http: tuple[int, ...]
    webhook: str

    @property
    def ports(self) -> tuple[int, ...]:
        return (self.prometheus, self.alertmanager, *self.peers, *self.http)

    def as_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Addresses:
        try:
            fields = json.loads(text)
            return cls(**{**fields, "peers": tuple(fields["peers"]), "http": tuple(fields["http"])})
        except (ValueError, KeyError, TypeError) as error:
            raise CannotStart(
                f"stack.json of the stack that runs is damaged: `deploy/local/down` first ({error})"
            ) from error


@dataclass(frozen=True)
class Program:
    """One process of the stack. ``ready``: the page that answers 200 once it serves."""

    name: str
    command: tuple[str, ...]
    ready: str


@dataclass(frozen=True)
class Layout:
    """Where everything of a stack in ``state`` lies."""

    state: Path

    @property
    def addresses(self) -> Path:
        return self.state / "stack.json"

    @property
    def tier(self) -> Path:
        return self.state / "tier"

    @property
    def names(self) -> tuple[str, ...]:
        return (*(f"node-{node}" for node in range(NODES)), "prometheus", "alertmanager")

    def config(self, name: str) -> Path:
        return self.state / f"{name}.yml"

    def data(self, name: str) -> Path:
        return self.state / name

    def log(self, name: str) -> Path:
        return self.state / f"{name}.log"

    def pid_file(self, name: str) -> Path:
        return self.state / f"{name}.pid"

    def socket(self, node: int) -> Path:
        return self.state / f"node-{node}" / "d.sock"

    def arena(self, node: int) -> Path:
        """Of this stack and no other: its name is made of the folder of the state."""
        mark = hashlib.sha256(str(self.state).encode()).hexdigest()[:12]
        return Path("/dev/shm") / f"ckptd-local-{mark}-{node}"  # noqa: S108  memory is what an arena is made of

    def describe(self, at: Addresses) -> str:
        """For programs: where everything is, as JSON."""
        nodes = [
            {
                "socket": str(self.socket(node)),
                "arena": str(self.arena(node)),
                "listen": f"127.0.0.1:{at.peers[node]}",
                "http": f"127.0.0.1:{at.http[node]}",
                "pid": lifetimes.living(self.pid_file(f"node-{node}")),
            }
            for node in range(NODES)
        ]
        urls = {
            "prometheus": f"http://127.0.0.1:{at.prometheus}",
            "alertmanager": f"http://127.0.0.1:{at.alertmanager}",
        }
        return json.dumps({**urls, "webhook": at.webhook, "tier": str(self.tier), "nodes": nodes})

    def written(self) -> Iterator[Path]:
        """Everything that a stack leaves: what ``down`` removes."""
        for name in self.names:
            yield from (self.data(name), self.log(name), self.pid_file(name), self.config(name))
        yield from (self.tier, self.addresses, *map(self.arena, range(NODES)))


# --- addresses ----------------------------------------------------------------------------------------------------
def fixed_addresses(webhook: str) -> Addresses:
    """Those that the documentation names; CannotStart when one of them is taken."""
    nodes = range(NODES)
    found = Addresses(
        _PROMETHEUS_PORT,
        _ALERTMANAGER_PORT,
        tuple(_PEER_PORT + node for node in nodes),
        tuple(_HTTP_PORT + node for node in nodes),
        webhook,
    )
    if taken := [port for port in found.ports if not _is_free(port)]:
        raise CannotStart(f"something else listens at 127.0.0.1:{taken[0]}: end it, or use --free-ports")
    return found


def free_addresses(webhook: str) -> Addresses:
    with ExitStack() as held:  # all at once, or one could be given twice
        ports = [_any_port(held) for _ in range(2 + 2 * NODES)]
    return Addresses(ports[0], ports[1], tuple(ports[2 : 2 + NODES]), tuple(ports[2 + NODES :]), webhook)


def _any_port(held: ExitStack) -> int:
    probe = held.enter_context(socket.socket())
    probe.bind(("127.0.0.1", 0))
    return int(probe.getsockname()[1])


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


# --- programs -----------------------------------------------------------------------------------------------------
def programs(layout: Layout, at: Addresses) -> list[Program]:
    """The commands of the stack; CannotStart when one is not installed."""
    ckptd = shutil.which("ckptd", path=str(Path(sys.executable).parent)) or shutil.which("ckptd")
    prometheus = shutil.which("prometheus")
    alertmanager = next(filter(None, map(shutil.which, _ALERTMANAGERS)), None)
    if ckptd is None:
        raise CannotStart("ckptd is not installed: `make demo` in the repository installs it")
    missing = {"prometheus": prometheus, "prometheus-alertmanager": alertmanager}
    if prometheus is None or alertmanager is None:
        packages = " ".join(name for name, path in missing.items() if path is None)
        raise CannotStart(f"not installed: {packages}\n  apt install {packages}")
    nodes = [_node(ckptd, layout, at, node) for node in range(NODES)]
    return [*nodes, _prometheus(prometheus, layout, at), _alertmanager(alertmanager, layout, at)]


def _node(ckptd: str, layout: Layout, at: Addresses, node: int) -> Program:
    http = f"127.0.0.1:{at.http[node]}"
    command = (
        *(ckptd, "serve", "--socket", str(layout.socket(node)), "--arena", str(layout.arena(node))),
        *("--memory", "256MiB", "--listen", f"127.0.0.1:{at.peers[node]}", "--insecure", "--http", http),
        *("--tier", f"file://{layout.tier}", "--drain-deadline", "5"),
    )
    return Program(f"node-{node}", command, f"http://{http}/livez")


def _prometheus(program: str, layout: Layout, at: Addresses) -> Program:
    here = f"127.0.0.1:{at.prometheus}"
    command = (
        *(program, f"--config.file={layout.config('prometheus')}", f"--web.listen-address={here}"),
        *(f"--storage.tsdb.path={layout.data('prometheus')}", "--storage.tsdb.retention.time=1d"),
        *("--query.max-concurrency=4", "--log.level=warn"),
    )
    return Program("prometheus", command, f"http://{here}/-/ready")


def _alertmanager(program: str, layout: Layout, at: Addresses) -> Program:
    here = f"127.0.0.1:{at.alertmanager}"
    command = (
        *(program, f"--config.file={layout.config('alertmanager')}", f"--web.listen-address={here}"),
        *(f"--storage.path={layout.data('alertmanager')}", "--cluster.listen-address=", "--log.level=warn"),
    )
    return Program("alertmanager", command, f"http://{here}/-/ready")
