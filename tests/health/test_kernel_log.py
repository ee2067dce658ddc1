"""Xids in the kernel log: which lines tell one, which are fatal, and that old lines do not count."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.health import kernel_log
from ckptd.health.kernel_log import FATAL_XIDS, KernelLogSource, Xid, xid_of

FALLEN = (
    "3,2001,987654321,-;NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus."
)
REMAPPED = "4,2002,987654400,-;NVRM: Xid (PCI:0000:10:1C): 63, pid=1896, Row Remapper: New row marked for remapping."
PAGE_FAULT = "4,2003,987654500,-;NVRM: Xid (PCI:0000:3b:00): 31, pid=44, name=python, Ch 00000010, MMU Fault"
OLD_DRIVER = "4,2004,987654600,-;NVRM: Xid (0000:03:00): 48, An uncorrectable double bit error (DBE) has been detected"
FORGED = "12,2005,987654700,-;NVRM: Xid (PCI:0000:3b:00): 79, written by a program"
SWITCH = "4,2006,987654800,-;nvidia-nvswitch3: SXid (PCI:0000:05:00.0): 12028, Non-fatal, Link 32"
OTHER = "6,2007,987654900,-;EXT4-fs (vda): mounted filesystem\n SUBSYSTEM=block\n DEVICE=b254:0"


@pytest.mark.parametrize(
    ("record", "xid"),
    [
        (FALLEN, Xid("0000:3b:00", 79)),
        (REMAPPED, Xid("0000:10:1c", 63)),
        (PAGE_FAULT, Xid("0000:3b:00", 31)),
        (OLD_DRIVER, Xid("0000:03:00", 48)),
        (FORGED, None),
        (SWITCH, None),
        (OTHER, None),
        ("NVRM: Xid (PCI:0000:3b:00): 79, no head", None),
        ("", None),
    ],
)
def test_an_xid_is_read_from_what_the_kernel_wrote(record: str, xid: Xid | None) -> None:
    assert xid_of(record) == xid


def test_errors_of_the_program_are_not_fatal() -> None:
    assert not FATAL_XIDS & {13, 31, 43, 45}
    assert Xid("0000:3b:00", 79).is_fatal
    assert not Xid("0000:3b:00", 31).is_fatal


@given(st.text())
def test_no_line_is_too_odd(line: str) -> None:
    xid_of(line)
    xid_of(f"3,1,1,-;{line}")


def append(path: Path, *records: str) -> None:
    with path.open("a") as file:
        file.writelines(f"{record}\n" for record in records)


def test_only_what_is_written_after_the_first_read_counts_and_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "kmsg"
    append(path, FALLEN)
    source = KernelLogSource(path)
    assert source.read() == {}
    append(path, OTHER, REMAPPED, PAGE_FAULT, FORGED, FALLEN, FALLEN)
    assert source.read() == {"gpu_xid{63 on GPU 0000:10:1c}": 1.0, "gpu_xid{79 on GPU 0000:3b:00}": 2.0}
    assert source.read() == {}
    source.close()
    source.close()


def test_records_that_were_overwritten_and_an_empty_log_are_no_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kmsg"
    path.touch()
    source = KernelLogSource(path)
    source.read()
    answers = iter([BrokenPipeError(), FALLEN.encode() + b"\n", BlockingIOError()])

    def read(fd: int, size: int) -> bytes:
        answer = next(answers)
        if isinstance(answer, bytes):
            return answer
        raise answer

    monkeypatch.setattr(kernel_log.os, "read", read)
    assert source.read() == {"gpu_xid{79 on GPU 0000:3b:00}": 1.0}
    monkeypatch.undo()
    source.close()


def test_a_log_that_is_absent_or_not_permitted_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError):
        KernelLogSource(tmp_path / "kmsg").read()

    def refuse(path: Path, flags: int) -> int:
        raise PermissionError(1, "Operation not permitted", os.fspath(path))

    monkeypatch.setattr(kernel_log.os, "open", refuse)
    with pytest.raises(PermissionError):
        KernelLogSource(tmp_path / "kmsg").read()
