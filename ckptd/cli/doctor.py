"""``ckptd doctor``: is this machine fit for the daemon that is wished for, and is the one that runs well?"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ckptd.cli import options, output
from ckptd.cli.checks import Check
from ckptd.config import Settings, load_settings
from ckptd.errors import EXIT_DEGRADED, EXIT_OK


def doctor(
    arena: Annotated[Path | None, typer.Option(metavar="DIR", help="The arena; default: as serve would.")] = None,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Memory the daemon is to have.")] = None,
    tier: Annotated[list[str] | None, typer.Option(metavar="URL", help="A tier it is to have; repeatable.")] = None,
    config: Annotated[Path | None, typer.Option(metavar="F", help="Settings file that serve is to read.")] = None,
    socket: options.Socket = None,
    as_json: options.Json = False,
) -> int:
    """Check memory, limits, tiers, versions and the daemon.

    Settings are found as serve finds them. Exits 3 when something should be mended.
    """
    from ckptd.cli import channel

    named = socket or os.environ.get("CKPTD_DAEMON")
    path = channel.unix_path(named) if named else None
    if named and path is None:
        from ckptd.config import default_socket

        path = default_socket()  # of a daemon on TCP, this machine's part is what serve would take here
    flags = {"socket": path, "arena": arena, "memory_bytes": memory, "tiers": tuple(tier or ()), "config": config}
    checks = _checks(load_settings(flags), named)
    if as_json:
        output.emit_json({"checks": [asdict(check) for check in checks]})
    else:
        _show(checks)
    return EXIT_OK if all(check.status == "ok" for check in checks) else EXIT_DEGRADED


def _checks(settings: Settings, named: str | None) -> list[Check]:
    from ckptd.cli.checks import daemon, machine, memory, tiers

    facts = memory.facts_of(settings.arena)
    mount = memory.mount_of(settings.arena, Path("/proc/self/mounts").read_text())
    whole = os.statvfs(mount.point)
    wanted, uid = settings.memory_bytes, os.getuid()
    return [
        memory.shared_memory(settings.arena, wanted, facts, mount, whole.f_blocks * whole.f_frsize),
        memory.cgroup_memory(wanted, facts),
        memory.locked_memory(wanted, has_gpu=Path("/dev/nvidiactl").exists()),
        *(tiers.tier(spec, wanted) for spec in settings.tiers),
        machine.remove_ipc(Path("/"), uid),
        machine.fork_support(os.environ),
        machine.open_files(),
        machine.socket_folder(settings.socket, uid),
        machine.versions(),
        *daemon.daemon(named),
    ]


def _show(checks: list[Check]) -> None:
    output.table(["STATUS", "CHECK", "FOUND"], [[check.status, check.name, check.found] for check in checks])
    to_mend = [check for check in checks if check.fix]
    if to_mend:
        output.line()
    for check in to_mend:
        output.line(f"{check.name}: {check.fix}")
