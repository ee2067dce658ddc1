"""Checks of the machine besides its memory: who cleans up behind us, limits, versions, the socket's folder."""

from __future__ import annotations

import os
import platform
import pwd
import resource
import stat
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import ckptd
from ckptd.cli.checks import Check

_FIRST_LOGIN_UID: Final = 1000  # systemd's RemoveIPC spares system users, which are those below
_FEWEST_FILES: Final = 1024
_LOGIND_FILES: Final = (
    "usr/lib/systemd/logind.conf",
    "etc/systemd/logind.conf",
    "usr/lib/systemd/logind.conf.d/*.conf",
    "run/systemd/logind.conf.d/*.conf",
    "etc/systemd/logind.conf.d/*.conf",
)


def remove_ipc(root: Path, uid: int) -> Check:
    """systemd-logind deletes a login user's shared memory at the end of the last session: with it every slot."""
    name = "RemoveIPC"
    if uid < _FIRST_LOGIN_UID:
        return Check(name, "ok", f"uid {uid} is a system user's: its shared memory is left alone")
    if not (root / "run/systemd/system").is_dir():
        return Check(name, "ok", "systemd does not run here")
    if _lingers(root, uid):
        return Check(name, "ok", f"uid {uid} lingers: its sessions never all end")
    value, where = "yes", "systemd's default"
    for pattern in _LOGIND_FILES:
        for file in sorted(root.glob(pattern)):
            for text in file.read_text(errors="replace").splitlines():
                key, separator, setting = text.partition("=")
                if separator and key.strip() == "RemoveIPC":
                    value, where = setting.strip().lower(), str(file)
    if value in ("no", "false", "off", "0"):
        return Check(name, "ok", f"RemoveIPC={value} ({where})")
    return Check(
        name,
        "fail",
        f"RemoveIPC={value} ({where}): logging out of the last session of uid {uid} deletes its shared memory",
        "RemoveIPC=no in /etc/systemd/logind.conf.d/ckptd.conf, `loginctl enable-linger`, or a system user",
    )


def _lingers(root: Path, uid: int) -> bool:
    try:
        return (root / "var/lib/systemd/linger" / pwd.getpwuid(uid).pw_name).exists()
    except KeyError:
        return False  # a uid without a name cannot have been told to linger


def fork_support(environment: Mapping[str, str]) -> Check:
    """With RPC threads busy gRPC's fork handlers hang DataLoader workers for ever."""
    value = environment.get("GRPC_ENABLE_FORK_SUPPORT")
    if value is None or value.lower() in ("0", "false"):
        return Check("gRPC and fork", "ok", f"GRPC_ENABLE_FORK_SUPPORT is {'not set' if value is None else value}")
    return Check(
        "gRPC and fork",
        "warn",
        f"GRPC_ENABLE_FORK_SUPPORT={value}: DataLoader workers that fork may hang",
        "unset it, or set it to 0, where trainers start",
    )


def open_files() -> Check:
    """A slot is a file that the daemon keeps open, and every rank holds connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= _FEWEST_FILES:
        return Check("open files", "ok", f"limit {soft} (hard {hard})")
    return Check("open files", "warn", f"limit {soft} (hard {hard})", f"ulimit -n {_FEWEST_FILES}, or LimitNOFILE=")


def versions() -> Check:
    """What is installed beside this CLI; torch is for trainers, so it may be absent on a node."""
    found = {"ckptd": ckptd.__version__, "python": platform.python_version()}
    for package in ("grpcio", "zarr", "torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    text = ", ".join(f"{package} {number}" for package, number in found.items())
    missing = [package for package in ("grpcio", "zarr") if found[package] == "absent"]
    if missing:
        return Check("versions", "fail", text, "pip install 'ckptd[daemon]'")
    return Check("versions", "ok", text)


def socket_folder(socket: Path, uid: int) -> Check:
    """Who may write to the folder may put a socket of theirs in the daemon's place."""
    folder = socket.parent
    if not folder.exists():
        above = next(path for path in folder.parents if path.exists())
        if os.access(above, os.W_OK):
            return Check("socket folder", "ok", f"{folder} does not exist; serve makes it")
        return Check(
            "socket folder", "fail", f"{folder} does not exist and {above} may not be written", "choose --socket"
        )
    status = folder.stat()
    found = f"{folder}: mode {stat.S_IMODE(status.st_mode):04o}, owner uid {status.st_uid}"
    if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
        return Check("socket folder", "fail", f"{found}: anyone may replace the socket", f"chmod o-w {folder}")
    if not os.access(folder, os.W_OK):
        return Check(
            "socket folder", "warn", f"{found}: uid {uid} may not serve here", "serve as its owner, or choose --socket"
        )
    return Check("socket folder", "ok", found)
