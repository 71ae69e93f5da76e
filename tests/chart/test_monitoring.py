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

from shiwu.contract import Stage
from tests.support.chart import CHART, Helm, of_kind, tool
from tests.support.processes import ROOT

METRICS: dict[str, frozenset[str]] = {
    "shiwu_jobs_total": frozenset({"lane", "status", "code"}),
    "shiwu_queue_waiting": frozenset({"lane"}),
    "shiwu_queue_claimed": frozenset({"lane"}),
    "shiwu_queue_oldest_age_seconds": frozenset({"lane"}),
    "shiwu_queue_backlog_seconds": frozenset({"lane"}),
    "shiwu_batches_total": frozenset({"reason"}),
    "shiwu_retries_total": frozenset({"code"}),
    "shiwu_limit_ratio": frozenset({"what"}),
    "shiwu_model_info": frozenset({"model", "revision", "dtype", "device"}),
}
"""Metrics with labels of their own, and these."""
BARE = [
    "shiwu_queue_delayed",
    "shiwu_dead_letters",
    "shiwu_leases_renewed_total",
    "shiwu_leases_reaped_total",
    "shiwu_answers_discarded_total",
    "shiwu_loader_restarts_total",
    "shiwu_gpu_memory_used_bytes",
    "shiwu_gpu_memory_total_bytes",
    "shiwu_gpu_utilisation_ratio",
    "shiwu_worker_ready",
    "shiwu_progress_age_seconds",
]
HISTOGRAMS = {
    "shiwu_stage_seconds": {"stage"},
    "shiwu_queue_wait_seconds": {"lane"},
    "shiwu_answer_seconds": {"lane"},
    "shiwu_batch_size": set(),
}
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
def test_queries_parse_and_name_what_exists(where: str, query: str) -> None:
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


def test_a_wrong_query_would_be_seen() -> None:
    with pytest.raises(ValueError, match=r".+"):
        promql_parser.parse("sum(rate(shiwu_jobs_total[5m])")
    (found,) = selectors(promql_parser.parse("sum(rate(shiwu_jobs[5m]))"))
    assert found.name not in KNOWN


def test_every_metric_is_looked_at() -> None:
    """What nobody sees need not be exported."""
    seen = {selector.name for _, query in queries() for selector in selectors(promql_parser.parse(query))}
    seen = {re.sub(r"_(bucket|sum|count)$", "", name) for name in seen}
    assert {*METRICS, *BARE, *HISTOGRAMS} - seen == set()


def test_rules_fire_as_meant(tmp_path: Path) -> None:
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
    """A heading of its own in docs/operations.md, to which it points."""
    tested = (Path(__file__).parent / "rules_test.yaml").read_text(encoding="utf-8")
    operations = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    for rule in RULES:
        name = rule["alert"]
        assert f"alertname: {name}\n" in tested, name
        assert f"\n### {name}\n" in operations, name
        assert rule["annotations"]["runbook_url"] == f"docs/operations.md#{name.lower()}"
        assert rule["labels"]["severity"] in {"warning", "critical"}
    headings = re.findall(r"^### (Shiwu\w+)$", operations, re.M)
    assert headings == [rule["alert"] for rule in RULES]


def test_the_dashboard_answers_its_four_questions() -> None:
    """Rows in this order; panels do not overlap and have ids of their own."""
    panels = DASHBOARD["panels"]
    rows = [panel["title"] for panel in panels if panel["type"] == "row"]
    assert rows == ["Is anything waiting too long?", "Where does the time go?", "What limits?", "What fails?"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [tuple(panel["gridPos"][side] for side in "xywh") for panel in panels]
    cells = [(x + across, y + down) for x, y, w, h in places for across in range(w) for down in range(h)]
    assert len(set(cells)) == len(cells)


def test_the_chart_carries_both() -> None:
    """As the files are, with the runbooks' address changed where asked."""
    values = {
        "redis": {"host": "r"},
        "monitoring": {
            "rules": {"enabled": True, "runbookUrl": "https://example.org/runbook"},
            "dashboards": {"enabled": True},
        },
    }
    manifests = Helm(tool("helm4")).render(values)
    rules = of_kind(manifests, "PrometheusRule")["spec"]["groups"][0]["rules"]
    assert [(rule["alert"], rule["expr"]) for rule in rules] == [(rule["alert"], rule["expr"]) for rule in RULES]
    assert all(rule["annotations"]["runbook_url"].startswith("https://example.org/runbook#") for rule in rules)
    assert json.loads(of_kind(manifests, "ConfigMap", "-dashboard")["data"]["shiwu.json"]) == DASHBOARD
