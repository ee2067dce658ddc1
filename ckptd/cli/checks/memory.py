"""Checks of the memory an arena would live in: the mount, the cgroup, what may be locked."""

from __future__ import annotations

import resource
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from ckptd.arena.budget import RESERVE_BYTES, MemoryFacts, read_memory_facts
from ckptd.cli.checks import Check
from ckptd.config import format_size

_CONTAINER_DEFAULT_BYTES: Final = 64 << 20
_MEMORY_FILE_SYSTEMS: Final = frozenset({"tmpfs", "ramfs", "hugetlbfs"})
_ENLARGE: Final = (
    "enlarge it: docker run --shm-size=SIZE; in Kubernetes an emptyDir with medium: Memory at {point}; "
    "on a host mount -o remount,size=SIZE {point}; or lower --memory"
)


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of /proc/self/mounts."""

    point: str
    kind: str
    options: str


def mount_of(path: Path, mounts: str) -> Mount:
    """The mount that ``path`` lies in, by the longest mount point; of two at one point the later covers the earlier."""
    best = Mount("/", "unknown", "")
    for entry in mounts.splitlines():
        _, point, kind, options, *_ = entry.split(" ")
        point = point.replace("\\040", " ")
        if path.is_relative_to(point) and len(point) >= len(best.point):
            best = Mount(point, kind, options)
    return best


def facts_of(arena: Path) -> MemoryFacts:
    """Of the arena if it is there, else of where it would be made."""
    if arena.is_dir():
        return read_memory_facts(arena)
    parent = next(path for path in arena.parents if path.is_dir())
    return replace(read_memory_facts(parent), held_bytes=0)  # what lies in the parent is others'


def shared_memory(arena: Path, wanted_bytes: int, facts: MemoryFacts, mount: Mount, mount_bytes: int) -> Check:
    """Does the arena's mount have room, and is it memory at all? tmpfs allocates late: a full one is a SIGBUS."""
    found = (
        f"{arena}: {mount.kind} at {mount.point} ({mount.options}), {format_size(facts.free_bytes)} free of "
        f"{format_size(mount_bytes)}, {format_size(facts.held_bytes)} held by this arena; wanted "
        f"{format_size(wanted_bytes)}"
    )
    enlarge = _ENLARGE.format(point=mount.point)
    if "ro" in mount.options.split(","):
        return Check("shared memory", "fail", found, f"mount {mount.point} for writing, or choose --arena")
    if wanted_bytes - facts.held_bytes > facts.free_bytes:
        return Check("shared memory", "fail", found, enlarge)
    if mount.kind not in _MEMORY_FILE_SYSTEMS:
        return Check("shared memory", "warn", found, "choose an --arena in a memory file system (tmpfs)")
    if mount_bytes <= _CONTAINER_DEFAULT_BYTES:
        return Check("shared memory", "warn", found, f"{mount.point} has a container's default size: {enlarge}")
    return Check("shared memory", "ok", found)


def cgroup_memory(wanted_bytes: int, facts: MemoryFacts) -> Check:
    """Slots are charged to the cgroup that touches them first; over its limit the kernel kills."""
    if facts.cgroup_limit_bytes is None:
        return Check("cgroup memory", "ok", "no limit")
    room = facts.cgroup_limit_bytes - facts.cgroup_used_bytes - RESERVE_BYTES
    grow = wanted_bytes - facts.held_bytes
    found = (
        f"limit {format_size(facts.cgroup_limit_bytes)}, used {format_size(facts.cgroup_used_bytes)}, "
        f"reserve {format_size(RESERVE_BYTES)}; to grow by {format_size(max(0, grow))}"
    )
    if grow > room:
        return Check(
            "cgroup memory", "fail", found, "raise the memory limit of the container or unit, or lower --memory"
        )
    return Check("cgroup memory", "ok", found)


def locked_memory(wanted_bytes: int, *, has_gpu: bool) -> Check:
    """Only registering slots with CUDA needs it, and only where the driver honours the limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if not has_gpu:
        return Check("locked memory", "ok", "no GPU here to register memory with")
    if soft == resource.RLIM_INFINITY or soft >= wanted_bytes:
        text = "unlimited" if soft == resource.RLIM_INFINITY else format_size(soft)
        return Check("locked memory", "ok", f"limit {text}")
    return Check(
        "locked memory",
        "warn",
        f"limit {format_size(soft)}, below the memory of the arena: registering it with CUDA may fail",
        "raise it for trainers: ulimit -l unlimited, LimitMEMLOCK=infinity, or docker run --ulimit memlock=-1",
    )
