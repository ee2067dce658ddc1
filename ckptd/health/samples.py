"""What a source of samples is, and figures from two of its samples: the seam between reading a node and judging it.

Layer: ``health``, below its readers and its monitor. Pure. Invariants: what could not be read is absent, never zero; a
counter that went back (a reset, a device replaced) says nothing until its next sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from ckptd.detect.health import name_of, split_name

COUNTER: Final = "_total"


class Source(Protocol):
    """One thing of the node that can be read.

    Called by one thread only. ``read`` may be called again after it raised: it then opens anew what it had open.
    """

    name: str
    # What this machine does not offer although the source as a whole can be read: why, by family of figures.
    unread: dict[str, str]

    def read(self) -> dict[str, float]:
        """Values by name, ``family`` or ``family{label}``, in SI units; shares from 0 to 1.

        A family that ends in ``_total`` is a counter that only rises, since whenever: only differences of it mean
        something, see ``RATES``. All others are gauges: figures as they are. A name that is absent could not be read
        or has nothing to say now (a disk without requests). It must not block for long: a second at most.

        Raises:
            OSError: nothing of it can be read; the message says why (not present, not permitted).
        """
        ...

    def close(self) -> None:
        """Release what ``read`` opened; more than once is harmless."""
        ...


@dataclass(frozen=True, slots=True)
class Rate:
    """A figure that is the growth of one counter by that of another with the same label, or by time (``per`` is "").
    Where ``per`` grew by less than ``least`` the quotient says nothing."""

    figure: str
    counter: str
    per: str = ""
    least: float = 0.0


RATES: Final = (
    Rate("cpu_steal_share", "cpu_steal_s_total", "cpu_s_total"),
    Rate("cpu_pressure_share", "cpu_pressure_s_total"),
    Rate("memory_pressure_share", "memory_pressure_s_total"),
    Rate("io_pressure_share", "io_pressure_s_total"),
    Rate("memory_major_faults_per_s", "memory_major_faults_total"),
    Rate("disk_latency_s", "disk_requests_s_total", "disk_requests_total", least=20),
    Rate("tcp_retransmit_share", "tcp_retransmits_total", "tcp_segments_total", least=1000),
    Rate("tcp_peer_retransmit_share", "tcp_peer_retransmits_total", "tcp_peer_segments_total", least=1000),
    Rate("tcp_peer_delivery_bytes_s", "tcp_peer_acked_bytes_total", "tcp_peer_busy_s_total", least=0.01),
    Rate("gpu_pcie_replays_per_s", "gpu_pcie_replays_total"),
    Rate("gpu_nvlink_errors_per_s", "gpu_nvlink_errors_total"),
    Rate("gpu_ecc_uncorrected_per_s", "gpu_ecc_uncorrected_total"),
)
_RATE_OF: Final[Mapping[str, Rate]] = {rate.counter: rate for rate in RATES}


def figures_between(before: Mapping[str, float], after: Mapping[str, float], elapsed_s: float) -> dict[str, float]:
    """The gauges of ``after`` and the rates of its counters since ``before``, which was ``elapsed_s`` earlier."""
    figures = {}
    for name, value in after.items():
        family, label = split_name(name)
        if not family.endswith(COUNTER):
            figures[name] = value
        elif family in _RATE_OF and name in before:
            rate = _RATE_OF[family]
            growth, base = value - before[name], elapsed_s
            if rate.per:
                per = name_of(rate.per, label)
                base = after.get(per, 0.0) - before.get(per, 0.0)
            if growth >= 0 and base > 0 and base >= rate.least:
                figures[name_of(rate.figure, label)] = growth / base
    return figures
