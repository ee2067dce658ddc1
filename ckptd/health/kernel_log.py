"""Reads the errors of GPUs, Xids, that the driver writes to the kernel log. Layer: ``health``, a reader.

Only lines written after the first read count, and only those of the kernel itself: a program may write there as well.
Format: Documentation/ABI/testing/dev-kmsg of Linux. Needs CAP_SYSLOG where ``kernel.dmesg_restrict`` is set.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ckptd.detect.health import name_of

KERNEL_LOG: Final = Path("/dev/kmsg")
# Of the catalogue of Xids those after which the GPU, its memory or its links are not to be trusted: uncorrected ECC
# (48, 94, 95, 140), rows or pages retired or not (63, 64), the GPU's own controllers (62, 119, 120), NVLink (74), off
# the bus (79), too many corrected errors (92). Others (13, 31, 43, 45 ...) are mostly of the program.
FATAL_XIDS: Final = frozenset({48, 62, 63, 64, 74, 79, 92, 94, 95, 119, 120, 140})
_XID: Final = re.compile(r"NVRM: Xid \((?:PCI:)?([0-9a-fA-F:.]+)\): (\d+)")
_RECORD_BYTES: Final = 8192  # the most that the kernel gives at once
_MOST_RECORDS: Final = 4096  # in one read; the rest is of the next


@dataclass(frozen=True, slots=True)
class Xid:
    """``gpu``: its PCI address as the driver writes it, "0000:3b:00"."""

    gpu: str
    code: int

    @property
    def is_fatal(self) -> bool:
        return self.code in FATAL_XIDS


def xid_of(record: str) -> Xid | None:
    """The Xid that a record of the kernel log tells, "PRIORITY,NUMBER,...;text"; None when it tells none."""
    head, _, text = record.partition(";")
    priority = head.partition(",")[0]
    # Above the three bits of the level is the facility: 0 is the kernel.
    if not priority.isdecimal() or int(priority) >> 3:
        return None
    match = _XID.search(text)
    return Xid(match[1].lower(), int(match[2])) if match else None


class KernelLogSource:
    """``gpu_xid{CODE on GPU ADDRESS}``: how many fatal Xids came since the last read."""

    name = "kernel log"

    def __init__(self, path: Path = KERNEL_LOG) -> None:
        self.unread: dict[str, str] = {}
        self._path = path
        self._fd: int | None = None

    def read(self) -> dict[str, float]:
        if self._fd is None:
            self._fd = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._fd, 0, os.SEEK_END)
        counts: Counter[str] = Counter()
        for _ in range(_MOST_RECORDS):
            records = self._next(self._fd)
            if not records:
                break
            found = [xid_of(line) for line in records.splitlines()]
            counts.update(name_of("gpu_xid", f"{xid.code} on GPU {xid.gpu}") for xid in found if xid and xid.is_fatal)
        return {name: float(count) for name, count in counts.items()}

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _next(self, fd: int) -> str:
        while True:
            try:
                return os.read(fd, _RECORD_BYTES).decode(errors="replace")
            except BlockingIOError:
                return ""
            except BrokenPipeError:
                continue  # records were overwritten before they were read: the next read gives the oldest that is left
