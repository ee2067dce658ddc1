"""Configurations of the local Prometheus and Alertmanager: those of deploy/prometheus, made quick and pointed here.

Above ``plan``. What on-call engineers would copy is what runs: scrape job, rules, routes, groups and inhibitions stay
as they are; only times, targets and receivers are changed. JSON is written, which is YAML too.
"""

from __future__ import annotations

import json
from typing import Any, Final

import yaml
from plan import REPOSITORY, Addresses

SCRAPE_S: Final = 5
_EXAMPLES: Final = REPOSITORY / "deploy" / "prometheus"
_GROUP_S: Final = 1


def prometheus(at: Addresses) -> str:
    """deploy/prometheus/prometheus.yml with the daemons and the Alertmanager of this stack."""
    config = yaml.safe_load((_EXAMPLES / "prometheus.yml").read_text())
    config["global"] |= {f"{what}_interval": f"{SCRAPE_S}s" for what in ("scrape", "evaluation")}
    config["global"]["scrape_timeout"] = f"{SCRAPE_S - 1}s"
    config["rule_files"] = [str(_EXAMPLES / name) for name in ("recording.yml", "alerts.yml")]
    targets = [f"127.0.0.1:{port}" for port in at.http]
    (job,) = (job for job in config["scrape_configs"] if job["job_name"] == "ckptd")
    for key in [key for key in job if key.endswith("_sd_configs") or key.startswith("scrape_")]:
        del job[key]
    config["scrape_configs"] = [job | {"static_configs": [{"targets": targets}]}]
    alertmanager = {"static_configs": [{"targets": [f"127.0.0.1:{at.alertmanager}"]}]}
    config["alerting"] = {"alertmanagers": [alertmanager]}
    return json.dumps(config, indent=1)


def alertmanager(at: Addresses) -> str:
    """deploy/prometheus/alertmanager.yml; who is told there is told at the webhook, if any."""
    config = yaml.safe_load((_EXAMPLES / "alertmanager.yml").read_text())
    _make_quick(config["route"])
    told = {"webhook_configs": [{"url": at.webhook, "send_resolved": True}]} if at.webhook else {}
    is_anybody = {receiver["name"]: len(receiver) > 1 for receiver in config["receivers"]}
    config["receivers"] = [{"name": name, **(told if is_told else {})} for name, is_told in is_anybody.items()]
    config.pop("templates", None)
    return json.dumps(config, indent=1)


def _make_quick(route: dict[str, Any]) -> None:
    route |= {"group_wait": f"{_GROUP_S}s", "group_interval": f"{_GROUP_S}s"}
    for below in route.get("routes", ()):
        _make_quick(below)
