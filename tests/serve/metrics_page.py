"""The page /metrics as values: what tests of metrics read."""

from __future__ import annotations

from harness import DaemonProcess, wait_until
from prometheus_client.parser import text_string_to_metric_families

from ckptd.metrics import Metrics

Sample = tuple[str, frozenset[tuple[str, str]]]


def parse(text: str) -> dict[Sample, float]:
    """Value by (name, labels)."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class Page:
    """One reading of a daemon's page, or of a registry."""

    def __init__(self, source: DaemonProcess | Metrics) -> None:
        self.text = source.get("/metrics")[1] if isinstance(source, DaemonProcess) else source.render()[0].decode()
        self.samples = parse(self.text)

    def value(self, name: str, **labels: str) -> float | None:
        return self.samples.get((name, frozenset(labels.items())))

    def labels(self, name: str) -> list[dict[str, str]]:
        """The labels of each series called ``name``."""
        return [dict(labels) for found, labels in self.samples if found == name]

    def of_run(self, run: str) -> dict[Sample, float]:
        return {sample: value for sample, value in self.samples.items() if ("run", run) in sample[1]}

    @property
    def names(self) -> set[str]:
        return {name for name, _ in self.samples}


def wait_value(daemon: DaemonProcess, least: float, name: str, **labels: str) -> Page:
    """The page once that series is at least ``least``."""

    def look() -> Page | None:
        page = Page(daemon)
        return page if (page.value(name, **labels) or 0) >= least else None

    found = wait_until(look, f"{name} {labels} to be {least:g}")
    assert found is not None
    return found
