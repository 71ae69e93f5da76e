"""The optional Deployment of `shiwu-hooks`: its file, its arguments and its network."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from shiwu.hooks.__main__ import main
from shiwu.hooks.endpoints import read_endpoints
from tests.chart.cases import ALL_ON, PLAIN
from tests.support.chart import Helm, of_kind


def test_file_and_arguments_fit_the_command(newest: Helm, tmp_path: Path) -> None:
    """The command reads the ConfigMap with the Secret's files beside it, and knows every argument."""
    manifests = newest.render(ALL_ON)
    pod = of_kind(manifests, "Deployment", "-hooks")["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert container["command"] == ["tini", "--", "shiwu-hooks"]
    parsed = main.make_context("shiwu-hooks", list(container["args"])).params
    assert (parsed["urls"], parsed["metrics_port"], parsed["in_flight"]) == (True, 9809, 4)
    [volume] = [each for each in pod["volumes"] if each["name"] == "endpoints"]
    assert volume["projected"]["sources"] == [
        {"configMap": {"name": of_kind(manifests, "ConfigMap", "-hooks")["metadata"]["name"]}},
        {"secret": {"name": "hooks-secrets"}},
    ]
    folder = Path(next(each["mountPath"] for each in container["volumeMounts"] if each["name"] == "endpoints"))
    assert parsed["file"] == folder / "endpoints.yaml"
    (tmp_path / "endpoints.yaml").write_text(of_kind(manifests, "ConfigMap", "-hooks")["data"]["endpoints.yaml"])
    for name in ("orders", "urls"):
        (tmp_path / name).write_text(f"whsec_{base64.b64encode(bytes(24)).decode()}")
    found = read_endpoints(tmp_path / "endpoints.yaml")
    assert [(each.key, each.on) for each in found.named] == [("orders", frozenset({"tagged"}))]
    assert found.for_urls is not None
    assert pod["terminationGracePeriodSeconds"] > _default("timeout_s") + 10


def _default(name: str) -> Any:
    [option] = [each for each in main.params if isinstance(each, click.Option) and each.name == name]
    return option.default


def test_changed_endpoint_restarts_the_pods(newest: Helm) -> None:
    """Because the process reads its file at its start."""
    other = ALL_ON | {"hooks": ALL_ON["hooks"] | {"urls": {"secret_file": "other"}}}
    checksums = {
        of_kind(newest.render(values), "Deployment", "-hooks")["spec"]["template"]["metadata"]["annotations"][
            "checksum/endpoints"
        ]
        for values in (ALL_ON, ALL_ON, other)
    }
    assert len(checksums) == 2


def test_receivers_at_public_addresses_are_open(newest: Helm) -> None:
    """The same as for the workers' sources."""
    manifests = newest.render(ALL_ON)
    web = [
        [rule for rule in of_kind(manifests, "NetworkPolicy", name)["spec"]["egress"] if "0.0.0.0/0" in yaml.dump(rule)]
        for name in ("-worker", "-hooks")
    ]
    assert len(web[0]) == 1
    assert web[0] == web[1]
    closed = PLAIN | {"hooks": ALL_ON["hooks"], "networkPolicy": {"publicWeb": False}}
    policy = of_kind(newest.render(closed), "NetworkPolicy", "-hooks")
    assert "0.0.0.0/0" not in yaml.dump(policy)


@pytest.mark.parametrize("values", [PLAIN], ids=["plain"])
def test_hooks_are_off_by_default(newest: Helm, values: dict[str, Any]) -> None:
    """No object of them is rendered."""
    assert [each for each in newest.render(values) if each["metadata"]["name"].endswith("-hooks")] == []
