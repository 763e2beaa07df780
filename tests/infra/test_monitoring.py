"""The dashboard, the alerts and the scrape configuration ask for metrics that exist, in PromQL that parses."""

import json
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
"""Where Ray defines the metrics of its own that are asked for, by the first word of their names."""
GIVEN_BY_RAY: Final = {"WorkerId", "NodeAddress", "SessionName"}


@dataclass(frozen=True)
class Query:
    """One expression, and where it stands."""

    where: str
    expression: str


def selectors_of(expression: Any) -> list[VectorSelector]:
    """Every series that an expression asks for."""
    found: list[VectorSelector] = []
    promql_parser.walk(expression, lambda node: collect(node, VectorSelector, found))
    return found


def collect(node: Any, kind: type, found: list[Any]) -> bool:
    """Keep the nodes of one kind, and walk on."""
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
def test_it_asks_for_metrics_and_labels_that_exist(query: Query) -> None:
    selectors = selectors_of(promql_parser.parse(query.expression))

    assert selectors
    for selector in selectors:
        assert selector.name, "a metric must be named"
        asked = {matcher.name for matcher in selector.matchers.matchers}
        if selector.name in RECORDED:
            continue
        name = selector.name.removeprefix("ray_")
        assert name != selector.name, f"Ray exports nothing without its prefix: {selector.name}"
        if name.startswith("sluice_"):
            metric = METRICS.get(base_name(name))
            assert metric is not None, f"services/core/telemetry.py has no {base_name(name)}"
            assert asked <= set(metric.info["tag_keys"]) | GIVEN_BY_RAY
        else:
            assert is_rays_own(name), f"Ray has no {name}"


def test_queries_ask_for_no_deprecated_name() -> None:
    deprecated = {("sluice_waits_total", None), ("sluice_submissions_total", "end")}
    for query in QUERIES:
        for selector in selectors_of(promql_parser.parse(query.expression)):
            name = (selector.name or "").removeprefix("ray_")
            labels = {None, *(matcher.name for matcher in selector.matchers.matchers)}
            assert not {(name, label) for label in labels} & deprecated, query.where


def base_name(name: str) -> str:
    """Of a metric as it is defined: what is exported of a histogram has a suffix."""
    for suffix in ("_bucket", "_sum", "_count"):
        if isinstance(METRICS.get(name.removesuffix(suffix)), Histogram):
            return name.removesuffix(suffix)
    return name


def is_rays_own(name: str) -> bool:
    folder = Path(ray.__file__).parent / RAYS_OWN[name.partition("_")[0]]
    return any(f'"{name}"' in path.read_text() for path in folder.glob("*.py"))


@each_query
def test_aggregations_keep_labels_that_exist(query: Query) -> None:
    aggregations: list[AggregateExpr] = []
    promql_parser.walk(promql_parser.parse(query.expression), lambda node: collect(node, AggregateExpr, aggregations))

    for aggregation in aggregations:
        for selector in selectors_of(aggregation.expr):
            metric = METRICS.get(base_name((selector.name or "").removeprefix("ray_")))
            if metric is not None and aggregation.modifier is not None:
                assert set(aggregation.modifier.labels) <= set(metric.info["tag_keys"]) | GIVEN_BY_RAY | {"le"}


def test_the_dashboard_can_be_provisioned() -> None:
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


def test_every_alert_says_what_is_wrong_and_what_to_do() -> None:
    alerts = [rule for rule in RULES if "alert" in rule]

    assert {rule["labels"]["severity"] for rule in alerts} == {"page", "ticket"}
    assert all(set(rule["annotations"]) == {"summary", "action"} for rule in alerts)


def test_alerts_fire_when_they_should_and_only_then() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("needs promtool, which comes with Prometheus (Debian: the package prometheus)")
    folder = INFRA / "prometheus"
    checks = (["check", "config", "prometheus.yaml"], ["test", "rules", "alerts_test.yaml"])
    for check in checks:
        done = subprocess.run([promtool, *check], cwd=folder, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
