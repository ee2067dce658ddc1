"""Readers of ``/proc``: what they take from its files, and that what is not there is said, never zero."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ckptd.health.samples import Source
from ckptd.health.system import CpuSource, DiskSource, MemorySource, PressureSource, TcpSource

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
STAT = """\
cpu  100 1 50 800 20 3 4 60 7 8
cpu0 50 1 25 400 10 3 2 30 7 8
intr 12345
"""
MEMINFO = """\
MemTotal:       16000000 kB
MemFree:         1000000 kB
MemAvailable:    4000000 kB
HugePages_Total:       0
"""
VMSTAT = "pgfault 999\npgmajfault 42\npgmajfault_other 7\n"
PRESSURE = {
    what: f"some avg10=0.0 avg60=0.5 avg300=4.4 total={some_us}\nfull avg10=0.0 avg60=0.1 avg300=0.2 total={full_us}\n"
    for what, some_us, full_us in (("cpu", 5000000, 1), ("memory", 9000000, 250000), ("io", 8000000, 1500000))
}
DISKSTATS = """\
   7       0 loop0 11 0 0 22 0 0 0 0 0 0 0 0 0 0 0 0 0
 259       0 nvme0n1 600 26 18497890 1200 1400 516 576841480 2800 0 296152 4019977 577272 61 557650856 81537 383304 2
 259       1 nvme0n1p1 500 26 18497890 1000 1300 516 576841480 2700 0 296152 4019977
 253       0 dm-0 600 26 18497890 1200 1400 516 576841480 2800 0 296152 4019977
"""
SNMP = """\
Ip: Forwarding DefaultTTL
Ip: 1 64
Tcp: RtoAlgorithm RtoMin RtoMax MaxConn ActiveOpens InSegs OutSegs RetransSegs InErrs
Tcp: 1 200 120000 -1 103910 21034565 21031307 39443 0
Udp: InDatagrams
Udp: 5
"""


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    proc = tmp_path / "proc"
    files = {"stat": STAT, "meminfo": MEMINFO, "vmstat": VMSTAT, "diskstats": DISKSTATS, "net/snmp": SNMP}
    for name, text in (files | {f"pressure/{what}": text for what, text in PRESSURE.items()}).items():
        (proc / name).parent.mkdir(parents=True, exist_ok=True)
        (proc / name).write_text(text)
    return proc


@pytest.fixture
def block(tmp_path: Path) -> Path:
    block = tmp_path / "block"
    (block / "nvme0n1" / "device").mkdir(parents=True)
    (block / "loop0").mkdir()
    (block / "dm-0").mkdir()
    return block


def test_steal_is_told_beside_all_time_in_which_guests_are_not_counted_twice(proc: Path) -> None:
    values = CpuSource(proc).read()
    assert values == pytest.approx({"cpu_s_total": 1038 * TICK_S, "cpu_steal_s_total": 60 * TICK_S})


def test_pressure_is_some_of_cpus_and_all_of_memory_and_disks(proc: Path) -> None:
    values = PressureSource(proc).read()
    assert values == pytest.approx(
        {"cpu_pressure_s_total": 5.0, "memory_pressure_s_total": 0.25, "io_pressure_s_total": 1.5}
    )


def test_memory_is_what_can_be_had_and_faults_those_that_went_to_a_disk(proc: Path) -> None:
    assert MemorySource(proc).read() == {"memory_available_share": 0.25, "memory_major_faults_total": 42}


def test_only_disks_with_a_device_are_told(proc: Path, block: Path) -> None:
    values = DiskSource(proc, block).read()
    assert values == {"disk_requests_total{nvme0n1}": 2000, "disk_requests_s_total{nvme0n1}": 4.0}


def test_tcp_is_read_by_the_names_of_its_columns(proc: Path) -> None:
    assert TcpSource(proc).read() == {"tcp_segments_total": 21031307, "tcp_retransmits_total": 39443}


@pytest.mark.parametrize("source", [CpuSource, PressureSource, MemorySource, DiskSource, TcpSource])
def test_what_is_not_present_is_an_error_that_names_the_file(source: type, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as raised:
        source(tmp_path).read()
    assert str(tmp_path) in str(raised.value.filename)


@pytest.mark.parametrize(
    ("source", "file", "text"),
    [
        (CpuSource, "stat", "cpu  100 1 50 800\n"),
        (CpuSource, "stat", "intr 1\n"),
        (PressureSource, "pressure/memory", "some avg10=0.00 avg60=0.00 avg300=0.00 total=9\n"),
        (MemorySource, "meminfo", "MemTotal: 16 kB\nMemFree: 1 kB\n"),
        (MemorySource, "vmstat", "pgfault 999\n"),
        (DiskSource, "diskstats", "   7       0 loop0 11 0 0 22 0 0 0 0 0 0 0\n"),
    ],
)
def test_a_kernel_that_does_not_tell_is_an_error_and_not_zero(proc: Path, source: type, file: str, text: str) -> None:
    (proc / file).write_text(text)
    with pytest.raises(OSError, match=file.split("/")[-1]):
        source(proc).read()


@pytest.mark.parametrize("source_type", [CpuSource, MemorySource, TcpSource])
def test_the_real_files_of_this_kernel_are_understood(source_type: type) -> None:
    source: Source = source_type()
    first, second = source.read(), source.read()
    assert first.keys() == second.keys()
    assert all(second[name] >= first[name] for name in first if name.endswith("_total"))
    source.close()
