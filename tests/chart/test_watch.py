"""The optional Deployment of `shiwu watch`: its rules, its arguments, its port and its network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from shiwu.watch.command import watch
from shiwu.watch.rules import read_rules
from tests.chart.cases import ALL_ON, EVENTS, MATRIX, PLAIN
from tests.support.chart import Helm, of_kind


def container_of(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    """The container of the watcher."""
    [container] = of_kind(manifests, "Deployment", "-watch")["spec"]["template"]["spec"]["containers"]
    found: dict[str, Any] = container
    return found


def test_rules_and_arguments_fit_the_command(newest: Helm, tmp_path: Path) -> None:
    """The command reads the ConfigMap beside the file of tokens, and knows every argument."""
    manifests = newest.render(ALL_ON)
    container = container_of(manifests)
    assert container["command"] == ["tini", "--", "shiwu"]
    name, *args = container["args"]
    assert name == "watch"
    parsed = watch.make_context("watch", list(args)).params
    assert (parsed["metrics_port"], parsed["portion"], parsed["source"]) == (9810, 100, None)
    folder = Path(next(each["mountPath"] for each in container["volumeMounts"] if each["name"] == "rules"))
    assert (parsed["rules"], parsed["token_file"]) == (folder / "rules.yaml", folder / "tokens")
    pod = of_kind(manifests, "Deployment", "-watch")["spec"]["template"]["spec"]
    [volume] = [each for each in pod["volumes"] if each["name"] == "rules"]
    assert volume["projected"]["sources"][1]["secret"]["items"] == [{"key": "tokens", "path": "tokens"}]
    (tmp_path / "rules.yaml").write_text(of_kind(manifests, "ConfigMap", "-watch")["data"]["rules.yaml"])
    [rule] = read_rules(tmp_path / "rules.yaml").all
    assert rule.options.lane == "bulk"
    variables = {each["name"]: each for each in container["env"]}
    assert variables["SHIWU_WATCH_SOURCE"]["value"] == "http://0.0.0.0:8080/events"
    assert "shiwu-watcher" in variables["SHIWU_REDIS_URL"]["value"]


def test_port_of_events_has_a_service_and_a_probe(newest: Helm) -> None:
    """Only from those who may send; other sources have neither."""
    manifests = newest.render(ALL_ON)
    container = container_of(manifests)
    assert {"name": "events", "containerPort": 8080, "protocol": "TCP"} in container["ports"]
    assert container["readinessProbe"]["tcpSocket"] == {"port": "events"}
    [port] = of_kind(manifests, "Service", "-watch")["spec"]["ports"]
    assert (port["port"], port["targetPort"]) == (80, "events")
    ingress = of_kind(manifests, "NetworkPolicy", "-watch")["spec"]["ingress"]
    [events] = [rule for rule in ingress if rule["ports"][0]["port"] == "events"]
    assert events["from"] == [{"podSelector": {"matchLabels": {"app": "minio"}}}]
    queue = newest.render(MATRIX["sqs"])
    assert "ports" not in container_of(queue)
    assert "readinessProbe" not in container_of(queue)
    assert of_kind(queue, "NetworkPolicy", "-watch")["spec"]["ingress"] == []
    assert [each for each in queue if each["kind"] == "Service" and each["metadata"]["name"].endswith("-watch")] == []


def test_source_with_a_password_comes_from_a_secret(newest: Helm) -> None:
    """On a cluster, together with webhooks."""
    manifests = newest.render(MATRIX["cluster-extensions"])
    variables = {each["name"]: each for each in container_of(manifests)["env"]}
    assert variables["SHIWU_WATCH_SOURCE"]["valueFrom"] == {"secretKeyRef": {"name": "minio-events", "key": "url"}}
    assert variables["SHIWU_REDIS_URL"]["value"].startswith("cluster://")
    assert of_kind(manifests, "Deployment", "-hooks") is not None


def test_changed_rules_restart_the_pods(newest: Helm) -> None:
    """Because the process reads them at its start."""
    values = [PLAIN | {"watch": EVENTS | {"source": "sqs://a", "rules": [{"lane": lane}]}} for lane in ("bulk", "x")]
    checksums = {
        of_kind(newest.render(each), "Deployment", "-watch")["spec"]["template"]["metadata"]["annotations"][
            "checksum/rules"
        ]
        for each in (*values, values[0])
    }
    assert len(checksums) == 2


def test_watcher_reaches_public_queues(newest: Helm) -> None:
    """As the workers reach their sources; no other internal address."""
    policies = [
        of_kind(newest.render(ALL_ON), "NetworkPolicy", name)["spec"]["egress"] for name in ("-worker", "-watch")
    ]
    web = [[rule for rule in egress if "0.0.0.0/0" in yaml.dump(rule)] for egress in policies]
    assert len(web[0]) == 1
    assert web[0] == web[1]


@pytest.mark.parametrize("values", [PLAIN], ids=["plain"])
def test_watcher_is_off_by_default(newest: Helm, values: dict[str, Any]) -> None:
    """No object of it is rendered."""
    assert [each for each in newest.render(values) if each["metadata"]["name"].endswith("-watch")] == []
