"""What Prometheus and Grafana are told of the server exists, and alerts do what they say."""

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics import Histogram, MetricWrapperBase

from docker.test.stack import annotations, dashboard_queries, variables
from server.archive.journal import Journal
from server.archive.metrics import Metrics as ArchiveMetrics
from server.observe.metrics import Metrics
from tests.support import ROOT

PROMETHEUS = ROOT / "docker/prometheus"
GRAFANA = ROOT / "docker/grafana"
PROMTOOL = shutil.which("promtool")

_NOT_OURS = {"up", "ALERTS"}
_FROM_PROMETHEUS = {"job", "instance"}
_SELECTOR = re.compile(r"\b([a-zA-Z_]\w*)\{([^}]*)\}")
_LABEL = re.compile(r"(\w+)\s*[=!]~?\s*\"")
_GROUPING = re.compile(r"\bby\s*\(([^)]*)\)")


def _series() -> dict[str, set[str]]:
    """Labels of every series that a server exposes, by its name."""
    metrics = Metrics()
    series: dict[str, set[str]] = {
        sample.name: set() for family in metrics.registry.collect() for sample in family.samples
    }
    with tempfile.TemporaryDirectory() as folder, Journal(Path(folder)) as journal:
        archive = ArchiveMetrics(journal)
        for family in archive.registry.collect():
            if isinstance(family, GaugeMetricFamily):
                # The library tells the names of labels in no other way.
                series[family.name] = set(family._labelnames)
    for metric in [*vars(metrics).values(), *vars(archive).values()]:
        if isinstance(metric, MetricWrapperBase):
            labels = set(metric._labelnames)
            for family in metric.describe():
                suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
                for suffix in suffixes.get(family.type, [""]):
                    is_bucket = isinstance(metric, Histogram) and suffix == "_bucket"
                    series[family.name + suffix] = labels | ({"le"} if is_bucket else set())
    return series


def _alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def _expressions() -> Iterator[tuple[str, str]]:
    yield from dashboard_queries("5m")
    yield from annotations().items()
    yield from (("variable", selector) for selector, _ in variables())
    for alert in _alerts():
        yield alert["alert"], alert["expr"]


@pytest.mark.parametrize(("title", "expression"), list(_expressions()))
def test_a_query_asks_for_what_the_server_has(title: str, expression: str) -> None:
    series = _series()
    selectors = _SELECTOR.findall(expression)
    assert selectors, f"{title} selects nothing: every selector of ours names its job"
    known: set[str] = set(_FROM_PROMETHEUS)
    for name, matchers in selectors:
        if name in _NOT_OURS:
            continue
        assert name in series, title
        labels = series[name] | _FROM_PROMETHEUS
        assert set(_LABEL.findall(matchers)) <= labels, title
        known |= labels
    for grouping in _GROUPING.findall(expression):
        assert {label.strip() for label in grouping.split(",")} <= known, title


def test_the_same_alerts_on_kubernetes() -> None:
    rules = ROOT / "docker/kubernetes/components/monitoring/rules.yaml"
    assert (
        yaml.safe_load(rules.read_text())["spec"]["groups"]
        == yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    )


def test_every_alert_is_tested_and_explained() -> None:
    tests = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text())["tests"]
    tested = {case["alertname"] for test in tests for case in test.get("alert_rule_test", [])}
    samples = json.dumps([test.get("promql_expr_test", []) for test in tests])
    operations = (ROOT / "docs/operations.md").read_text()
    for alert in _alerts():
        name = alert["alert"]
        assert name in tested or name in samples
        assert f"`{name}`" in operations, f"{name} has no entry in docs/operations.md"
        assert alert["labels"]["severity"] in ("critical", "warning")


@pytest.mark.skipif(PROMTOOL is None, reason="needs promtool (Debian's package prometheus)")
@pytest.mark.parametrize(
    "command", [["check", "config", "prometheus.yml"], ["test", "rules", "alerts_test.yml"]]
)
def test_promtool(command: list[str]) -> None:
    assert PROMTOOL is not None
    result = subprocess.run([PROMTOOL, *command], cwd=PROMETHEUS, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_dashboard_hangs_together() -> None:
    dashboard = json.loads((GRAFANA / "dashboards/slsnet.json").read_text())
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        if panel["type"] == "row":
            continue
        assert panel["datasource"]["uid"] == source["uid"], panel["title"]
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == source["uid"]


def _lost(given: Any, read: Any, path: str = "") -> Iterator[str]:
    """Where `read` is not what was `given`."""
    if isinstance(given, dict):
        for key, value in given.items():
            there = isinstance(read, dict) and key in read
            yield from _lost(value, read[key], f"{path}/{key}") if there else [f"{path}/{key}"]
    elif isinstance(given, list):
        assert len(given) == len(read), path
        for number, (value, other) in enumerate(zip(given, read, strict=True)):
            yield from _lost(value, other, f"{path}/{number}")
    elif given != read:
        yield path


def test_grafana_knows_every_field_of_the_dashboard() -> None:
    plugins = pytest.importorskip(
        "grafana_foundation_sdk.cog.plugins", reason="needs docker/requirements-tools.txt"
    )
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import Dashboard

    plugins.register_default_plugins()
    given = json.loads((GRAFANA / "dashboards/slsnet.json").read_text())
    read = json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(given)))
    # Grafana writes these itself; its types leave them out.
    ends = ("/builtIn", "/titleFormat", "/definition", "/tooltip/mode")
    assert [path for path in _lost(given, read) if not path.endswith(ends)] == []


def test_panels_do_not_overlap() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in json.loads((GRAFANA / "dashboards/slsnet.json").read_text())["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]
