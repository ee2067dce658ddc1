"""The page of real daemons with real jobs: every metric is fed, by whom it should be, and goes with its run."""

from __future__ import annotations

import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from harness import Nursery, Stage, wait_until
from metrics_page import Page, wait_value
from timing_ranks import TimingJob

from ckptd.format.blocks import HEADER_BYTES
from ckptd.metrics import Metrics
from ckptd.model import SnapshotId
from ckptd_api.convert import incarnation_to_pb
from ckptd_api.v1 import node_pb2

STEP_S = 0.02
# What a job that is well, on a machine like this, does not feed; the test that does.
FED_ELSEWHERE = {
    "ckptd_fault": "tests/peers/test_faults_of_runs.py",
    "ckptd_faults": "tests/peers/test_faults_of_runs.py",
    "ckptd_fault_actions": "tests/peers/test_faults_of_runs.py",
    "ckptd_gpu_clock_hertz": "test_health_metrics.py",
    "ckptd_gpu_temperature_celsius": "test_health_metrics.py",
    "ckptd_gpu_trouble": "test_health_metrics.py",
    "ckptd_node_cpu_steal_ratio": "test_health_metrics.py",
    "ckptd_node_disk_latency_seconds": "test_health_metrics.py",
    "ckptd_node_health_severity": "test_health_metrics.py",
    "ckptd_node_memory_available_ratio": "test_health_metrics.py",
    "ckptd_node_peer_round_trip_seconds": "test_health_metrics.py",
    "ckptd_node_pressure_ratio": "test_health_metrics.py",
    "ckptd_node_tcp_retransmit_ratio": "test_health_metrics.py",
}


class Seen(NamedTuple):
    """Pages: of a daemon with a trainer, and of two with a job over both."""

    alone: Page
    pair: tuple[Page, Page]

    @property
    def all(self) -> tuple[Page, ...]:
        return self.alone, *self.pair


@pytest.fixture(scope="module")
def seen(nursery: Nursery) -> Iterator[Seen]:
    stage = Stage(nursery)
    try:
        yield Seen(of_a_trainer(stage), of_two_nodes(stage))
    finally:
        stage.close()


def flip(folder: Path, pattern: str) -> None:
    """One bit of the payload of the only file in ``folder`` of that name."""
    (path,) = folder.glob(pattern)
    with path.open("r+b") as file:
        file.seek(HEADER_BYTES + 70_000)
        byte = file.read(1)[0]
        file.seek(HEADER_BYTES + 70_000)
        file.write(bytes([byte ^ 1]))


def of_a_trainer(stage: Stage) -> Page:
    daemon = stage.tier_daemon(http=True)
    stage.trainer(daemon, "--free", "--step-s", STEP_S)
    wait_value(daemon, 2, "ckptd_commits_total", run="tiny", result="committed")
    wait_value(daemon, 2, "ckptd_stall_seconds_count", run="tiny")
    wait_value(daemon, 1e-9, "ckptd_snapshot_interval_seconds", run="tiny", level="staged")
    return wait_value(daemon, 1e-9, "ckptd_step_seconds", run="tiny")


def of_two_nodes(stage: Stage) -> tuple[Page, Page]:
    """Protected, made durable, verified, restored, timed."""
    env = {"CKPTD_SCRUB_EVERY": "0.2"}
    first, second = (stage.tier_daemon(http=True, listen=True, wait=False, env=env) for _ in range(2))
    for daemon in (first, second):
        daemon.wait_ready()
    job = TimingJob([first, second], protect="1+1")
    for step in (1, 2):
        job.save(step)
        job.wait_protected(step)
    job.run_steps(3)
    for rank in job.ranks:
        job.fetch(rank, SnapshotId(job.incarnation, 2))
    assert first.cli("verify", job.run).rc in (0, 3, 4)  # the two tiers are not one: nothing is committed
    wait_value(first, 1, "ckptd_bytes_total", run=job.run, direction="scrubbed", tier="memory")
    wait_value(first, 1, "ckptd_timing_coverage_ratio", run=job.run)
    pages = (
        wait_value(first, 1, "ckptd_losses_tolerated", run=job.run),
        wait_value(second, 1, "ckptd_losses_tolerated", run=job.run),
    )
    job.close()
    return pages


# --- all of it ----------------------------------------------------------------------------------------------------
def test_every_metric_is_fed(seen: Seen) -> None:
    shown = set().union(*(page.names for page in seen.all))
    unfed = {
        family.name
        for family in Metrics().registry.collect()
        if not {family.name + suffix for suffix in ("", "_total", "_count", "_info")} & shown
    }
    assert unfed <= FED_ELSEWHERE.keys()


def test_promtool_has_nothing_to_say_of_a_real_page(seen: Seen) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("needs promtool: apt install prometheus")
    for page in seen.all:
        found = subprocess.run([promtool, "check", "metrics"], input=page.text, capture_output=True, text=True)
        assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


def test_label_values_are_few_and_name_no_path_step_or_number(seen: Seen) -> None:
    free = {"run", "node", "address", "version", "device", "le"}
    for page in seen.all:
        for name, labels in page.samples:
            for label, value in labels:
                assert "/" not in value, (name, label, value)
                assert label in free or label.endswith("_format") or re.fullmatch(r"[A-Za-z_-]+", value), (name, value)
        assert len(page.samples) < 1000


def test_the_page_is_openmetrics_when_prometheus_asks_for_it(stage: Stage) -> None:
    daemon = stage.daemon(http=True)
    accept = {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"}
    for headers, kind in ((accept, "application/openmetrics-text"), ({}, "text/plain; version=0.0.4")):
        request = urllib.request.Request(f"http://{daemon.http}/metrics", headers=headers)
        with urllib.request.urlopen(request, timeout=5) as reply:
            assert reply.headers["Content-Type"].startswith(kind)
            assert b"ckptd_build_info" in reply.read()


# --- a trainer ----------------------------------------------------------------------------------------------------
def test_a_client_without_a_port_has_its_figures_at_the_daemon(seen: Seen) -> None:
    page = seen.alone
    assert page.value("ckptd_step_seconds", run="tiny") >= STEP_S  # type: ignore[operator]
    captured = page.value("ckptd_capture_seconds_count", run="tiny")
    assert captured == page.value("ckptd_seal_seconds_count", run="tiny")
    assert page.value("ckptd_capture_seconds_sum", run="tiny") > 0  # type: ignore[operator]


def test_levels_have_their_usual_interval(seen: Seen) -> None:
    for level in ("staged", "durable"):
        found = seen.alone.value("ckptd_snapshot_interval_seconds", run="tiny", level=level)
        assert found is None or STEP_S / 2 < found < 60, level
    assert seen.alone.value("ckptd_snapshot_interval_seconds", run="tiny", level="staged")


def test_bytes_tell_the_tier_they_went_to(seen: Seen) -> None:
    for direction, tier in (("captured", "memory"), ("drained", "shared-file")):
        assert seen.alone.value("ckptd_bytes_total", run="tiny", direction=direction, tier=tier)
    for direction in ("protected", "served", "restored", "verified", "scrubbed"):
        assert seen.pair[0].value("ckptd_bytes_total", run="shards", direction=direction, tier="memory"), direction


def test_on_one_node_there_are_no_losses_to_plan_for(seen: Seen) -> None:
    assert seen.alone.value("ckptd_losses_planned", run="tiny") is None
    assert seen.alone.value("ckptd_losses_tolerated", run="tiny") is None


def test_skips_that_the_client_decided_while_the_daemon_was_away_are_told_later(stage: Stage) -> None:
    daemon = stage.daemon(http=True)
    trainer = stage.trainer(daemon, "--free", "--step-s", STEP_S)
    trainer.wait_step(3)
    daemon.kill()
    wait_until(lambda: "skipped" in str(trainer.events[-1].get("skipped")), "steps to be skipped")
    daemon.start()
    page = wait_value(daemon, 1, "ckptd_skips_total", run="tiny", reason="DaemonUnreachable")
    skipped = sum("no daemon answers" in str(event["skipped"]) for event in trainer.of("step"))
    lost = trainer.stderr.count("is lost: ")  # its capture was under way
    assert page.value("ckptd_skips_total", run="tiny", reason="DaemonUnreachable") == skipped + lost


def test_a_refused_slot_is_one_skip_with_its_own_reason(stage: Stage) -> None:
    daemon = stage.daemon(http=True, memory="1MiB")
    trainer = stage.trainer(daemon, "--steps", 3, "--width", 256, "--step-s", 0.2, "--hold-at", 3)
    trainer.wait_event("holding")
    page = wait_value(daemon, 2, "ckptd_skips_total", run="tiny", reason="NoSlot")  # the first had room
    assert sum(v for (name, _), v in page.samples.items() if name == "ckptd_skips_total") == 2


# --- the life of a run --------------------------------------------------------------------------------------------
def test_the_series_of_a_run_go_when_it_ends_and_come_back_with_it(stage: Stage) -> None:
    daemon = stage.tier_daemon(http=True)
    for first in (1, 4):
        trainer = stage.trainer(daemon, "--steps", first + 2, "--wait", "durable", "--hold-at", first + 2)
        trainer.wait_event("holding")
        page = wait_value(daemon, 1, "ckptd_ranks", run="tiny")
        assert page.value("ckptd_commits_total", run="tiny", result="committed") == 3
        trainer.release(first + 2)
        trainer.finish()
        wait_until(lambda: not Page(daemon).of_run("tiny"), "the series of the run to go")
    assert daemon.cli("verify", "tiny").rc == 0
    assert not Page(daemon).of_run("tiny")


def test_a_run_whose_ranks_died_keeps_its_series_without_ranks(stage: Stage) -> None:
    daemon = stage.daemon(http=True)
    trainer = stage.trainer(daemon, "--free", "--step-s", STEP_S)
    wait_value(daemon, 1, "ckptd_ranks", run="tiny")
    wait_value(daemon, 1e-9, "ckptd_step_seconds", run="tiny")
    trainer.kill()
    wait_until(lambda: Page(daemon).value("ckptd_ranks", run="tiny") == 0, "the rank to be missed")
    page = Page(daemon)
    assert page.value("ckptd_snapshot_step", run="tiny", level="staged")
    assert page.value("ckptd_step_seconds", run="tiny") is None


@pytest.mark.slow
def test_a_daemon_that_restarts_keeps_times_and_counts_nothing_again(stage: Stage) -> None:
    daemon = stage.tier_daemon(http=True)
    trainer = stage.trainer(daemon, "--steps", 3, "--wait", "durable", "--hold-at", 3)
    trainer.wait_event("holding")
    before = wait_value(daemon, 3, "ckptd_commits_total", run="tiny", result="committed")
    daemon.restart()
    after = wait_value(daemon, 1, "ckptd_ranks", run="tiny")
    assert after.value("ckptd_dead_steps_total", run="tiny") == 0
    labels = {"run": "tiny", "level": "staged"}
    assert after.value("ckptd_snapshot_step", **labels) == 3
    was, now = (page.value("ckptd_snapshot_timestamp_seconds", **labels) for page in (before, after))
    assert abs(was - now) < 0.5 or now <= was  # type: ignore[operator]


# --- two nodes ----------------------------------------------------------------------------------------------------
def test_one_daemon_coordinates_and_each_hears_of_it(seen: Seen) -> None:
    assert sorted(page.value("ckptd_coordinates", run="shards") or 0 for page in seen.pair) == [0, 1]
    for page in seen.pair:
        assert page.value("ckptd_coordinator_silent_seconds", run="shards") < 10  # type: ignore[operator]
        assert page.value("ckptd_reports_queued", run="shards") is not None


def test_losses_are_planned_by_the_code_and_tolerated_once_protected(seen: Seen) -> None:
    for page in seen.pair:
        assert page.value("ckptd_losses_planned", run="shards") == 1
        assert page.value("ckptd_losses_tolerated", run="shards") == 1


def test_making_a_fragment_is_pulling_and_encoding(seen: Seen) -> None:
    for page in seen.pair:
        made = page.value("ckptd_transfer_seconds_count", run="shards")
        assert made == page.value("ckptd_encode_seconds_count", run="shards")
        assert made is not None
        assert made >= 2
        parts = [page.value(f"ckptd_{part}_seconds_sum", run="shards") for part in ("transfer", "encode", "protect")]
        assert 0 < parts[0] + parts[1] <= parts[2]  # type: ignore[operator]
        assert page.value("ckptd_parity_queued") == 0


def test_each_daemon_names_its_node_and_address(seen: Seen) -> None:
    names = [page.labels("ckptd_node_info")[0] for page in seen.pair]
    assert len({name["node"] for name in names}) == 2
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+", name["address"]) for name in names)


@pytest.mark.slow
def test_a_peers_piece_that_does_not_match_its_checksum_is_counted_once_by_who_pulled_it(stage: Stage) -> None:
    healthy = stage.daemon(http=True, listen=True)
    slow = stage.daemon("--protect-deadline", 2, http=True, listen=True, failpoints="protect.before=sleep:1")
    job = TimingJob([healthy, slow], protect="1+1")
    job.save(1)
    flip(healthy.arena, "shards.*.slot")
    wait_until(lambda: job.not_protected(1), "protection to be given up")
    assert Page(slow).value("ckptd_corrupt_total", run="shards", place="memory") == 1
    job.close()


def test_a_corrupt_copy_that_a_restore_comes_upon_is_counted_once_by_who_pulled_it(stage: Stage) -> None:
    first, second = (stage.daemon(http=True, listen=True) for _ in range(2))
    job = TimingJob([first, second], protect="1+1")
    job.save(1)
    job.wait_protected(1)
    flip(first.arena, "shards.*.slot")
    moved = TimingJob([second, first], protect="1+1")
    assert moved.restore()[1] == {0: "reconstruction", 1: "peer"}
    assert Page(second).value("ckptd_corrupt_total", run="shards", place="memory") == 1
    assert Page(first).value("ckptd_corrupt_total", run="shards", place="memory") == 0
    for done in (job, moved):
        done.close()


@pytest.mark.slow
def test_a_coordinator_that_restarts_makes_no_old_step_new_on_any_daemon(stage: Stage, tmp_path: Path) -> None:
    tiers = [f"file://{tmp_path},every=1,keep=100"]
    daemons = [stage.daemon(http=True, listen=True, tiers=tiers) for _ in range(3)]
    job = TimingJob(daemons, protect="2+1")
    for step in (1, 2, 3):
        job.save(step, persist=True)
        job.wait_protected(step)
        job.wait_durable(step)
    before = [wait_value(daemon, 3, "ckptd_commits_total", run=job.run, result="committed") for daemon in daemons]
    daemons[0].kill()
    for daemon in daemons[1:]:  # what is on a node that is silent counts as lost, the coordinator's too
        wait_until(lambda daemon=daemon: Page(daemon).value("ckptd_losses_tolerated", run=job.run) == 0, "a loss")  # type: ignore[misc]
    daemons[0].start()
    job.rejoin(daemons[0])
    job.wait_protected(3)
    job.wait_durable(3)
    for daemon, was in zip(daemons, before, strict=True):
        now = wait_value(daemon, 1, "ckptd_losses_tolerated", run=job.run)
        for level in ("staged", "protected", "durable"):
            labels = {"run": job.run, "level": level}
            assert now.value("ckptd_snapshot_step", **labels) == 3
            old, new = (page.value("ckptd_snapshot_timestamp_seconds", **labels) for page in (was, now))
            assert new <= old, level  # type: ignore[operator]
        committed = now.value("ckptd_commits_total", run=job.run, result="committed")
        assert committed == (0 if daemon is daemons[0] else 3)
    job.close()


# --- who may say what ---------------------------------------------------------------------------------------------
def test_a_reason_that_is_no_class_of_errors_makes_no_series(stage: Stage) -> None:
    daemon = stage.daemon(http=True, listen=True)
    job = TimingJob([daemon])
    request = node_pb2.ReportPaceRequest(run=job.run, incarnation=incarnation_to_pb(job.incarnation), step_seconds=0.5)
    request.skipped.update({f"Reason{number}": 1 for number in range(50)} | {"Torn": 2})
    job.ranks[0].call("ReportPace", request)
    page = Page(daemon)
    assert page.value("ckptd_skips_total", run=job.run, reason="CkptdError") == 50
    assert page.value("ckptd_torn_total", run=job.run) == 2
    assert not [labels for labels in page.labels("ckptd_skips_total") if labels["reason"].startswith("Reason")]
    job.close()
