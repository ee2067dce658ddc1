"""The rules for Prometheus and Alertmanager: they load, fire and resolve as told, and name only what exists."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
import yaml

from ckptd.detect.records import Confidence, Kind
from ckptd.metrics import Metrics

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
RUNBOOKS = ROOT / "docs" / "runbooks"
RULE_TESTS = sorted(PROMETHEUS.glob("tests/*.yml"))
URL = "https://github.com/ckptd/ckptd/blob/main/docs/runbooks/"
SEVERITIES = {"critical", "warning", "info"}
SUFFIXES = {"counter": ("_total",), "info": ("_info",), "histogram": ("_bucket", "_sum", "_count")}
OF_PROMETHEUS = {"up", "ALERTS"}
DEADLINE_S = 60


def rules_of(name: str) -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load((PROMETHEUS / name).read_text())["groups"] for rule in group["rules"]]


ALERTS, RECORDS = rules_of("alerts.yml"), rules_of("recording.yml")
NAMES = sorted({rule["alert"] for rule in ALERTS})


def kebab(alert: str) -> str:
    return "-".join(re.findall(r"[A-Z][a-z]+", alert.removeprefix("Ckptd"))).lower()


def command(*words: str | Path, cwd: Path = PROMETHEUS) -> str:
    if shutil.which(str(words[0])) is None:
        pytest.skip(f"{words[0]} is missing: apt install prometheus prometheus-alertmanager")
    done = subprocess.run([str(word) for word in words], cwd=cwd, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def selectors(expression: Any) -> Iterator[Any]:
    """Every instant vector that an expression selects, those inside ranges and subqueries too."""
    if isinstance(expression, promql.VectorSelector):
        yield expression
        return
    below = [getattr(expression, name, None) for name in ("lhs", "rhs", "expr", "param", "vector_selector")]
    for part in [*below, *(getattr(expression, "args", None) or ())]:
        if part is not None:
            yield from selectors(part)


def queries_of(rule: dict[str, Any]) -> list[str]:
    """The expression, and the queries in annotations with a name in the place of what is filled in."""
    asked = re.findall(r'printf "([^"]+)" \$labels\.\w+ \| query', " ".join(rule.get("annotations", {}).values()))
    return [rule["expr"], *(query.replace("%s", "x") for query in asked)]


def names_in(query: str) -> set[str]:
    return {selector.name for selector in selectors(promql.parse(query))}


def defined() -> set[str]:
    return {
        family.name + suffix for family in Metrics().registry.collect() for suffix in SUFFIXES.get(family.type, ("",))
    }


def labels_of_metrics() -> dict[str, set[str]]:
    """By name, as docs/METRICS.md has them; of a histogram by the name of its family."""
    rows = re.findall(r"^\| `(\w+)` \| \w+ \| (.*?) \|", Metrics().markdown(), re.MULTILINE)
    return {name: set(re.findall(r"`(\w+)`", labels)) for name, labels in rows}


def outcomes() -> dict[tuple[str, str], set[str]]:
    """What rule tests see of each alert at each severity: fires, resolves, and, by alert alone, stays silent."""
    seen = defaultdict(set)
    for path in RULE_TESTS:
        for test in yaml.safe_load(path.read_text())["tests"]:
            firing: dict[str, set[str]] = defaultdict(set)
            for check in test.get("alert_rule_test", ()):
                alert = check["alertname"]
                now = {found["exp_labels"]["severity"] for found in check["exp_alerts"]}
                for severity in now:
                    seen[alert, severity].add("fires")
                for severity in firing[alert] - now:
                    seen[alert, severity].add("resolves")
                firing[alert] |= now
            for check in test.get("alert_rule_test", ()):
                if not firing[check["alertname"]]:
                    seen[check["alertname"], ""].add("stays silent")
    return seen


# --- the programs that read them ------------------------------------------------------------------------------------
def test_prometheus_takes_the_rules_and_the_example() -> None:
    command("promtool", "check", "rules", "recording.yml", "alerts.yml")
    command("promtool", "check", "config", "prometheus.yml")


@pytest.mark.parametrize("path", RULE_TESTS, ids=lambda path: path.stem)
def test_the_rules_fire_and_resolve_as_told(path: Path) -> None:
    command("promtool", "test", "rules", path)


def test_alertmanager_takes_the_example() -> None:
    command("amtool", "check-config", "alertmanager.yml")


@pytest.mark.parametrize(("severity", "receiver"), [("critical", "page"), ("warning", "ticket"), ("info", "nobody")])
def test_a_severity_has_its_receiver(severity: str, receiver: str) -> None:
    words = ("config", "routes", "test", "--config.file=alertmanager.yml", f"severity={severity}", "run=gpt")
    assert command("amtool", *words).split() == [receiver]


# --- what hides what ------------------------------------------------------------------------------------------------
Told = Callable[[list[dict[str, str]]], list[str]]


@pytest.fixture
def alertmanager(tmp_path: Path) -> Iterator[Told]:
    """A running one, without receivers. Told of alerts it answers which of them it does not hide."""
    program = shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")
    if program is None:
        pytest.skip("alertmanager is missing: apt install prometheus-alertmanager")
    config = yaml.safe_load((PROMETHEUS / "alertmanager.yml").read_text())
    config["receivers"] = [{"name": receiver["name"]} for receiver in config["receivers"]]
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    options = ["--config.file=config.yml", "--storage.path=data", f"--web.listen-address={address}"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [program, *options, "--cluster.listen-address="], cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        await_answer(f"http://{address}/-/ready", (tmp_path / "log").read_text)
        yield lambda alerts: told(f"http://{address}/api/v2/alerts", alerts)
    finally:
        process.kill()
        process.wait(DEADLINE_S)


def await_answer(url: str, log: Callable[[], str]) -> None:
    until_s = time.monotonic() + DEADLINE_S
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            assert time.monotonic() < until_s, log()
            time.sleep(0.05)


def told(url: str, alerts: list[dict[str, str]]) -> list[str]:
    """Hiding is done by and by, in the order in which alerts came: it is over once what came last is hidden."""
    last = [alert("Hang", "critical", run="last"), alert("TimingBlind", "info", run="last")]
    for some in (alerts, last):
        body = json.dumps([{"labels": labels} for labels in some]).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=DEADLINE_S).close()
    until_s = time.monotonic() + DEADLINE_S
    while True:
        with urllib.request.urlopen(url, timeout=DEADLINE_S) as answer:
            known = json.load(answer)
        shown = [each["labels"] for each in known if not each["status"]["inhibitedBy"]]
        if len(known) == len(alerts) + len(last) and last[1] not in shown:
            return sorted(name_of(labels) for labels in shown if labels != last[0])
        assert time.monotonic() < until_s, known
        time.sleep(0.05)


def name_of(labels: Mapping[str, str]) -> str:
    return " ".join([labels["alertname"].removeprefix("Ckptd"), labels["severity"], labels.get("run", "")]).strip()


def alert(name: str, severity: str, **labels: str) -> dict[str, str]:
    return {"alertname": f"Ckptd{name}", "severity": severity, **labels}


def test_a_cause_hides_what_follows_from_it_of_its_own_run_only(alertmanager: Told) -> None:
    followers = [("CheckpointStale", "critical"), ("SnapshotsSkipped", "warning"), ("RedundancyDegraded", "warning")]
    alerts = [alert(name, severity, run=run) for name, severity in followers for run in ("gpt", "other")]
    alerts += [alert("CoordinatorDown", "critical", run="gpt"), alert("RedundancyLost", "critical", run="gpt")]
    alerts += [alert("DaemonDown", "critical", run="gpt", node="id1", instance="a:1")]
    alerts += [alert("DaemonDown", "warning", instance="b:1"), alert("TierNotReady", "warning", tier="shared-file")]
    assert alertmanager(alerts) == [
        "CheckpointStale critical other",
        "DaemonDown critical gpt",
        "DaemonDown warning",
        "RedundancyDegraded warning other",
        "RedundancyLost critical gpt",
        "SnapshotsSkipped warning other",
        "TierNotReady warning",
    ]


@pytest.mark.parametrize("cause", ["Hang", "Desync", "RankDead"])
def test_a_job_that_stands_hides_that_it_saves_nothing(alertmanager: Told, cause: str) -> None:
    alerts = [alert(cause, "critical", run="gpt", node="id1"), alert("TimingBlind", "info", run="gpt")]
    alerts += [alert("CheckpointStale", "critical", run="gpt", level="staged")]
    assert alertmanager(alerts) == [f"{cause} critical gpt"]


def test_the_worst_of_redundancy_hides_the_rest(alertmanager: Told) -> None:
    names = [("SnapshotUnrecoverable", "critical"), ("RedundancyLost", "critical"), ("RedundancyDegraded", "warning")]
    assert alertmanager([alert(name, severity, run="gpt") for name, severity in names]) == [
        "SnapshotUnrecoverable critical gpt"
    ]


def test_what_is_surer_hides_what_is_less_sure_of_one_node_and_level_only(alertmanager: Told) -> None:
    alerts = [alert("Straggler", level, run="gpt", node="id1") for level in ("info", "warning")]
    alerts += [alert("Straggler", "info", run="gpt", node="id2")]
    alerts += [alert("CheckpointStale", level, run="gpt", level="staged") for level in ("warning", "critical")]
    alerts += [alert("CheckpointStale", "warning", run="gpt", level="durable")]
    assert alertmanager(alerts) == [
        "CheckpointStale critical gpt",
        "CheckpointStale warning gpt",
        "Straggler info gpt",
        "Straggler warning gpt",
    ]


# --- what a rule must have ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: f"{rule['alert']}-{rule['labels'].get('severity')}")
def test_an_alert_says_how_urgent_it_is_what_it_is_and_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in SEVERITIES
    notes = rule["annotations"]
    assert set(notes) == {"summary", "description", "runbook_url"}
    assert len(notes["summary"]) < len(notes["description"])
    assert notes["runbook_url"] == f"{URL}{kebab(rule['alert'])}.md"


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: f"{rule['alert']}-{rule['labels'].get('severity')}")
def test_an_alert_names_the_run_and_the_node_that_it_is_about(rule: dict[str, Any]) -> None:
    text = rule["annotations"]["summary"] + rule["annotations"]["description"]
    by = re.findall(r"(?:max|min|sum|count) by \(([^)]+)\)", rule["expr"])
    about = set.intersection(*({label.strip() for label in labels.split(",")} for labels in by)) if by else set()
    assert [label for label in about & {"run", "node", "instance"} if f"$labels.{label}" not in text] == []


@pytest.mark.parametrize("severity", ["critical"])
@pytest.mark.parametrize("alert", ["CkptdRankDead", "CkptdHang", "CkptdDaemonDown"])
def test_what_stops_a_job_pages_without_waiting(alert: str, severity: str) -> None:
    (rule,) = [rule for rule in ALERTS if rule["alert"] == alert and rule["labels"]["severity"] == severity]
    assert rule.get("for", "0s") in ("0s", "5s")


def test_no_expression_is_a_reference() -> None:
    # Prometheus keeps the node of an expression: an alias there is read as a metric of the anchor's name.
    for name in ("alerts.yml", "recording.yml"):
        assert re.findall(r"expr: [&*]", (PROMETHEUS / name).read_text()) == []


# --- what belongs together ------------------------------------------------------------------------------------------
def test_each_alert_has_a_runbook_and_each_runbook_an_alert() -> None:
    assert sorted(path.stem for path in RUNBOOKS.glob("*.md") if path.stem != "README") == sorted(map(kebab, NAMES))


def test_a_runbook_says_where_to_look_what_to_do_and_what_ends_it() -> None:
    for alert in NAMES:
        lines = (RUNBOOKS / f"{kebab(alert)}.md").read_text().splitlines()
        assert lines[0] == f"# {alert}"
        assert [line for line in lines if line.startswith("## ")] == ["## Look", "## Do", "## Resolved"], alert


def test_the_index_of_runbooks_gives_the_severities_of_the_rules() -> None:
    rows = re.findall(r"\| \[(\w+)\]\(([\w-]+)\.md\) \| ([a-z, ]+) \|", (RUNBOOKS / "README.md").read_text())
    severities = {alert: {rule["labels"]["severity"] for rule in ALERTS if rule["alert"] == alert} for alert in NAMES}
    assert {alert: set(words.split(", ")) for alert, _, words in rows} == severities
    assert [page for alert, page, _ in rows if page != kebab(alert)] == []


@pytest.mark.parametrize("document", sorted(RUNBOOKS.glob("*.md")), ids=lambda path: path.stem)
def test_links_of_a_runbook_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text())
    assert [link for link in links if "://" not in link and not (document.parent / link).exists()] == []


def test_every_alert_is_seen_to_fire_to_resolve_and_to_stay_silent() -> None:
    seen = outcomes()
    urgencies = {(rule["alert"], rule["labels"]["severity"]) for rule in ALERTS}
    assert [key for key in sorted(urgencies) if not {"fires", "resolves"} <= seen[key]] == []
    assert [alert for alert in NAMES if "stays silent" not in seen[alert, ""]] == []


# --- metrics --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rule", [*RECORDS, *ALERTS], ids=lambda rule: rule.get("record") or rule["alert"])
def test_a_rule_asks_only_for_what_there_is(rule: dict[str, Any]) -> None:
    known = defined() | OF_PROMETHEUS | {record["record"] for record in RECORDS}
    assert {name for query in queries_of(rule) for name in names_in(query)} - known == set()


@pytest.mark.parametrize("rule", [*RECORDS, *ALERTS], ids=lambda rule: rule.get("record") or rule["alert"])
def test_a_rule_matches_only_labels_and_faults_that_there_are(rule: dict[str, Any]) -> None:
    labels = labels_of_metrics()
    words = {"kind": {kind.value for kind in Kind}, "confidence": {level.value for level in Confidence}}
    for selector in (found for query in queries_of(rule) for found in selectors(promql.parse(query))):
        for matcher in selector.matchers.matchers:
            if selector.name in labels:
                assert matcher.name in labels[selector.name] | {"job", "instance"}, (selector.name, matcher.name)
            if selector.name == "ckptd_fault" and matcher.name in words:
                assert set(matcher.value.split("|")) <= words[matcher.name], matcher.value


def test_every_kind_of_fault_has_an_alert() -> None:
    matched = [
        matcher.value
        for rule in ALERTS
        for selector in selectors(promql.parse(rule["expr"]))
        for matcher in selector.matchers.matchers
        if selector.name == "ckptd_fault" and matcher.name == "kind"
    ]
    assert {kind for value in matched for kind in value.split("|")} == {kind.value for kind in Kind}


def test_a_query_in_a_runbook_asks_only_for_what_there_is() -> None:
    known = defined() | OF_PROMETHEUS | {record["record"] for record in RECORDS}
    for path in sorted(RUNBOOKS.glob("*.md")):
        for block in re.findall(r"```promql\n(.*?)```", path.read_text(), re.DOTALL):
            for query in block.splitlines():
                assert names_in(query) <= known, f"{path.name}: {query}"


def test_every_recording_rule_is_used() -> None:
    alerts = {name for rule in ALERTS for query in queries_of(rule) for name in names_in(query)}
    records = {record["record"]: names_in(record["expr"]) - {record["record"]} for record in RECORDS}
    dashboards = "".join(path.read_text() for path in ROOT.glob("deploy/grafana/**/*.json"))
    used = alerts | {name for names in records.values() for name in names}
    assert [name for name in records if name not in used and name not in dashboards] == []


def test_a_recording_rule_is_named_for_its_labels_and_its_metric() -> None:
    for record in RECORDS:
        level, metric, operation = record["record"].split(":")
        assert operation
        assert any(name.startswith(metric.rsplit("_", 1)[0]) for name in defined())
        assert set(level.split("_")) <= {"run", "level", "instance", "node"}
