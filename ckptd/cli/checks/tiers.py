"""Check of one tier: there, writable, with room, and how fast it takes durable bytes."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final

from ckptd import files
from ckptd.cli.checks import Check
from ckptd.config import format_size
from ckptd.errors import InvalidRequest
from ckptd.tiers.spec import TierSpec

_MEASURED_BYTES: Final = 64 << 20


def tier(spec: str, wanted_bytes: int) -> Check:
    """``spec`` as ``--tier`` takes it, options and all."""
    try:
        parsed = TierSpec.parse(spec)
    except InvalidRequest as error:
        return Check(f"tier {spec}", "fail", error.message, error.hint or "see docs/CONFIG.md")
    name, path = f"tier {parsed.url}", parsed.path
    if not path.is_dir():
        return Check(name, "warn", f"{path} is no folder", f"mount what belongs there, or mkdir -p {path}")
    if not os.access(path, os.W_OK | os.X_OK):
        return Check(name, "fail", f"{path} may not be written by uid {os.getuid()}", f"chown or chmod {path}")
    status = os.statvfs(path)
    free = status.f_bavail * status.f_frsize
    if free < 2 * _MEASURED_BYTES:
        return Check(name, "fail", f"{format_size(free)} free", "make room, or choose another tier")
    try:
        speed = f"{format_size(free)} free, {_MEASURED_BYTES / _write_seconds(path) / 1e9:.2f} GB/s written and synced"
    except OSError as error:
        return Check(name, "fail", f"{path}: writing failed: {error.strerror}", "mend the file system, or its quota")
    if free < wanted_bytes:
        return Check(name, "warn", f"{speed}; less free than the arena may hold", "make room, or lower keep=")
    return Check(name, "ok", speed)


def _write_seconds(folder: Path) -> float:
    """Seconds to write and fsync a file that no file system can shrink."""
    data = os.urandom(_MEASURED_BYTES)
    file = folder / f".ckptd-doctor-{os.getpid()}"
    try:
        start = time.perf_counter()
        files.write_atomic(file, data)
        return time.perf_counter() - start
    finally:
        file.unlink(missing_ok=True)
