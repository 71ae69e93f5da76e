"""Alert rules and dashboard: their queries parse, name metrics that exist, fire as meant, and have a runbook."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from click.testing import CliRunner

from shiwu.cli import main
from shiwu.contract import Stage
from shiwu.hooks.metrics import HooksMetrics
from shiwu.watch.metrics import WatchMetrics
from tests.chart.metric_labels import BARE, HISTOGRAMS, METRICS
from tests.support.chart import CHART, Helm, of_kind, tool
from tests.support.processes import ROOT

SCRAPED = {"pod", "namespace", "instance", "job", "le"}
"""Labels that Prometheus adds."""
KNOWN: dict[str, frozenset[str]] = {
    **METRICS,
    **dict.fromkeys(BARE, frozenset[str]()),
    **{f"{name}_{part}": frozenset(own) for name, own in HISTOGRAMS.items() for part in ("bucket", "sum", "count")},
}
VALUES = {
    "lane": {"interactive", "bulk"},
    "status": {"tagged", "rejected", "failed", "expired", "cancelled"},
    "stage": {stage.value for stage in Stage},
}
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((CHART / "files" / "rules.yaml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]
DASHBOARD: dict[str, Any] = json.loads((CHART / "files" / "dashboard.json").read_text(encoding="utf-8"))


def queries() -> Iterator[tuple[str, str]]:
    """(where, query) of every rule and panel, Grafana's own variables filled in."""
    for rule in RULES:
        yield rule["alert"], rule["expr"]
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"].replace("$__rate_interval", "1m")


def selectors(node: Any) -> Iterator[Any]:
    """Every vector selector below a parsed query."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
        return
    if isinstance(node, promql_parser.MatrixSelector):
        yield node.vector_selector
        return
    for name in ("expr", "lhs", "rhs"):
        inner = getattr(node, name, None)
        if inner is not None:
            yield from selectors(inner)
    for argument in getattr(node, "args", None) or []:
        yield from selectors(argument)


@pytest.mark.parametrize(("where", "query"), list(queries()))
def test_queries_parse_and_use_existing_metrics(where: str, query: str) -> None:
    """The metric, its labels, and the values that have a closed set."""
    found = list(selectors(promql_parser.parse(query)))
    assert found, where
    for selector in found:
        labels = KNOWN[selector.name]
        for matcher in selector.matchers.matchers:
            assert matcher.name in labels | SCRAPED, f"{where}: {selector.name} has no label {matcher.name}"
            if matcher.name in VALUES:
                assert set(matcher.value.split("|")) <= VALUES[matcher.name], where
    grouped = {name for inner in re.findall(r"by \(([^)]*)\)", query) for name in re.split(r",\s*", inner)}
    assert grouped <= SCRAPED.union(*(KNOWN[selector.name] for selector in found)), where


def test_wrong_query_is_detected() -> None:
    with pytest.raises(ValueError, match=r".+"):
        promql_parser.parse("sum(rate(shiwu_jobs_total[5m])")
    (found,) = selectors(promql_parser.parse("sum(rate(shiwu_jobs[5m]))"))
    assert found.name not in KNOWN


def test_every_metric_is_used() -> None:
    """A metric without an alert or chart would be exported for nothing."""
    seen = {selector.name for _, query in queries() for selector in selectors(promql_parser.parse(query))}
    seen = {re.sub(r"_(bucket|sum|count)$", "", name) for name in seen}
    assert {*METRICS, *BARE, *HISTOGRAMS} - seen == set()


def test_metrics_of_webhooks_and_watchers_are_listed() -> None:
    """With their labels, as the programs export them."""
    families = [*HooksMetrics().registry.collect(), *WatchMetrics().registry.collect()]
    exported = {
        f"{family.name}_total" if family.type == "counter" else family.name
        for family in families
        if family.name != "shiwu_redis_up"
    }
    listed = {*METRICS, *BARE, *HISTOGRAMS}
    assert {name for name in listed if name.startswith(("shiwu_hooks_", "shiwu_watch_"))} == exported


def test_alert_rules_fire_as_intended(tmp_path: Path) -> None:
    """promtool's own unit tests of the rules, and its lint."""
    promtool = tool("promtool")
    shutil.copy(CHART / "files" / "rules.yaml", tmp_path)
    shutil.copy(Path(__file__).parent / "rules_test.yaml", tmp_path)
    for command in (["check", "rules", "rules.yaml"], ["test", "rules", "rules_test.yaml"]):
        done = subprocess.run(
            [str(promtool), *command], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested_and_has_a_runbook() -> None:
    """An entry in docs/runbook.md, to which it points: impact, three commands, what to do, when it is over."""
    tested = (Path(__file__).parent / "rules_test.yaml").read_text(encoding="utf-8")
    runbook = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
    entries = dict(re.findall(r"^### (Shiwu\w+)\n(.*?)(?=^### |\Z)", runbook, re.M | re.S))
    assert list(entries) == [rule["alert"] for rule in RULES]
    for rule in RULES:
        name = rule["alert"]
        assert f"alertname: {name}\n" in tested, name
        assert all(f"**{part}" in entries[name] for part in ("Impact.", "Look.", "Do.", "Over when")), name
        assert len(re.findall(r"^    \S", entries[name], re.M)) == 3, name
        assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{name.lower()}"
        assert rule["labels"]["severity"] in {"warning", "critical"}


def test_runbook_commands_are_accepted() -> None:
    """Each `shiwu …` command of the runbook has these options."""
    runbook = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    shiwu ([^\n|]+)|`shiwu (dead [^`]+)`", runbook, re.M)
    assert len(commands) > 5
    for indented, quoted in commands:
        result = CliRunner().invoke(main, [*(indented or quoted).replace("CODE", "source_error").split(), "--help"])
        assert result.exit_code == 0, (indented or quoted, result.output)


def test_dashboard_has_its_five_sections() -> None:
    """Rows in this order; panels do not overlap and have ids of their own."""
    panels = DASHBOARD["panels"]
    rows = [panel["title"] for panel in panels if panel["type"] == "row"]
    assert rows[:4] == ["Is anything waiting too long?", "Where does the time go?", "What limits?", "What fails?"]
    assert rows[4:] == ["Webhooks and bucket events"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [tuple(panel["gridPos"][side] for side in "xywh") for panel in panels]
    cells = [(x + across, y + down) for x, y, w, h in places for across in range(w) for down in range(h)]
    assert len(set(cells)) == len(cells)


RUNBOOK = {"rules": {"enabled": True, "runbookUrl": "https://example.org/runbook"}, "dashboards": {"enabled": True}}


def rendered_rules(monitoring: dict[str, Any], **values: Any) -> list[dict[str, Any]]:
    """The alert rules of a release."""
    manifests = Helm(tool("helm4")).render({"redis": {"host": "r"}, "monitoring": monitoring, **values})
    rules: list[dict[str, Any]] = of_kind(manifests, "PrometheusRule")["spec"]["groups"][0]["rules"]
    return rules


def test_chart_contains_rules_and_dashboard() -> None:
    """As the files are, with the runbook's address changed where asked."""
    manifests = Helm(tool("helm4")).render({"redis": {"host": "r"}, "monitoring": RUNBOOK})
    rules = of_kind(manifests, "PrometheusRule")["spec"]["groups"][0]["rules"]
    assert [(rule["alert"], rule["expr"]) for rule in rules] == [(rule["alert"], rule["expr"]) for rule in RULES]
    for rule in rules:
        assert rule["annotations"]["runbook_url"] == f"https://example.org/runbook#{rule['alert'].lower()}"
    assert json.loads(of_kind(manifests, "ConfigMap", "-dashboard")["data"]["shiwu.json"]) == DASHBOARD


def test_alerts_have_no_link_without_an_address() -> None:
    """A relative link leads nowhere from a pager."""
    rules = rendered_rules({"rules": {"enabled": True}})
    assert len(rules) == len(RULES)
    assert all(set(rule["annotations"]) == {"summary"} for rule in rules)


@pytest.mark.parametrize("sweep", [{"enabled": False}, {"metrics": {"enabled": False}}])
def test_disabled_sweep_has_no_alert(sweep: dict[str, Any]) -> None:
    """It would fire forever."""
    alerts = {rule["alert"] for rule in rendered_rules(RUNBOOK, sweep=sweep)}
    assert {rule["alert"] for rule in RULES} - alerts == {"ShiwuSweepGone"}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, "1"),
        ({"worker": {"replicas": 3}}, "3"),
        ({"autoscaling": {"keda": {"enabled": True, "minReplicas": 0}}}, "0"),
        ({"autoscaling": {"hpa": {"enabled": True, "minReplicas": 2}}}, "2"),
    ],
)
def test_sweep_expects_the_minimum_of_workers(values: dict[str, Any], expected: str) -> None:
    """The alert ShiwuNoWorkers compares with this number."""
    monitoring = {"podMonitor": {"enabled": True}}
    manifests = Helm(tool("helm4")).render({"redis": {"host": "r"}, "monitoring": monitoring, **values})
    pod = of_kind(manifests, "Deployment", "-sweep")["spec"]["template"]
    [container] = pod["spec"]["containers"]
    arguments = container["args"]
    assert arguments[arguments.index("--expect-workers") + 1] == expected
    assert arguments[arguments.index("--metrics-port") + 1] == str(container["ports"][0]["containerPort"])
    monitor = of_kind(manifests, "PodMonitor", "-sweep")["spec"]
    assert monitor["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert monitor["podMetricsEndpoints"][0]["port"] == container["ports"][0]["name"]
