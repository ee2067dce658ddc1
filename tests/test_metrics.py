"""Metrics: names by Prometheus practice, bounded labels, instances that share nothing, the file that documents them."""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

import ckptd
from ckptd.errors import CkptdError
from ckptd.metrics import Metrics

DOC = Path(__file__).parents[1] / "docs" / "METRICS.md"


OPENMETRICS = "application/openmetrics-text;version=1.0.0;q=0.8,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"


def metrics_of(*runs: str) -> Metrics:
    metrics = Metrics()
    for run in runs:
        metrics.begin_run(run)
    return metrics


def samples(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    body, _ = metrics.render(OPENMETRICS)
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


def test_what_is_counted_is_rendered() -> None:
    metrics = metrics_of("gpt")
    metrics.bytes_total.labels("gpt", "captured", "memory").inc(5)
    metrics.stall_seconds.labels("gpt").observe(0.02)
    found = samples(metrics)
    assert found["ckptd_bytes_total", frozenset({("run", "gpt"), ("direction", "captured"), ("tier", "memory")})] == 5
    assert found["ckptd_stall_seconds_count", frozenset({("run", "gpt")})] == 1


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("", "text/plain; version=0.0.4"),
        ("*/*", "text/plain; version=0.0.4"),
        ("text/html,application/xml;q=0.9", "text/plain; version=0.0.4"),
        (OPENMETRICS, "application/openmetrics-text; version=1.0.0"),
    ],
)
def test_the_page_is_openmetrics_for_who_asks_for_it_and_plain_text_for_all_others(
    accept: str, content_type: str
) -> None:
    body, kind = metrics_of("gpt").render(accept)
    assert kind.startswith(content_type)
    assert body.endswith(b"# EOF\n") == kind.startswith("application/openmetrics-text")


@pytest.mark.parametrize("accept", ["", OPENMETRICS])
def test_no_series_tells_when_another_was_created(accept: str) -> None:
    metrics = metrics_of("gpt")
    metrics.stall_seconds.labels("gpt").observe(1)
    assert b"_created" not in metrics.render(accept)[0]


def test_what_is_not_known_has_no_series() -> None:
    metrics = metrics_of("gpt")
    metrics.step_seconds.labels("gpt").set(math.nan)
    assert not [key for key in samples(metrics) if key[0] == "ckptd_step_seconds"]
    metrics.step_seconds.labels("gpt").set(0.5)
    assert samples(metrics)["ckptd_step_seconds", frozenset({("run", "gpt")})] == 0.5


def test_promtool_has_nothing_to_say_of_any_metric() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("needs promtool: apt install prometheus")
    metrics = metrics_of("gpt")
    for metric, names in metrics._all:
        if names and metric is not metrics.build:
            metric.labels(*["gpt" if name == "run" else "x" for name in names])
    found = subprocess.run([promtool, "check", "metrics"], input=metrics.render()[0], capture_output=True, check=False)
    assert (found.returncode, found.stdout, found.stderr) == (0, b"", b"")


def test_the_build_names_the_version_and_the_formats() -> None:
    ((_, labels),) = [key for key in samples(Metrics()) if key[0] == "ckptd_build_info"]
    assert dict(labels)["version"] == ckptd.__version__
    assert {"slot_format", "index_format", "manifest_format"} <= dict(labels).keys()


def test_two_daemons_in_one_process_share_no_count() -> None:
    one, other = metrics_of("gpt"), metrics_of("gpt")
    one.torn_total.labels("gpt").inc()
    of_run = frozenset({("run", "gpt")})
    assert samples(one)["ckptd_torn_total", of_run] == 1
    assert samples(other)["ckptd_torn_total", of_run] == 0


def test_what_alerts_count_begins_at_zero() -> None:
    found = samples(metrics_of("gpt"))
    for name, labels in (
        ("ckptd_corrupt_total", {"place": "memory"}),
        ("ckptd_commits_total", {"result": "failed"}),
        ("ckptd_skips_total", {"reason": "NoSlot"}),
        ("ckptd_dead_steps_total", {}),
    ):
        assert found[name, frozenset({"run": "gpt", **labels}.items())] == 0


def test_every_reason_that_begins_at_zero_is_a_class_of_errors() -> None:
    reasons = {dict(labels)["reason"] for name, labels in samples(metrics_of("gpt")) if name == "ckptd_skips_total"}
    assert reasons
    assert reasons <= CkptdError.registry.keys()


def test_a_forgotten_run_leaves_no_series_and_others_stay() -> None:
    metrics = metrics_of("gone", "stays")
    for run in ("gone", "stays"):
        metrics.bytes_total.labels(run, "captured", "memory").inc()
        metrics.bytes_total.labels(run, "drained", "shared-file").inc()
        metrics.stall_seconds.labels(run).observe(1)
        metrics.snapshot_step.labels(run, "staged").set(3)
        metrics.skips_total.labels(run, "NoSlot").inc()
    before = samples(metrics)
    metrics.forget_run("gone")
    after = samples(metrics)
    assert {key for key in before if ("run", "gone") not in key[1]} == after.keys()
    metrics.forget_run("gone")
    assert samples(metrics).keys() == after.keys()


def test_what_comes_late_of_a_run_that_has_ended_is_not_shown_then_or_later() -> None:
    metrics = metrics_of("gpt")
    metrics.forget_run("gpt")
    metrics.torn_total.labels("gpt").inc()
    assert not [key for key in samples(metrics) if ("run", "gpt") in key[1]]
    metrics.begin_run("gpt")
    assert samples(metrics)["ckptd_torn_total", frozenset({("run", "gpt")})] == 0


def test_a_run_that_is_begun_again_by_a_later_start_goes_on_counting() -> None:
    metrics = metrics_of("gpt")
    metrics.torn_total.labels("gpt").inc()
    metrics.begin_run("gpt")
    assert samples(metrics)["ckptd_torn_total", frozenset({("run", "gpt")})] == 1


def test_names_and_labels_keep_to_the_rules() -> None:
    metrics = Metrics()
    families = [f for f in metrics.registry.collect() if not f.name.startswith("process_")]
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


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("application/openmetrics-text;version=abc", "application/openmetrics-text; version=1.0.0"),
        ("application/openmetrics-text;version=99.1;escaping=x,*/*", "application/openmetrics-text; version=1.0.0"),
        ("APPLICATION/OpenMetrics-Text", "application/openmetrics-text; version=1.0.0"),
        ("text/plain;version=abc;escaping=", "text/plain; version=0.0.4"),
        (", ;;=, \xff", "text/plain; version=0.0.4"),
    ],
)
def test_whatever_is_asked_of_a_format_there_is_a_page(accept: str, kind: str) -> None:
    body, content_type = metrics_of("gpt").render(accept)
    assert content_type.startswith(kind)
    assert body.endswith(b"# EOF\n") == content_type.startswith("application/")
