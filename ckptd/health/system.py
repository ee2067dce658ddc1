"""Reads processors, memory, disks and TCP as a whole from ``/proc``. Layer: ``health``, a reader.

The paths are arguments so that tests read files of their own. Sources hold nothing open. Formats: proc(5),
Documentation/accounting/psi.rst and Documentation/admin-guide/iostats.rst of Linux.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from ckptd.detect.health import name_of

PROC: Final = Path("/proc")
BLOCK: Final = Path("/sys/block")
_STEAL: Final = 7  # user nice system idle iowait irq softirq steal; guest time is in user time already
# What is waited for, and whether all tasks that could run or only some of them wait: a cpu is waited for by some as
# soon as it is shared, so that row means most; of memory and disks "full" is nobody working.
_PRESSURES: Final = (("cpu", "some"), ("memory", "full"), ("io", "full"))


class _ProcSource:
    """A source that opens its files at each read."""

    name: str

    def __init__(self, proc: Path = PROC) -> None:
        self.unread: dict[str, str] = {}
        self._proc = proc

    def close(self) -> None:
        """Nothing is open."""


class CpuSource(_ProcSource):
    """Time of all processors together, and how much of it the hypervisor gave to others."""

    name = "cpu"

    def read(self) -> dict[str, float]:
        first = (self._proc / "stat").read_text().split("\n", 1)[0].split()
        ticks = [int(value) for value in first[1 : _STEAL + 2]]
        if first[0] != "cpu" or len(ticks) <= _STEAL:
            raise OSError(f"{self._proc}/stat does not begin with the times of all processors, steal among them")
        tick_s = 1 / os.sysconf("SC_CLK_TCK")
        return {"cpu_s_total": sum(ticks) * tick_s, "cpu_steal_s_total": ticks[_STEAL] * tick_s}


class PressureSource(_ProcSource):
    """Time in which tasks waited for a processor, for memory, for disks (PSI, Linux 4.20, unless booted without)."""

    name = "pressure"

    def read(self) -> dict[str, float]:
        return {f"{what}_pressure_s_total": self._total_s(what, row) for what, row in _PRESSURES}

    def _total_s(self, what: str, row: str) -> float:
        path = self._proc / "pressure" / what
        for line in path.read_text().splitlines():
            kind, *fields = line.split()
            if kind == row:
                return int(dict(field.split("=") for field in fields)["total"]) * 1e-6
        raise OSError(f"{path} has no row {row!r}")


class MemorySource(_ProcSource):
    """How much memory can be had without swapping, and faults that went to a disk."""

    name = "memory"

    def read(self) -> dict[str, float]:
        sizes = _numbers(self._proc / "meminfo", "MemTotal:", "MemAvailable:")
        faults = _numbers(self._proc / "vmstat", "pgmajfault")
        return {
            "memory_available_share": sizes["MemAvailable:"] / sizes["MemTotal:"],
            "memory_major_faults_total": faults["pgmajfault"],
        }


class DiskSource(_ProcSource):
    """Requests of each disk, and how long they took from queued to done. Only what has a device behind it: a loop,
    RAM or mapped device repeats what a disk under it says, or says nothing of hardware."""

    name = "disks"

    def __init__(self, proc: Path = PROC, block: Path = BLOCK) -> None:
        super().__init__(proc)
        self._block = block

    def read(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for line in (self._proc / "diskstats").read_text().splitlines():
            fields = line.split()
            disk = fields[2]
            if (self._block / disk / "device").exists():
                reads, read_ms, writes, write_ms = (int(fields[at]) for at in (3, 6, 7, 10))
                values[name_of("disk_requests_total", disk)] = reads + writes
                values[name_of("disk_requests_s_total", disk)] = (read_ms + write_ms) * 1e-3
        if not values:
            raise OSError(f"{self._proc}/diskstats names no disk that has a device in {self._block}")
        return values


class TcpSource(_ProcSource):
    """Segments of TCP that this network namespace sent, and sent again; loopback included."""

    name = "tcp"

    def read(self) -> dict[str, float]:
        rows = [line.split() for line in (self._proc / "net" / "snmp").read_text().splitlines()]
        names, values = ([*row[1:]] for row in rows if row[0] == "Tcp:")
        counts = dict(zip(names, values, strict=True))
        return {
            "tcp_segments_total": float(counts["OutSegs"]),
            "tcp_retransmits_total": float(counts["RetransSegs"]),
        }


def _numbers(path: Path, *names: str) -> dict[str, float]:
    """The first number after each of ``names`` at the start of a line."""
    found: dict[str, float] = {}
    for line in path.read_text().splitlines():
        name, value, *_ = line.split()
        if name in names:
            found[name] = float(value)
    missing = [name for name in names if name not in found]
    if missing:
        raise OSError(f"{path} does not tell {', '.join(missing)}")
    return found
