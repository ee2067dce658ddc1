"""Runs a command as the unit file would: its user has nothing but what the unit leaves it. For tests; needs root.

``confined.py UNIT UID FOLDER... -- COMMAND``. Applied are the file system (read only, but FOLDERs, and what
ProtectSystem=strict leaves), ProtectHome=, ProtectProc=, User=, capabilities, UMask=, NoNewPrivileges=,
MemoryDenyWriteExecute= and SystemCallFilter=, by the kernel's own means and with the unit's own values. Not applied:
devices, control groups, address families.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_ALLOW = 0x7FFF0000
_ERRNO = 0x00050000
_EPERM = 1
_SET_MDWE = 65
_REFUSE_EXEC_GAIN = 1


def settings_of(unit: Path) -> list[tuple[str, str]]:
    """Each ``Name=value`` of a unit file, in order."""
    lines = (line for line in unit.read_text().splitlines() if not line.startswith(("#", "[")))
    return [(name, value) for name, separator, value in (line.partition("=") for line in lines) if separator]


def system_calls(filters: Sequence[str]) -> set[str]:
    """What SystemCallFilter= lines leave, the first of which allows."""
    allowed: set[str] = set()
    for line in filters:
        names = {name for item in line.removeprefix("~").split() for name in _members(item)}
        allowed = allowed - names if line.startswith("~") else allowed | names
    return allowed


def _members(item: str) -> Iterator[str]:
    if not item.startswith("@"):
        yield item
        return
    shown = subprocess.run(["systemd-analyze", "syscall-filter", item], capture_output=True, text=True, check=True)
    for line in shown.stdout.splitlines()[1:]:
        if re.fullmatch(r"\s+@?\w[\w-]*", line):
            yield from _members(line.strip())


def _filter(names: set[str]) -> None:
    library = ctypes.CDLL("libseccomp.so.2")
    library.seccomp_init.restype = ctypes.c_void_p
    context: Any = ctypes.c_void_p(library.seccomp_init(_ERRNO | _EPERM))
    for name in names:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number >= 0:  # negative: of other processors
            assert library.seccomp_rule_add(context, _ALLOW, number, 0) == 0, name
    assert library.seccomp_load(context) == 0


def _enter(command: Sequence[str]) -> None:
    """The last step, as the unit's user; ``command`` is the unit and what to run."""
    values = settings_of(Path(command[0]))
    names = system_calls([value for name, value in values if name == "SystemCallFilter"])
    assert ctypes.CDLL(None).prctl(_SET_MDWE, _REFUSE_EXEC_GAIN, 0, 0, 0) == 0, "Linux 6.3 is needed"
    _filter(names)
    os.execv(command[1], command[1:])


def _cover_homes(kept: Sequence[Path]) -> None:
    """ProtectHome=yes, but for what of ``kept``, this interpreter and the tree, lies there."""
    for home in (Path("/root"), Path("/home")):
        inside = [path for path in kept if path.is_relative_to(home)]
        held = [os.open(path, os.O_PATH) for path in inside]
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0755", "none", str(home)], check=True)
        for path, fd in zip(inside, held, strict=True):
            path.mkdir(parents=True)
            subprocess.run(
                ["mount", "--no-canonicalize", "--bind", f"/proc/self/fd/{fd}", str(path)], check=True, pass_fds=[fd]
            )
            os.close(fd)


def _confine(unit: Path, uid: str, folders: Sequence[str], command: Sequence[str]) -> None:
    """Mounts, then the user; in a mount name space of its own."""
    values = dict(settings_of(unit))
    assert (values["ProtectSystem"], values["ProtectHome"]) == ("strict", "yes")
    _cover_homes([Path(sys.base_prefix), Path(__file__).parents[2]])
    for folder in folders:
        subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", "/"], check=True)
    subprocess.run(["mount", "-t", "proc", "-o", f"hidepid={values['ProtectProc']}", "proc", "/proc"], check=True)
    capability = values["CapabilityBoundingSet"].removeprefix("CAP_").lower()
    assert values["AmbientCapabilities"] == values["CapabilityBoundingSet"]
    user = ["setpriv", "--reuid", uid, "--regid", uid, "--clear-groups", "--no-new-privs"]
    user += ["--inh-caps", f"-all,+{capability}", "--ambient-caps", f"-all,+{capability}"]
    user += ["--bounding-set", f"-all,+{capability}", sys.executable, __file__, "--enter", str(unit), *command]
    os.umask(int(values["UMask"], 8))
    os.execvp(user[0], user)


def main() -> None:
    if sys.argv[1] == "--enter":
        _enter(sys.argv[2:])
    at = sys.argv.index("--")
    unit, uid, *folders = sys.argv[1:at]
    _confine(Path(unit), uid, folders, sys.argv[at + 1 :])


if __name__ == "__main__":
    main()
