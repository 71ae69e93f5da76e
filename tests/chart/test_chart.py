"""helm/shiwu through both helms: it renders, fits the schemas, is safe, and refuses wrong values in words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from shiwu.watch.command import watch
from shiwu_worker.config.settings import Settings
from tests.chart.cases import ALL_ON, MATRIX, PLAIN, WRONG
from tests.support import chart_docs
from tests.support.chart import CHART, ChartError, Helm, merged, of_kind, pods, tool, variables, wrongs
from tests.support.chart_tools import HELMS

OF_COMMANDS = {parameter.envvar for parameter in watch.params if parameter.envvar}
"""Variables that name no setting of a worker."""


def test_both_major_versions_of_helm_are_installed() -> None:
    assert [Helm(tool(name)).run("version", "--short").split(".")[0].strip() for name in HELMS] == ["v3", "v4"]


def test_helm_lint_reports_nothing(helm: Helm) -> None:
    """Also with every feature on."""
    for values in (PLAIN, ALL_ON):
        said = helm.run("lint", "--strict", str(CHART), values=values)
        assert "WARNING" not in said
        assert "ERROR" not in said


@pytest.mark.parametrize("name", MATRIX)
def test_every_object_matches_its_schema(helm: Helm, name: str) -> None:
    """Strictly: a key that a schema does not know is wrong, also in KEDA's and Prometheus' kinds."""
    manifests = helm.render(MATRIX[name])
    assert len(manifests) >= 2
    assert [wrong for each in manifests for wrong in wrongs(each)] == []
    names = [(each["kind"], each["metadata"]["name"]) for each in manifests]
    assert len(set(names)) == len(names)


def test_unknown_keys_are_detected(newest: Helm) -> None:
    """The test above can fail, for both sorts of schemas."""
    manifests = newest.render(ALL_ON)
    scaled, deployment = of_kind(manifests, "ScaledObject"), of_kind(manifests, "Deployment", "worker")
    scaled["spec"]["minReplicaCuont"] = 1
    deployment["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    assert wrongs(scaled) == ["ScaledObject .spec.minReplicaCuont: unknown key"]
    assert "readynessProbe" in wrongs(deployment)[0]


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_are_refused_with_a_reason(helm: Helm, name: str) -> None:
    values, words = WRONG[name]
    said = "|".join(re.escape(each) for each in ([words] if isinstance(words, str) else words))
    with pytest.raises(ChartError, match=said):
        helm.render(merged(PLAIN, values))


def test_all_wrong_values_are_reported_together(newest: Helm) -> None:
    values = {"model": {"source": "pvc"}, "producer": {"enabled": True}}
    with pytest.raises(ChartError, match=r"(?s)producer\.references|model\.pvc") as caught:
        newest.render(values)
    assert all(word in str(caught.value) for word in ("redis:", "model.pvc", "producer.references"))


@pytest.mark.parametrize("name", MATRIX)
def test_pods_have_minimal_privileges(newest: Helm, name: str) -> None:
    """What a security scanner asks: no root, no writable root, no capability, no token, bounded memory, no :latest."""
    manifests = newest.render(MATRIX[name])
    for where, spec in pods(manifests):
        assert spec["automountServiceAccountToken"] is False, where
        assert spec["enableServiceLinks"] is False, where
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), where
        pod = spec["securityContext"]
        assert (pod["runAsNonRoot"], pod["runAsUser"], pod["seccompProfile"]["type"]) == (True, 10001, "RuntimeDefault")
        assert not [volume for volume in spec.get("volumes", []) if "hostPath" in volume], where
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            guard = container["securityContext"]
            assert guard["allowPrivilegeEscalation"] is False, where
            assert guard["readOnlyRootFilesystem"] is True, where
            assert guard["capabilities"] == {"drop": ["ALL"]}, where
            assert "memory" in container["resources"]["limits"], where
            assert {"cpu", "memory"} <= set(container["resources"]["requests"]), where
            assert re.search(r"(:[\w.-]+|@sha256:\w{64})$", container["image"]), where
            assert not container["image"].endswith(":latest"), where
    for each in manifests:
        assert each["kind"] not in {"ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding"}
        text = yaml.safe_dump(each)
        assert "password:" not in text or each["kind"] == "Secret"


@pytest.mark.parametrize("name", MATRIX)
def test_every_setting_in_the_pods_exists(newest: Helm, name: str, tmp_path: Path) -> None:
    """And is taken by the worker with the value that the chart gives it."""
    mounted = tmp_path / "ca.crt"
    mounted.touch()
    for where, spec in pods(newest.render(MATRIX[name])):
        for container in spec["containers"]:
            ours = {key: value for key, value in variables(container).items() if key.startswith("SHIWU_")}
            ours = {key: value for key, value in ours.items() if key not in OF_COMMANDS}
            assert {key[len("SHIWU_") :].lower() for key in ours} <= set(Settings.model_fields), where
            plain: dict[str, Any] = {
                key[len("SHIWU_") :].lower(): value for key, value in ours.items() if isinstance(value, str)
            }
            if "redis_url" in plain:
                plain["redis_url"] = plain["redis_url"].replace("$(REDIS_PASSWORD)", "secret")
                plain["redis_url"] = plain["redis_url"].replace("/etc/shiwu/redis-ca/ca.crt", str(mounted))
            Settings(**plain)


def test_default_labels_are_the_worker_s() -> None:
    """Requests without labels get the same answers in the chart as elsewhere."""
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    assert values["labels"]["default"] == Settings.model_fields["default_labels"].default


def notes(helm: Helm, values: dict[str, Any]) -> str:
    """What an installation prints, words separated by one blank."""
    said = helm.run("install", "trial", str(CHART), "--dry-run=client", values=values)
    return " ".join(said.partition("NOTES:")[2].split())


def test_notes_warn(newest: Helm) -> None:
    """Of the embedded model, of the trial server, of an S3 store that the policy may shut out."""
    said = notes(newest, {"valkey": {"enabled": True}, "s3": {"endpointUrl": "http://minio:9000"}})
    assert all(
        word in said for word in ("photo-zh knows some 1,000 kinds", "for trials", "networkPolicy.s3Peers", "helm test")
    )
    assert "user default is off" in said
    assert "redisPeers" not in said


def test_notes_name_what_is_open_at_your_redis(newest: Helm) -> None:
    """A port that is open to every address, the user default, and parts that share the workers' user."""
    assert "port 6379 is open to every address: name your Redis in networkPolicy.redisPeers" in notes(newest, PLAIN)
    assert "The workers use Redis' user default" in notes(newest, PLAIN)
    redis = {"host": "r", "existingSecret": "s", "username": "shiwu-worker"}
    shared = notes(newest, {"redis": redis, "sweep": {"username": "shiwu-sweep", "passwordKey": "sweep"}})
    assert "The workers' Redis user also serves test (" in shared
    own = {"username": "shiwu-client", "passwordKey": "client"}
    peers: dict[str, Any] = {"redisPeers": [{"podSelector": {}}]}
    said = notes(newest, {"redis": redis, "sweep": own, "test": own, "networkPolicy": peers})
    assert "Redis" not in said


def test_schema_readme_and_users_are_current() -> None:
    """`make chart-docs` would change nothing."""
    assert (CHART / "values.schema.json").read_text(encoding="utf-8") == chart_docs.schema_text()
    assert (CHART / "README.md").read_text(encoding="utf-8") == chart_docs.readme_text()
    assert (CHART / "files" / "redis-acl.conf").read_text(encoding="utf-8") == chart_docs.users_text()


def test_chart_package_is_complete(newest: Helm, tmp_path: Path) -> None:
    """`helm package` takes what the templates read, and not the examples."""
    newest.run("package", str(CHART), "--destination", str(tmp_path))
    (package,) = tmp_path.glob("*.tgz")
    assert Helm(newest.path).run("template", "trial", str(package), values=ALL_ON).count("kind:") > 15
