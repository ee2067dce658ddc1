"""Metrics: names by Prometheus practice, bounded labels, instances that share nothing, the file that documents them."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

import ckptd
from ckptd.metrics import Metrics

DOC = Path(__file__).parents[1] / "docs" / "METRICS.md"


def samples(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    body, _ = metrics.render()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


def test_what_is_counted_is_rendered_as_openmetrics() -> None:
    metrics = Metrics()
    metrics.bytes_total.labels("gpt", "captured").inc(5)
    metrics.stall_seconds.labels("gpt").observe(0.02)
    found = samples(metrics)
    assert found["ckptd_bytes_total", frozenset({("run", "gpt"), ("direction", "captured")})] == 5
    assert found["ckptd_stall_seconds_count", frozenset({("run", "gpt")})] == 1
    assert metrics.render()[1].startswith("application/openmetrics-text")


def test_the_build_names_the_version_and_the_formats() -> None:
    ((_, labels),) = [key for key in samples(Metrics()) if key[0] == "ckptd_build_info"]
    assert dict(labels)["version"] == ckptd.__version__
    assert {"slot_format", "index_format", "manifest_format"} <= dict(labels).keys()


def test_two_daemons_in_one_process_share_no_count() -> None:
    one, other = Metrics(), Metrics()
    one.torn_total.labels("gpt").inc()
    assert b'run="gpt"' not in other.render()[0]


def test_a_forgotten_run_leaves_no_series_and_others_stay() -> None:
    metrics = Metrics()
    for run in ("gone", "stays"):
        metrics.bytes_total.labels(run, "captured").inc()
        metrics.bytes_total.labels(run, "drained").inc()
        metrics.stall_seconds.labels(run).observe(1)
        metrics.snapshot_step.labels(run, "staged").set(3)
        metrics.skips_total.labels(run, "NoSlot").inc()
    before = samples(metrics)
    metrics.forget_run("gone")
    after = samples(metrics)
    assert {key for key in before if ("run", "gone") not in key[1]} == after.keys()
    metrics.forget_run("gone")
    assert samples(metrics).keys() == after.keys()


def test_names_and_labels_keep_to_the_rules() -> None:
    metrics = Metrics()
    families = list(metrics.registry.collect())
    assert len(families) >= 20
    for family in families:
        assert family.name.startswith("ckptd_"), family.name
        assert family.documentation.endswith("."), family.name
        assert not family.name.endswith(("_ms", "_mb", "_kib", "_gib")), f"{family.name}: base units only"
    for banned in ("step", "tensor", "path", "slot", "pid"):
        assert f"`{banned}`" not in metrics.markdown()


@pytest.mark.parametrize("series", ["ckptd_stall_seconds", "ckptd_skips_total", "ckptd_build_info", "ckptd_slots"])
def test_the_document_names_series_as_they_are_scraped(series: str) -> None:
    assert f"| `{series}` |" in Metrics().markdown()


def test_the_document_is_what_the_code_prints() -> None:
    assert DOC.read_text() == Metrics().markdown(), "run: python -m ckptd.metrics > docs/METRICS.md"
