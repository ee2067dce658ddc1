"""Several daemons that protect one another, nodes that are lost with their memory, and fresh ones in their place."""

from __future__ import annotations

import contextlib
import random
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from harness import DaemonProcess, Stage

from ckptd.format.blocks import HEADER_BYTES
from ckptd.format.parity import decode_header as decode_parity
from ckptd.format.slot import SlotState, read_state
from ckptd.format.slot import decode_header as decode_slot


class Fleet:
    """Daemons by position, started together. ``options_of(position)`` are more options of the first daemon there."""

    def __init__(
        self,
        stage: Stage,
        count: int,
        options_of: Callable[[int], dict[str, Any]] = lambda _position: {},
        **options: Any,
    ) -> None:
        self._stage = stage
        self._options = {"memory": "32MiB", **options}
        self.daemons = [self._begin(**options_of(position)) for position in range(count)]
        for daemon in self.daemons:
            daemon.wait_ready()

    def start(self, count: int, **options: Any) -> list[DaemonProcess]:
        """``count`` more daemons, at no position."""
        started = [self._begin(**options) for _ in range(count)]
        for daemon in started:
            daemon.wait_ready()
        return started

    def _begin(self, **options: Any) -> DaemonProcess:
        more = {"listen": own_port(), **self._options, **options}
        return self._stage.daemon(*more.pop("flags", ()), wait=False, **more)

    def lose(self, *positions: int) -> None:
        """SIGKILL, and the memory is gone."""
        for daemon in [self.daemons[position] for position in positions if self.daemons[position].is_alive]:
            daemon.signal(signal.SIGKILL)  # all of them first: they go together
        for position in positions:
            self.daemons[position].close()

    def replace(self, *positions: int) -> None:
        """Fresh daemons, at other addresses and with empty arenas, take the places of lost ones."""
        for position, daemon in zip(positions, self.start(len(positions)), strict=True):
            self.daemons[position] = daemon

    def parity(self, step: int, run: str = "shards") -> dict[int, set[tuple[int, int]]]:
        """The sealed fragments (stripe, row) of ``step``, by position of the daemons that answer."""
        return {
            position: {
                (p["stripe"], p["row"])
                for p in daemon.status()["parity"]
                if p["run"] == run and p["state"] == "sealed" and p["snapshot"]["step"] == step
            }
            for position, daemon in enumerate(self.daemons)
            if daemon.is_alive and not daemon.is_stopped
        }


class MakeFleet(Protocol):
    """The fixture: ``make_fleet(6, memory="16MiB")``."""

    def __call__(self, count: int, **options: Any) -> Fleet: ...


_given: set[int] = set()


def own_port() -> int:
    """A free port that no connection is given: so nobody takes it while its daemon is restarted."""
    lowest_given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(lowest_given // 2, lowest_given)
        if port in _given:  # of a daemon that has yet to bind it
            continue
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            _given.add(port)
            return port


# --- flipped bits -------------------------------------------------------------------------------------------------
def flip_image_block(daemon: DaemonProcess, step: int, block: int) -> None:
    """One bit of block ``block`` of the only shard of ``step`` that ``daemon`` holds."""
    for path in daemon.slot_files():
        page = memoryview(path.read_bytes())
        if read_state(page) is SlotState.SEALED:
            header, _ = decode_slot(page, path.name)
            if header.snapshot.step == step:
                _flip(path, HEADER_BYTES + block * header.layout.block_bytes + 777)
                return
    raise AssertionError(f"no shard of step {step} is sealed at {daemon.folder}")


def flip_fragment(daemon: DaemonProcess, step: int, stripe: int, row: int) -> None:
    """One bit of a parity fragment that ``daemon`` holds."""
    for path in daemon.arena.glob("*.parity"):
        data = memoryview(path.read_bytes())
        if read_state(data) is SlotState.SEALED:
            header, _ = decode_parity(data, path.name)
            if (header.group.snapshot.step, header.stripe, header.row) == (step, stripe, row):
                _flip(path, header.fragment_offset + 777)
                return
    raise AssertionError(f"row {row} of stripe {stripe} of step {step} is not at {daemon.folder}")


def _flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 16]))
