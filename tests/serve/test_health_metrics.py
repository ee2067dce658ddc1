"""How the node is, as series: what was read, nothing that was not, and events long enough to be scraped."""

from __future__ import annotations

from collections.abc import Mapping

from metrics_page import Page

from ckptd.detect.health import HELD, Health
from ckptd.health.monitor import INTERVAL_S, Snapshot
from ckptd.metrics import Metrics
from ckptd.serve.diagnosis.health_gauges import HealthGauges

GPU = "0000:3b:00"


class Shown:
    """What a node shows of samples that are told."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self._gauges = HealthGauges(self.metrics)

    def see(self, figures: Mapping[str, float], at_s: float = 10.0, health: Health | None = None) -> Page:
        self._gauges.show(Snapshot(health or Health(), figures, {}, at_s), at_s + 1)
        return Page(self.metrics)


def test_figures_that_were_not_read_have_no_series() -> None:
    page = Shown().see({})
    assert not [name for name in page.names if name.startswith(("ckptd_node_cpu", "ckptd_node_mem", "ckptd_node_tcp"))]
    assert not page.labels("ckptd_node_pressure_ratio")


def test_figures_of_the_node_are_shown_in_base_units() -> None:
    page = Shown().see(
        {
            "cpu_steal_share": 0.25,
            "memory_available_share": 0.5,
            "tcp_retransmit_share": 0.01,
            "io_pressure_share": 0.125,
            "disk_latency_s{nvme0n1}": 0.002,
        },
        health=Health(0.75, ("cpu steal",), {"cpu_steal_share": 0.9}, is_learned=True),
    )
    assert page.value("ckptd_node_cpu_steal_ratio") == 0.25
    assert page.value("ckptd_node_memory_available_ratio") == 0.5
    assert page.value("ckptd_node_tcp_retransmit_ratio") == 0.01
    assert page.value("ckptd_node_pressure_ratio", resource="io") == 0.125
    assert page.value("ckptd_node_disk_latency_seconds", device="nvme0n1") == 0.002
    assert page.value("ckptd_node_health_score") == 0.75
    assert page.value("ckptd_node_health_severity", figure="cpu_steal_share") == 0.9
    assert page.value("ckptd_node_health_learned") == 1


def test_of_many_peers_only_the_farthest_and_the_median_are_shown() -> None:
    page = Shown().see({f"tcp_peer_rtt_s{{10.0.0.{peer}}}": peer / 1000 for peer in range(1, 64)})
    assert page.value("ckptd_node_peer_round_trip_seconds", of="farthest") == 0.063
    assert page.value("ckptd_node_peer_round_trip_seconds", of="median") == 0.032
    assert len(page.labels("ckptd_node_peer_round_trip_seconds")) == 2


def test_series_of_a_device_or_gpu_that_is_gone_go() -> None:
    shown = Shown()
    shown.see({"disk_latency_s{sda}": 0.1, f"gpu_temperature_c{{{GPU}}}": 60.0, f"gpu_clock_hz{{{GPU}}}": 1.9e9})
    page = shown.see({"disk_latency_s{sdb}": 0.1}, 15.0)
    assert page.labels("ckptd_node_disk_latency_seconds") == [{"device": "sdb"}]
    assert not page.labels("ckptd_gpu_temperature_celsius")
    assert not page.labels("ckptd_gpu_clock_hertz")


def test_a_gpu_throttles_only_while_it_does() -> None:
    shown = Shown()
    figure = f"gpu_thermal_throttle{{{GPU}}}"
    assert shown.see({figure: 1.0}).value("ckptd_gpu_trouble", gpu=GPU, sign="thermal_throttle") == 1
    assert shown.see({figure: 0.0}, 15.0).value("ckptd_gpu_trouble", gpu=GPU, sign="thermal_throttle") == 0


def test_an_xid_is_shown_of_its_gpu_as_long_as_the_judge_counts_it() -> None:
    shown = Shown()
    shown.see({f"gpu_xid{{79 on GPU {GPU}}}": 1.0, f"gpu_xid{{48 on GPU {GPU}}}": 1.0}, 10.0)
    later = shown.see({"cpu_steal_share": 0.0}, 9.0 + HELD * INTERVAL_S)
    assert later.labels("ckptd_gpu_trouble") == [{"gpu": GPU, "sign": "xid"}]
    assert later.value("ckptd_gpu_trouble", gpu=GPU, sign="xid") == 1
    assert not shown.see({}, 30.0 + HELD * INTERVAL_S).labels("ckptd_gpu_trouble")


def test_the_age_of_figures_grows_when_nothing_is_read_any_more() -> None:
    metrics = Metrics()
    gauges, last = HealthGauges(metrics), Snapshot(at_s=100.0)
    gauges.show(Snapshot(), 40.0)
    gauges.show(Snapshot(), 70.0)
    assert Page(metrics).value("ckptd_node_health_age_seconds") == 30  # nothing was ever read: since the start
    gauges.show(last, 100.0)
    gauges.show(last, 175.0)
    assert Page(metrics).value("ckptd_node_health_age_seconds") == 75
