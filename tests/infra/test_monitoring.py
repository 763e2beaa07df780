"""The dashboard and the alerts query existing metrics in valid PromQL; promtool tests the alerts."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import promql_parser
import pytest
import ray
from promql_parser import AggregateExpr, VectorSelector
from ray.util.metrics import Counter, Gauge, Histogram

from services.core import telemetry
from tests.support.deployment_files import INFRA, document

DASHBOARD: Final = json.loads((INFRA / "grafana" / "dashboards" / "sluice.json").read_text())
ALERTS: Final = document(INFRA / "prometheus" / "alerts.yaml")
RULES: Final = [rule for group in ALERTS["groups"] for rule in group["rules"]]
RECORDED: Final = {rule["record"] for rule in RULES if "record" in rule}
METRICS: Final = {
    metric.info["name"]: metric
    for metric in vars(telemetry).values()
    if isinstance(metric, (Counter, Gauge, Histogram))
}
RAYS_OWN: Final = {"serve": "serve/_private", "cluster": "dashboard/modules/reporter"}
"""The folder in which Ray defines each family of its own metrics, by the first word of the name."""
GIVEN_BY_RAY: Final = {"WorkerId", "NodeAddress", "SessionName"}


@dataclass(frozen=True)
class Query:
    """One PromQL expression and its place in the dashboard or the alerts."""

    where: str
    expression: str


def selectors_of(expression: Any) -> list[VectorSelector]:
    """Every selector of series in an expression."""
    found: list[VectorSelector] = []
    promql_parser.walk(expression, lambda node: collect(node, VectorSelector, found))
    return found


def collect(node: Any, kind: type, found: list[Any]) -> bool:
    """Add a node of the given kind to `found`; True continues the walk."""
    if isinstance(node, kind):
        found.append(node)
    return True


def queries() -> Iterator[Query]:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield Query(f"panel {panel['title']}", target["expr"])
    for rule in RULES:
        yield Query(f"rule {rule.get('alert') or rule['record']}", rule["expr"])


QUERIES: Final = list(queries())
each_query = pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.where)


@each_query
def test_query_names_existing_metrics_and_labels(query: Query) -> None:
    selectors = selectors_of(promql_parser.parse(query.expression))

    assert selectors
    for selector in selectors:
        assert selector.name, "a metric must be named"
        asked = {matcher.name for matcher in selector.matchers.matchers}
        if selector.name in RECORDED:
            continue
        name = selector.name.removeprefix("ray_")
        assert name != selector.name, f"{selector.name} lacks the prefix ray_"
        if name.startswith("sluice_"):
            metric = METRICS.get(base_name(name))
            assert metric is not None, f"services/core/telemetry.py has no {base_name(name)}"
            assert asked <= set(metric.info["tag_keys"]) | GIVEN_BY_RAY
        else:
            assert is_rays_own(name), f"Ray has no {name}"


def test_query_names_no_deprecated_metric_or_label() -> None:
    deprecated = {("sluice_waits_total", None), ("sluice_submissions_total", "end")}
    for query in QUERIES:
        for selector in selectors_of(promql_parser.parse(query.expression)):
            name = (selector.name or "").removeprefix("ray_")
            labels = {None, *(matcher.name for matcher in selector.matchers.matchers)}
            assert not {(name, label) for label in labels} & deprecated, query.where


def base_name(name: str) -> str:
    """The name of the metric in the code: an exported histogram has a suffix."""
    for suffix in ("_bucket", "_sum", "_count"):
        if isinstance(METRICS.get(name.removesuffix(suffix)), Histogram):
            return name.removesuffix(suffix)
    return name


def is_rays_own(name: str) -> bool:
    folder = Path(ray.__file__).parent / RAYS_OWN[name.partition("_")[0]]
    return any(f'"{name}"' in path.read_text() for path in folder.glob("*.py"))


@each_query
def test_aggregation_keeps_existing_labels(query: Query) -> None:
    aggregations: list[AggregateExpr] = []
    promql_parser.walk(promql_parser.parse(query.expression), lambda node: collect(node, AggregateExpr, aggregations))

    for aggregation in aggregations:
        for selector in selectors_of(aggregation.expr):
            metric = METRICS.get(base_name((selector.name or "").removeprefix("ray_")))
            if metric is not None and aggregation.modifier is not None:
                assert set(aggregation.modifier.labels) <= set(metric.info["tag_keys"]) | GIVEN_BY_RAY | {"le"}


def test_dashboard_panels_have_a_data_source_a_description_and_room() -> None:
    (source,) = document(INFRA / "grafana" / "provisioning" / "datasources" / "prometheus.yaml")["datasources"]
    panels = DASHBOARD["panels"]

    assert len({panel["id"] for panel in panels}) == len(panels)
    assert {panel["datasource"]["uid"] for panel in panels if panel["type"] != "row"} == {source["uid"]}
    assert all(panel["description"] for panel in panels if panel["type"] != "row")
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, f"{panel['title']} lies over another panel"
        taken |= cells


def test_alert_has_a_summary_and_an_action() -> None:
    alerts = [rule for rule in RULES if "alert" in rule]

    assert {rule["labels"]["severity"] for rule in alerts} == {"page", "ticket"}
    assert all(set(rule["annotations"]) == {"summary", "action"} for rule in alerts)


def require_promtool() -> str:
    """The path of promtool. Without promtool the test is skipped, or fails if SLUICE_TEST_REQUIRE_PROMTOOL=1."""
    promtool = shutil.which("promtool")
    if promtool is None:
        reason = "promtool not found: install Prometheus (Debian: the package prometheus)"
        if os.environ.get("SLUICE_TEST_REQUIRE_PROMTOOL") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return promtool


def test_alert_rules_pass_their_promtool_tests() -> None:
    promtool = require_promtool()
    folder = INFRA / "prometheus"
    checks = (["check", "config", "prometheus.yaml"], ["test", "rules", "alerts_test.yaml"])
    for check in checks:
        done = subprocess.run([promtool, *check], cwd=folder, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
