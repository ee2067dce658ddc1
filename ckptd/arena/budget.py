"""How much memory an arena may hold: read from the mount and the cgroup, refused up front when it does not fit."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ckptd.errors import BudgetRefused

RESERVE_BYTES: Final = 512 * 1024 * 1024
_MIB: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class MemoryFacts:
    """Bytes free on the arena's mount; the cgroup's limit and use (None without a limit); bytes of this arena."""

    free_bytes: int
    cgroup_limit_bytes: int | None
    cgroup_used_bytes: int
    held_bytes: int


def read_memory_facts(folder: Path) -> MemoryFacts:
    """The facts for an arena in ``folder``."""
    stat = os.statvfs(folder)
    held = sum(entry.stat().st_blocks * 512 for entry in os.scandir(folder) if entry.is_file())
    limit, used = _cgroup_memory()
    return MemoryFacts(stat.f_bavail * stat.f_frsize, limit, used, held)


def check_budget(wanted_bytes: int, facts: MemoryFacts, folder: Path) -> None:
    """BudgetRefused, with the fix, unless the arena can grow to ``wanted_bytes``."""
    grow = wanted_bytes - facts.held_bytes
    if grow > facts.free_bytes:
        raise BudgetRefused(
            f"--memory asks for {wanted_bytes // _MIB} MiB but only {facts.free_bytes // _MIB} MiB are free in "
            f"{folder}",
            f"lower --memory, or enlarge the mount (mount -o remount,size={-(-wanted_bytes // _MIB)}M; in a container "
            "raise its shared memory size: it is 64 MB by default)",
        )
    if facts.cgroup_limit_bytes is None:
        return
    room = facts.cgroup_limit_bytes - facts.cgroup_used_bytes - RESERVE_BYTES
    if grow > room:
        raise BudgetRefused(
            f"--memory asks for {wanted_bytes // _MIB} MiB but the cgroup has room for {max(0, room) // _MIB} MiB "
            f"(limit {facts.cgroup_limit_bytes // _MIB}, used {facts.cgroup_used_bytes // _MIB}, "
            f"reserve {RESERVE_BYTES // _MIB})",
            "lower --memory or raise the memory limit of the container or unit",
        )


def _cgroup_memory() -> tuple[int | None, int]:
    """(limit, used) of this process's cgroup, version 2 or 1; (None, 0) without a limit."""
    for limit_name, used_name in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        for root in (Path("/sys/fs/cgroup") / _own_cgroup().lstrip("/"), Path("/sys/fs/cgroup")):
            try:
                limit, used = (root / limit_name).read_text().strip(), (root / used_name).read_text().strip()
            except OSError:
                continue  # not this version, or not this path: the next may be it
            if limit.isdigit() and int(limit) < 1 << 60:
                return int(limit), int(used)
    return None, 0


def _own_cgroup() -> str:
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return "/"
    return next((line.split("::", 1)[1] for line in lines if line.startswith("0::")), "/")
