"""Nodes of one machine: network namespaces joined by a switch, each link with a rate of its own, all gone afterwards.

The switch is a bridge in a namespace of its own, so nothing is added to the network of the machine. A node's link is a
veth pair with a token bucket at both ends: its rate can be changed while it is used, in one direction too.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SENDING, RECEIVING = "sending", "receiving"
SIDES = (SENDING, RECEIVING)
_NETWORK = "10.77.0.0/24"
_BURST_BYTES = 64 << 10
_QUEUE_BYTES = 512 << 10


@dataclass(frozen=True)
class Fabric:
    """``count`` nodes; node ``at`` is at ``address(at)``, its interface is ``eth0``."""

    name: str
    count: int

    @property
    def switch(self) -> str:
        return f"{self.name}-switch"

    def namespace(self, at: int) -> str:
        return f"{self.name}-{at}"

    def address(self, at: int) -> str:
        return f"10.77.0.{at + 1}"

    def within(self, at: int) -> list[str]:
        """The beginning of a command line: what follows runs on node ``at``."""
        return ["ip", "netns", "exec", self.namespace(at)]

    def limit(self, at: int, mbit_s: float, sides: tuple[str, ...] = SIDES) -> None:
        """The rate of the link of node ``at`` from now on."""
        bucket = f"tbf rate {mbit_s}mbit burst {_BURST_BYTES} limit {_QUEUE_BYTES}"
        for side in sides:
            where = (self.namespace(at), "eth0") if side == SENDING else (self.switch, f"port{at}")
            _run(f"tc -n {where[0]} qdisc replace dev {where[1]} root {bucket}")


@contextmanager
def fabric(name: str, count: int, mbit_s: float, congestion: str = "cubic") -> Iterator[Fabric]:
    """A fabric that lives as long as the block. PermissionError or OSError where this is not allowed."""
    made = Fabric(name, count)
    try:
        _run(f"ip netns add {made.switch}")
        _run(f"ip -n {made.switch} link add bridge0 type bridge")
        _run(f"ip -n {made.switch} link set bridge0 up")
        for at in range(count):
            _join(made, at)
            # By route, since the setting for all of a namespace is not always allowed.
            _run(f"ip -n {made.namespace(at)} route replace {_NETWORK} dev eth0 congctl {congestion}")
            made.limit(at, mbit_s)
        yield made
    finally:
        for namespace in [*map(made.namespace, range(count)), made.switch]:
            if Path("/run/netns", namespace).exists():
                subprocess.run(["ip", "netns", "del", namespace], check=False)


def _join(made: Fabric, at: int) -> None:
    node, switch = made.namespace(at), made.switch
    _run(f"ip netns add {node}")
    _run(f"ip -n {node} link set lo up")
    _run(f"ip -n {node} link add eth0 type veth peer name port{at} netns {switch}")
    _run(f"ip -n {node} address add {made.address(at)}/24 dev eth0")
    _run(f"ip -n {node} link set eth0 up")
    _run(f"ip -n {switch} link set port{at} master bridge0 up")


def _run(command: str) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{command}: {done.stderr.strip()}")


def enter(namespace: str) -> None:
    """This process, of one thread, is on that node from now on."""
    opened = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(opened, 0):
        raise OSError(ctypes.get_errno(), f"setns {namespace}")
    os.close(opened)
