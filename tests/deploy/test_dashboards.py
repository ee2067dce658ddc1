"""The dashboards are the JSON that Grafana takes, ask only for what daemons serve, and hold at a thousand nodes."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import promql_parser as promql
import pytest
import yaml
from harness import Stage, free_port, wait_until

from ckptd.metrics import Metrics

GRAFANA: Final = Path(__file__).parents[2] / "deploy" / "grafana"
UIDS: Final = ("ckptd-diagnosis", "ckptd-node", "ckptd-overview", "ckptd-pipeline", "ckptd-redundancy")
COLUMNS: Final = 24
# What Grafana calls the units that are used here: a wrong name shows bare numbers, without an error.
UNITS: Final = {"Bps", "bytes", "celsius", "none", "ops", "percentunit", "reqps", "rothz", "s"}
KINDS: Final = {"heatmap", "stat", "table", "timeseries"}
SHARE_OF_TIME: Final = "30m"  # the window of the alert on stalls, so that both show one figure
PER_NODE: Final = {"instance", "node"}
AS_LONG_AS_THE_TROUBLE: Final = {"Faults that last A", "Alerts A", "marks of Faults"}
WHERE_ALERTS_FIRE: Final = [
    ("CkptdCheckpointStale", "ckptd-overview", "Age of the newest snapshot, in usual intervals", 3),
    ("CkptdStallOverBudget", "ckptd-overview", "Share of training time stalled", 0.02),
    ("CkptdDrainStuck", "ckptd-pipeline", "Oldest drain", 600),
    ("CkptdMemoryNearlyFull", "ckptd-pipeline", "Memory used, of the budget", 0.95),
    ("CkptdCoordinatorDown", "ckptd-redundancy", "Silence of the coordinator", 15),
    ("CkptdTimingBlind", "ckptd-diagnosis", "Coverage", 1),
    ("CkptdNodeUnwell", "ckptd-diagnosis", "Node health", 0.5),
    ("CkptdNodeUnwell", "ckptd-node", "Health score", 0.5),
]

TARGET: Final = {"instance", "job"}  # labels that Prometheus adds
INFO: Final = {"ckptd_node_info": {"node", "address"}}
FOREIGN: Final[dict[str, set[str]]] = {
    "up": set(),
    "ALERTS": {"alertname", "alertstate", "severity", "run", "node"},
    **{
        f"process_{name}": set()
        for name in ("cpu_seconds_total", "resident_memory_bytes", "open_fds", "max_fds", "start_time_seconds")
    },
}


class Metric(NamedTuple):
    kind: str
    labels: set[str]


class Query(NamedTuple):
    where: str
    expr: str
    legend: str = ""

    def filled(self) -> str:
        """As Grafana sends it, with all runs and all daemons chosen."""
        return re.sub(r"\$(run|instance)\b", ".+", self.expr.replace("$__rate_interval", "1m"))

    def parsed(self) -> promql.Expr:
        return promql.parse(self.filled())


def _metrics() -> dict[str, Metric]:
    """Every series name that a daemon may serve, from the table that docs/METRICS.md is."""
    found = {}
    metrics = Metrics()
    for name, kind, labels in re.findall(r"^\| `(\w+)` \| (\w+) \| ([^|]+) \|", metrics.markdown(), re.MULTILINE):
        own = set(re.findall(r"`(\w+)`", labels)) | TARGET | INFO.get(name, set())
        if name == "ckptd_build_info":
            own |= {label for f in metrics.build.collect() for sample in f.samples for label in sample.labels}
        suffixes = {"": own} if kind != "histogram" else {"_bucket": own | {"le"}, "_sum": own, "_count": own}
        found.update({name + suffix: Metric(kind, all_labels) for suffix, all_labels in suffixes.items()})
    return found


METRICS: Final = _metrics()
BOARDS: Final[dict[str, dict[str, Any]]] = {
    path.stem: json.loads(path.read_text()) for path in sorted((GRAFANA / "dashboards").glob("*.json"))
}


def _panels(board: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for panel in board["panels"]:
        yield panel
        yield from panel.get("panels", ())


def _charts(board: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in _panels(board) if panel["type"] != "row"]


def _queries(board: dict[str, Any]) -> list[Query]:
    asked = [(panel["title"], target) for panel in _charts(board) for target in panel["targets"]]
    found = [Query(f"{title} {t['refId']}", t["expr"], t["legendFormat"]) for title, t in asked]
    notes = [note for note in board["annotations"]["list"] if "expr" in note]
    return found + [Query(f"marks of {n['name']}", n["expr"], n["titleFormat"] + n["textFormat"]) for n in notes]


each_board = pytest.mark.parametrize("board", [pytest.param(b, id=uid) for uid, b in BOARDS.items()])


def _visits(expr: promql.Expr) -> list[tuple[promql.Expr, tuple[promql.Expr, ...]]]:
    """Every node of the expression with those above it, outermost first."""
    found, above = [], []

    def enter(node: promql.Expr) -> None:
        found.append((node, tuple(above)))
        above.append(node)

    promql.walk(expr, enter, lambda _: above.pop() and None)
    return found


def _selectors(query: Query) -> list[tuple[promql.VectorSelector, tuple[promql.Expr, ...]]]:
    return [(node, above) for node, above in _visits(query.parsed()) if isinstance(node, promql.VectorSelector)]


def _labels_of_metric(name: str) -> set[str]:
    return METRICS[name].labels if name in METRICS else FOREIGN[name] | TARGET


def _labels_of_binary(expr: promql.BinaryExpr) -> set[str]:
    left, right = labels(expr.lhs), labels(expr.rhs)
    op, matching = str(expr.op), expr.modifier.matching if expr.modifier else None
    on = set(matching.labels) if matching else set()
    assert on <= left & right, f"on ({', '.join(sorted(on))}) of {expr.prettify()}"
    if op == "or":
        return left | right
    if op == "and" or expr.lhs.__class__ is promql.NumberLiteral or not on:
        return left or right
    grouped = expr.modifier.group_labels
    return on if grouped is None else left | set(grouped.labels if hasattr(grouped, "labels") else grouped)


def labels(expr: promql.Expr) -> set[str]:
    """The labels that the result may have; fails where one is asked for that cannot be there."""
    match expr:
        case promql.VectorSelector():
            own = _labels_of_metric(expr.name)
            asked = {m.name for m in expr.matchers.matchers}
            assert asked <= own, f"{expr.name} has no label {asked - own}"
            return own
        case promql.AggregateExpr():
            inner, kept = labels(expr.expr), set(expr.modifier.labels) if expr.modifier else set()
            assert kept <= inner, f"no label {kept - inner} in {expr.prettify()}"
            return inner if str(expr.op) in ("topk", "bottomk") else kept
        case promql.Call():
            inner = set().union(*(labels(arg) for arg in expr.args))
            return inner - {"le"} if expr.func.name == "histogram_quantile" else inner
        case promql.BinaryExpr():
            return _labels_of_binary(expr)
        case promql.MatrixSelector():
            return labels(expr.vector_selector)
        case promql.ParenExpr() | promql.SubqueryExpr() | promql.UnaryExpr():
            return labels(expr.expr)
        case _:
            return set()


# --- the files --------------------------------------------------------------------------------------------------------
def test_the_dashboards_are_those_that_are_documented() -> None:
    assert tuple(BOARDS) == UIDS
    guide = (GRAFANA.parents[1] / "docs" / "DASHBOARDS.md").read_text()
    assert [uid for uid in UIDS if f"`{uid}`" not in guide] == []


@pytest.mark.parametrize("uid", UIDS)
def test_a_dashboard_is_laid_out_so_that_changes_can_be_read(uid: str) -> None:
    path = GRAFANA / "dashboards" / f"{uid}.json"
    assert path.read_text() == json.dumps(BOARDS[uid], indent=2, sort_keys=True, ensure_ascii=False) + "\n"


@each_board
def test_a_dashboard_belongs_to_no_server(board: dict[str, Any]) -> None:
    assert board["uid"] in UIDS
    assert board["schemaVersion"] == 38, "Grafana 10.0; newer ones take it and raise it"
    assert "id" not in board, "a number of one server's database"
    assert board["tags"] == ["ckptd"]
    assert board["links"][0]["tags"] == ["ckptd"]
    asking = [board["annotations"]["list"][1], *_charts(board)]
    asking += [t for p in _charts(board) for t in p["targets"]] + board["templating"]["list"][1:]
    assert {json.dumps(a["datasource"]) for a in asking} == {'{"type": "prometheus", "uid": "${datasource}"}'}


@each_board
def test_panels_have_an_id_a_unit_and_say_what_good_looks_like(board: dict[str, Any]) -> None:
    panels = list(_panels(board))
    assert len({p["id"] for p in panels}) == len(panels)
    charts = _charts(board)
    assert len({p["title"] for p in charts}) == len(charts)
    assert {p["type"] for p in charts} <= KINDS
    for panel in charts:
        assert "Good: " in panel["description"], panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
        refs = [target["refId"] for target in panel["targets"]]
        assert refs, panel["title"]
        assert len(set(refs)) == len(refs), panel["title"]


@each_board
def test_panels_do_not_overlap(board: dict[str, Any]) -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in _panels(board):
        at = panel["gridPos"]
        assert at["x"] >= 0, panel["title"]
        assert at["x"] + at["w"] <= COLUMNS, panel["title"]
        for cell in ((x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])):
            assert cell not in taken, f"{panel['title']} lies on {taken[cell]}"
            taken[cell] = panel["title"]


@each_board
def test_a_variable_is_defined_exactly_where_it_is_used(board: dict[str, Any]) -> None:
    own = {variable["name"] for variable in board["templating"]["list"]}
    asked = [query.expr for query in _queries(board)]
    asked += [variable["query"]["query"] for variable in board["templating"]["list"][1:]]
    used = {name for expr in asked for name in re.findall(r"\$(\w+)", expr) if not name.startswith("__")}
    assert used | {"datasource"} == own
    for variable in board["templating"]["list"][1:]:
        metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"]).groups()  # type: ignore[union-attr]
        assert label in METRICS[metric].labels


@each_board
def test_links_lead_to_dashboards_and_fill_variables_that_these_have(board: dict[str, Any]) -> None:
    for uid, query in re.findall(r"/d/([\w-]+)\?([^\"]*)", json.dumps(board)):
        own = {variable["name"] for variable in BOARDS[uid]["templating"]["list"]}
        assert set(re.findall(r"var-(\w+)=", query)) <= own


def test_the_provisioning_finds_the_dashboards() -> None:
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/ckptd.yml").read_text())["providers"]
    installed = Path(provider["options"]["path"])
    assert provider["type"] == "file"
    assert sorted(p.stem for p in (GRAFANA / installed.relative_to("/etc/ckptd/grafana")).glob("*.json")) == list(UIDS)
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())["datasources"]
    assert source["type"] == BOARDS["ckptd-overview"]["templating"]["list"][0]["query"]


# --- what they ask ----------------------------------------------------------------------------------------------------
@each_board
def test_a_query_asks_for_metrics_and_labels_that_exist(board: dict[str, Any]) -> None:
    for query in _queries(board):
        assert {s.name for s, _ in _selectors(query)} <= METRICS.keys() | FOREIGN.keys(), query.where
        assert set(re.findall(r"{{(\w+)}}", query.legend)) <= labels(query.parsed()), query.where


def test_a_column_of_a_table_is_a_label_or_a_value_of_its_queries() -> None:
    for board in BOARDS.values():
        for panel in (p for p in _charts(board) if p["type"] == "table"):
            (organize,) = (t["options"] for t in panel["transformations"] if t["id"] == "organize")
            parsed = [Query("", t["expr"]).parsed() for t in panel["targets"]]
            values = {f"Value #{t['refId']}" for t in panel["targets"]} if len(parsed) > 1 else {"Value"}
            known = set().union(*(labels(p) for p in parsed)) | values | {"Time"}
            named = organize["indexByName"].keys() | organize["renameByName"].keys() | organize["excludeByName"].keys()
            assert named <= known, panel["title"]
            assert values <= named, f"{panel['title']} shows a value without a name"
            shown = {organize["renameByName"].get(name, name) for name in organize["indexByName"]}
            assert {o["matcher"]["options"] for o in panel["fieldConfig"]["overrides"]} <= shown, panel["title"]


@each_board
def test_a_counter_is_only_seen_as_its_rise(board: dict[str, Any]) -> None:
    for query in _queries(board):
        for selector, above in _selectors(query):
            kind = METRICS[selector.name].kind if selector.name in METRICS else ""
            if kind in ("counter", "histogram") or selector.name.endswith("_total"):
                calls = [node.func.name for node in above if isinstance(node, promql.Call)]
                assert calls[-1:] in (["rate"], ["increase"]), query.where


@each_board
def test_a_rise_is_taken_over_as_long_as_the_screen_asks(board: dict[str, Any]) -> None:
    for query in _queries(board):
        for metric, window in re.findall(r"(?:rate|increase)\((\w+)[^\[]*\[([^\]]+)\]", query.expr):
            wanted = SHARE_OF_TIME if metric == "ckptd_stall_seconds_sum" and "ckptd_ranks" in query.expr else ""
            assert window == (wanted or "$__rate_interval"), query.where


@each_board
def test_lines_of_single_nodes_are_only_the_worst(board: dict[str, Any]) -> None:
    for query in _queries(board):
        if labels(query.parsed()) & PER_NODE and query.where not in AS_LONG_AS_THE_TROUBLE:
            ops = [str(node.op) for node, _ in _visits(query.parsed()) if isinstance(node, promql.AggregateExpr)]
            assert ops[0] in ("topk", "bottomk"), query.where


@pytest.mark.parametrize(("alert", "uid", "title", "value"), WHERE_ALERTS_FIRE)
def test_a_red_line_is_where_the_alert_fires(alert: str, uid: str, title: str, value: float) -> None:
    rules = yaml.safe_load((GRAFANA.parent / "prometheus" / "alerts.yml").read_text())
    exprs = [r["expr"] for group in rules["groups"] for r in group["rules"] if r["alert"] == alert]
    numbers = {n.val for expr in exprs for n, _ in _visits(promql.parse(expr)) if isinstance(n, promql.NumberLiteral)}
    assert value in numbers, exprs
    (panel,) = (p for p in _charts(BOARDS[uid]) if p["title"] == title)
    assert value in {step["value"] for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"]}
    assert panel["fieldConfig"]["defaults"]["custom"]["thresholdsStyle"]["mode"] == "line"


def test_every_metric_is_on_a_dashboard() -> None:
    shown = {selector.name for board in BOARDS.values() for q in _queries(board) for selector, _ in _selectors(q)}
    names = {name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for name in shown}
    known = {name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for name in METRICS}
    assert known - names == set()


WITH_ANY_JOB: Final = {
    "overview": ("Run by run", "Age of the newest snapshot, in usual intervals", "Share of training time stalled"),
    "pipeline": (
        "Time of each stage",
        "Capture",
        "Drain",
        "Bytes by direction and tier",
        "Tiers ready",
        "Slots by state",
    ),
    "redundancy": ("Coordinators of a run",),
    "node": ("Versions", "Nodes", "Runs on the node", "Memory of the daemon", "Time of calls"),
}


# --- a real server ----------------------------------------------------------------------------------------------------
class Prometheus:
    """A server on loopback that scrapes one daemon each second."""

    def __init__(self, folder: Path, daemon_http: str) -> None:
        at = f"127.0.0.1:{free_port()}"
        self.url = f"http://{at}"
        job = {"job_name": "ckptd", "static_configs": [{"targets": [daemon_http]}]}
        config = {"global": {"scrape_interval": "1s"}, "scrape_configs": [job]}
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        with (folder / "prometheus.log").open("wb") as log:
            self._process = subprocess.Popen([*command, f"--web.listen-address={at}"], stdout=log, stderr=log)

    def ask(self, expr: str) -> list[Any]:
        """The series over the last minute."""
        now = time.time()
        asked = {"query": expr, "start": now - 60, "end": now, "step": 5}
        body = urllib.parse.urlencode(asked).encode()
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/query_range", body, timeout=10) as reply:
                return list(json.load(reply)["data"]["result"])
        except urllib.error.HTTPError as error:
            error.add_note(f"{expr}: {error.read().decode()}")
            raise

    def has_seen(self, expr: str) -> bool:
        with contextlib.suppress(OSError):  # it does not serve yet
            return bool(self.ask(expr))
        return False

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(10)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="no prometheus: apt-get install prometheus")
def test_every_query_runs_on_a_real_server_and_those_of_any_job_give_data(stage: Stage, tmp_path: Path) -> None:
    daemon = stage.tier_daemon(http=True)
    stage.trainer(daemon, "--free", "--step-s", "0.05")
    server = Prometheus(tmp_path, daemon.http)
    try:
        wait_until(lambda: server.has_seen('rate(ckptd_drain_seconds_count{run="tiny"}[10s]) > 0'), "drains to be seen")
        answers = {(uid, q.where): server.ask(q.filled()) for uid, board in BOARDS.items() for q in _queries(board)}
        (node,) = server.ask("ckptd_node_info")
    finally:
        server.close()
    assert "node" in node["metric"], "what faults are joined with"
    for uid, titles in WITH_ANY_JOB.items():
        assert [title for title in titles if not answers[f"ckptd-{uid}", f"{title} A"]] == []
