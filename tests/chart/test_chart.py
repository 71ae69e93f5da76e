"""helm/shiwu through both helms: it renders, fits the schemas, is safe, and refuses wrong values in words."""

from __future__ import annotations

import base64
import copy
import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from shiwu.cli import main
from shiwu.contract import CLAIMS, Lane
from shiwu.contract.keys import SUSPECTS
from shiwu_worker.config import Settings
from shiwu_worker.labels import load_label_sets
from tests.conftest import StartWorker
from tests.support import chart_docs
from tests.support.chart import CHART, ChartError, Helm, Manifest, of_kind, pods, tool, variables, wrongs
from tests.support.chart_tools import HELMS

PLAIN: dict[str, Any] = {"redis": {"host": "redis.pictures.svc"}}
ALL_ON: dict[str, Any] = {
    "redis": {
        "host": "redis.pictures.svc",
        "existingSecret": "shiwu-redis",
        "username": "shiwu-worker",
        "tls": {"enabled": True, "caSecret": "redis-ca"},
    },
    "imagePullSecrets": [{"name": "pull"}],
    "commonLabels": {"team": "pictures"},
    "extraObjects": [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "own"}, "data": {"of": "{{ .Release.Name }}"}}
    ],
    "worker": {
        "args": ["-E"],
        "torchThreads": 2,
        "maxBatch": 32,
        "slots": 400,
        "settings": {"MAX_ATTEMPTS": 5, "MAX_PIXELS": 50000000, "LINGER_MS": 1.5, "SANDBOX": True, "FORMATS": "JPEG"},
        "extraEnv": [{"name": "OTEL_SERVICE_NAME", "value": "{{ .Release.Name }}"}],
        "envFrom": [{"secretRef": {"name": "more"}}],
        "extraVolumes": [{"name": "cache", "emptyDir": {}}],
        "extraVolumeMounts": [{"name": "cache", "mountPath": "/cache"}],
        "runtimeClassName": "nvidia",
        "priorityClassName": "high",
        "nodeSelector": {"nvidia.com/gpu.product": "Tesla-T4"},
        "affinity": {"podAntiAffinity": {}},
        "podAnnotations": {"a": "b"},
        "podLabels": {"c": "d"},
        "image": {"digest": "sha256:" + "0" * 64},
    },
    "model": {"source": "download", "download": {"id": "OFA-Sys/chinese-clip-vit-base-patch16", "tokenSecret": "hub"}},
    "labels": {"sets": {"mine": {"head": "sigmoid", "templates": ["一张{}的照片"], "labels": ["猫", "狗"]}}},
    "s3": {"endpointUrl": "https://s3.pictures.svc", "region": "eu", "existingSecret": "s3", "podIdentity": True},
    "serviceAccount": {"annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/x"}},
    "autoscaling": {"keda": {"enabled": True, "username": "shiwu-scaler", "passwordKey": "scaler"}},
    "sweep": {"username": "shiwu-sweep", "passwordKey": "sweep"},
    "test": {"username": "shiwu-client", "passwordKey": "client"},
    "producer": {"enabled": True, "references": ["s3://pictures/a.jpg"]},
    "networkPolicy": {"s3Peers": [{"podSelector": {}}], "metricsFrom": [{"namespaceSelector": {}}]},
    "monitoring": {
        "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "rules": {"enabled": True},
        "dashboards": {"enabled": True, "annotations": {"grafana_folder": "shiwu"}},
    },
}
ALL_OFF: dict[str, Any] = PLAIN | {
    "worker": {"device": "cpu", "pdb": {"enabled": False}, "topologySpreadConstraints": [], "tolerations": []},
    "sweep": {"enabled": False},
    "networkPolicy": {"enabled": False},
    "serviceAccount": {"create": False},
    "test": {"enabled": False},
}
SENTINEL: dict[str, Any] = {
    "existingSecret": "shiwu-redis",
    "sentinel": {"enabled": True, "addresses": ["a:26379", "b:26380"], "passwordKey": "sentinel"},
}
MATRIX: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "all-on": ALL_ON,
    "all-off": ALL_OFF,
    "trial": {"valkey": {"enabled": True}, "autoscaling": {"keda": {"enabled": True}}},
    "trial-in-memory": {"valkey": {"enabled": True, "size": ""}},
    "sentinel-keda": {"redis": SENTINEL, "autoscaling": {"keda": {"enabled": True}}},
    "url": {"redis": {"existingSecret": "shiwu-redis", "urlKey": "url"}},
    "hpa": PLAIN | {"autoscaling": {"hpa": {"enabled": True}}, "monitoring": {"serviceMonitor": {"enabled": True}}},
    "pvc": PLAIN | {"model": {"source": "pvc", "path": "clip", "pvc": {"existingClaim": "models"}}},
    "image": PLAIN | {"model": {"source": "image", "image": {"reference": "registry.example/model:1"}}},
}
EXAMPLES = sorted((CHART / "examples").glob("*.yaml"))
MATRIX |= {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in EXAMPLES}
ENDPOINT = {"http_port"}
"""The probes' port: a worker without that endpoint does not look at it."""
WRONG: dict[str, tuple[dict[str, Any], str | list[str]]] = {
    "no redis": ({"redis": {"host": ""}}, "expected redis.host, redis.sentinel.enabled, redis.urlKey"),
    "unknown key": (
        {"worker": {"replica": 2}},
        ["additional properties 'replica' not allowed", "Additional property replica is not allowed"],
    ),
    "wrong type": ({"worker": {"replicas": "two"}}, ["got string, want integer", "Expected: integer, given: string"]),
    "unknown setting": (
        {"worker": {"settings": {"LEASES_S": 3}}},
        ["'LEASES_S' not allowed", "property LEASES_S is not allowed"],
    ),
    "a setting with a value of its own": ({"worker": {"settings": {"GRACE_S": 3}}}, "as the value worker.graceS"),
    "grace": ({"worker": {"graceS": 60, "terminationGracePeriodSeconds": 65}}, "expected at least 70"),
    "two autoscalers": ({"autoscaling": {"keda": {"enabled": True}, "hpa": {"enabled": True}}}, "got both enabled"),
    "two monitors": (
        {"monitoring": {"podMonitor": {"enabled": True}, "serviceMonitor": {"enabled": True}}},
        "every number would count twice",
    ),
    "trial beside real": ({"valkey": {"enabled": True}}, "beside the trial server"),
    "sentinel with TLS": ({"redis": SENTINEL | {"tls": {"enabled": True}}}, "expected no TLS together with sentinel"),
    "no sentinels": ({"redis": {"sentinel": {"enabled": True}}}, "expected host:port of each sentinel"),
    "user without secret": ({"redis": {"username": "shiwu-worker"}}, "redis.existingSecret: expected a Secret"),
    "KEDA and a URL": (
        {"redis": {"host": "", "urlKey": "url", "existingSecret": "s"}, "autoscaling": {"keda": {"enabled": True}}},
        "KEDA can't read a URL",
    ),
    "workers that ask for workers": (
        {"autoscaling": {"keda": {"enabled": True, "jobsPerWorker": 100}}},
        "expected at least 216, which one busy worker holds",
    ),
    "more at least than at most": ({"autoscaling": {"keda": {"minReplicas": 5}}}, "at least minReplicas 5, got 4"),
    "no claim": ({"model": {"source": "pvc"}}, "model.pvc.existingClaim: expected a claim"),
    "no model": ({"model": {"source": "download"}}, "model.download.id: expected a hub id"),
    "no model image": ({"model": {"source": "image"}}, "model.image.reference: expected an image"),
    "unknown source": (
        {"model": {"source": "ftp"}},
        ["must be one of 'embedded', 'pvc'", 'must be one of the following: "embedded", "pvc"'],
    ),
    "labels twice": (
        {"labels": {"sets": {"a": {"labels": ["x"]}}, "existingConfigMap": "b"}},
        "expected sets or existingConfigMap, got both",
    ),
    "a label set with a typing error": (
        {"labels": {"sets": {"a": {"label": ["x"]}}}},
        ["missing property 'labels'", "labels is required"],
    ),
    "nothing to enqueue": ({"producer": {"enabled": True}}, "producer.references: expected references"),
    "digest": ({"worker": {"image": {"digest": "latest"}}}, ["does not match pattern", "Does not match pattern"]),
}


def merged(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """Values as helm lays one file over another."""
    result = copy.deepcopy(dict(low))
    for key, value in high.items():
        inner = result.get(key)
        result[key] = merged(inner, value) if isinstance(value, dict) and isinstance(inner, dict) else value
    return result


@pytest.fixture(params=list(HELMS))
def helm(request: pytest.FixtureRequest) -> Helm:
    """One of both helms."""
    return Helm(tool(request.param))


@pytest.fixture
def newest() -> Helm:
    """The newer one, where one is enough."""
    return Helm(tool("helm4"))


def test_both_major_versions_are_here() -> None:
    assert [Helm(tool(name)).run("version", "--short").split(".")[0].strip() for name in HELMS] == ["v3", "v4"]


def test_lint_finds_nothing(helm: Helm) -> None:
    """Also with every feature on."""
    for values in (PLAIN, ALL_ON):
        said = helm.run("lint", "--strict", str(CHART), values=values)
        assert "WARNING" not in said
        assert "ERROR" not in said


@pytest.mark.parametrize("name", MATRIX)
def test_every_object_fits_its_schema(helm: Helm, name: str) -> None:
    """Strictly: a key that a schema does not know is wrong, also in KEDA's and Prometheus' kinds."""
    manifests = helm.render(MATRIX[name])
    assert len(manifests) >= 2
    assert [wrong for each in manifests for wrong in wrongs(each)] == []
    names = [(each["kind"], each["metadata"]["name"]) for each in manifests]
    assert len(set(names)) == len(names)


def test_unknown_keys_would_be_seen(newest: Helm) -> None:
    """The test above can fail, for both sorts of schemas."""
    manifests = newest.render(ALL_ON)
    scaled, deployment = of_kind(manifests, "ScaledObject"), of_kind(manifests, "Deployment", "worker")
    scaled["spec"]["minReplicaCuont"] = 1
    deployment["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    assert wrongs(scaled) == ["ScaledObject .spec.minReplicaCuont: unknown key"]
    assert "readynessProbe" in wrongs(deployment)[0]


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_are_refused_in_words(helm: Helm, name: str) -> None:
    values, words = WRONG[name]
    said = "|".join(re.escape(each) for each in ([words] if isinstance(words, str) else words))
    with pytest.raises(ChartError, match=said):
        helm.render(merged(PLAIN, values))


def test_all_faults_are_told_at_once(newest: Helm) -> None:
    values = {"model": {"source": "pvc"}, "producer": {"enabled": True}}
    with pytest.raises(ChartError, match=r"(?s)producer\.references|model\.pvc") as caught:
        newest.render(values)
    assert all(word in str(caught.value) for word in ("redis:", "model.pvc", "producer.references"))


@pytest.mark.parametrize("name", MATRIX)
def test_pods_are_locked_down(newest: Helm, name: str) -> None:
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
def test_every_setting_in_the_pods_exists(newest: Helm, name: str) -> None:
    """And is taken by the worker with the value that the chart gives it."""
    for where, spec in pods(newest.render(MATRIX[name])):
        for container in spec["containers"]:
            ours = {key: value for key, value in variables(container).items() if key.startswith("SHIWU_")}
            assert {key[len("SHIWU_") :].lower() for key in ours} <= set(Settings.model_fields) | ENDPOINT, where
            plain: dict[str, Any] = {
                key[len("SHIWU_") :].lower(): value for key, value in ours.items() if isinstance(value, str)
            }
            if "redis_url" in plain:
                plain["redis_url"] = plain["redis_url"].replace("$(REDIS_PASSWORD)", "secret")
            Settings(**plain)


def worker_of(manifests: list[Manifest]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(pod's spec, container) of the worker."""
    spec = of_kind(manifests, "Deployment", "worker")["spec"]["template"]["spec"]
    return spec, spec["containers"][0]


@pytest.mark.parametrize(
    ("redis", "url"),
    [
        ({"host": "r"}, "redis://r:6379/0"),
        ({"host": "r", "existingSecret": "s"}, "redis://:$(REDIS_PASSWORD)@r:6379/0"),
        (
            {"host": "r", "existingSecret": "s", "username": "w", "tls": {"enabled": True, "caSecret": "ca"}},
            "rediss://w:$(REDIS_PASSWORD)@r:6379/0?ssl_ca_certs=/etc/shiwu/redis-ca/ca.crt",
        ),
        (
            SENTINEL,
            "sentinel://:$(REDIS_PASSWORD)@a:26379,b:26380/mymaster/0?sentinel_password=$(REDIS_SENTINEL_PASSWORD)",
        ),
    ],
)
def test_the_way_to_redis(newest: Helm, redis: dict[str, Any], url: str) -> None:
    found = variables(worker_of(newest.render({"redis": redis}))[1])
    assert found["SHIWU_REDIS_URL"] == url
    order = list(found)
    for name in re.findall(r"\$\((\w+)\)", url):
        assert order.index(name) < order.index("SHIWU_REDIS_URL"), "Kubernetes fills in earlier variables only"


def test_cards_by_any_name(newest: Helm) -> None:
    values = PLAIN | {"worker": {"gpu": {"resourceName": "nvidia.com/mig-1g.18gb"}}}
    assert worker_of(newest.render(values))[1]["resources"]["limits"]["nvidia.com/mig-1g.18gb"] == 1
    container = worker_of(newest.render(ALL_OFF))[1]
    assert list(container["resources"]["limits"]) == ["memory"]
    assert variables(container)["SHIWU_DEVICE"] == "cpu"


def test_ends_and_probes(newest: Helm) -> None:
    """A pod may drain; nothing but /livez ends it; it has minutes to start."""
    spec, container = worker_of(newest.render(PLAIN | {"worker": {"graceS": 50}}))
    assert spec["terminationGracePeriodSeconds"] == 65
    assert variables(container)["SHIWU_GRACE_S"] == "50"
    probes = {name: container[f"{name}Probe"] for name in ("startup", "readiness", "liveness")}
    assert {name: probe["httpGet"]["path"] for name, probe in probes.items()} == {
        "startup": "/livez",
        "readiness": "/readyz",
        "liveness": "/livez",
    }
    assert {probe["httpGet"]["port"] for probe in probes.values()} == {"http"}
    assert probes["startup"]["failureThreshold"] * probes["startup"]["periodSeconds"] >= 600
    assert container["ports"][0]["containerPort"] == int(variables(container)["SHIWU_HTTP_PORT"])


def test_keda_counts_what_waits_and_what_is_held(newest: Helm) -> None:
    """Every key of both lanes, the claims and the suspects, each once in the formula."""
    spec = of_kind(newest.render(ALL_ON), "ScaledObject")["spec"]
    keys = [trigger["metadata"]["listName"] for trigger in spec["triggers"]]
    assert sorted(keys) == sorted([*itertools.chain.from_iterable(lane.keys for lane in Lane), CLAIMS, SUSPECTS])
    formula = spec["advanced"]["scalingModifiers"]["formula"]
    names = [trigger["name"] for trigger in spec["triggers"]]
    assert sorted(re.findall(r"[a-z]\w+", formula)) == sorted(names)
    lengths = dict.fromkeys(names, 0) | {"interactive_0": 3, "bulk_9": 20, "claimed": 7}
    assert eval(formula, {"__builtins__": {}}, lengths) == 57  # noqa: S307 our own arithmetic
    assert "replicas" not in of_kind(newest.render(ALL_ON), "Deployment", "worker")["spec"]
    assert {trigger["metadata"]["username"] for trigger in spec["triggers"]} == {"shiwu-scaler"}


def test_a_change_of_labels_restarts_the_workers(newest: Helm) -> None:
    """Their checksum is on the pods; and the rendered file is one that the worker reads."""

    def checksum(word: str) -> str:
        values = PLAIN | {"labels": {"sets": {"mine": {"labels": ["猫", word]}}}}
        deployment = of_kind(newest.render(values), "Deployment", "worker")
        return str(deployment["spec"]["template"]["metadata"]["annotations"]["checksum/labels"])

    assert checksum("狗") == checksum("狗") != checksum("马")


def test_label_sets_are_read_by_the_worker(newest: Helm, tmp_path: Path) -> None:
    data = of_kind(newest.render(ALL_ON), "ConfigMap", "-labels")["data"]
    for name, text in data.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    found = load_label_sets([tmp_path])["mine"]
    assert (found.words, found.templates, found.head) == (("猫", "狗"), ("一张{}的照片",), "sigmoid")


def test_strangers_addresses_stay_public(newest: Helm) -> None:
    """No private range and no metadata address is open on 80 and 443, but for the agent of Pod Identity when asked."""
    policy = of_kind(newest.render(PLAIN), "NetworkPolicy", "worker")["spec"]
    web = [rule for rule in policy["egress"] if {port["port"] for port in rule["ports"]} & {80, 443}]
    (rule,) = web
    excluded = set(rule["to"][0]["ipBlock"]["except"])
    assert {"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16", "100.64.0.0/10"} <= excluded
    assert rule["to"][1]["ipBlock"]["cidr"] == "2000::/3"
    with_agent = of_kind(newest.render(ALL_ON), "NetworkPolicy", "worker")["spec"]
    assert "169.254.170.23/32" in str(with_agent)
    assert all("ipBlock" not in str(rule) for rule in with_agent["egress"][:2])


def test_a_downloaded_model_is_used_offline(newest: Helm) -> None:
    """The init container writes where the worker reads, and the worker can't write there."""
    spec, container = worker_of(newest.render(ALL_ON))
    (init,) = spec["initContainers"]
    assert variables(init)["MODEL_FOLDER"] == variables(container)["SHIWU_MODEL"]
    assert variables(container)["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in variables(init)
    (mount,) = [each for each in container["volumeMounts"] if each["name"] == "model"]
    assert mount["readOnly"] is True
    compile(init["command"][2], "download", "exec")


def test_volumes_and_mounts_belong_together(newest: Helm) -> None:
    for values in MATRIX.values():
        for where, spec in pods(newest.render(values)):
            volumes = {each["name"] for each in spec.get("volumes", [])}
            mounted = {
                mount["name"]
                for container in [*spec.get("initContainers", []), *spec["containers"]]
                for mount in container.get("volumeMounts", [])
            }
            claimed = {"data"} if "StatefulSet" in where else set()
            assert mounted - claimed <= volumes, where
            assert volumes - mounted == set(), where


def test_the_trial_keeps_its_password(newest: Helm) -> None:
    """Pods and KEDA read the password from the Secret that the trial server has."""
    manifests = newest.render(MATRIX["trial"])
    secret = of_kind(manifests, "Secret", "-valkey")
    assert secret["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    source = variables(worker_of(manifests)[1])["REDIS_PASSWORD"]["secretKeyRef"]
    assert source == {"name": secret["metadata"]["name"], "key": "password"}
    auth = of_kind(manifests, "TriggerAuthentication")
    assert auth["spec"]["secretTargetRef"][0]["name"] == secret["metadata"]["name"]


def test_each_part_comes_to_redis_as_its_own_user(newest: Helm) -> None:
    found = {}
    for where, spec in pods(newest.render(ALL_ON)):
        own = variables(spec["containers"][0])
        user = own["SHIWU_REDIS_URL"].split("//")[1].split(":")[0]
        found[where.rpartition("shiwu-")[2]] = (user, own["REDIS_PASSWORD"]["secretKeyRef"]["key"])
    assert found == {
        "worker": ("shiwu-worker", "password"),
        "sweep": ("shiwu-sweep", "sweep"),
        "producer": ("shiwu-worker", "password"),
        "test-answer": ("shiwu-client", "client"),
    }


def test_the_test_gets_its_answer(newest: Helm, start_worker: StartWorker, redis_url: str, tmp_path: Path) -> None:
    """The command of `helm test` and the picture of the chart, with a real worker."""
    manifests = newest.render(PLAIN)
    picture = of_kind(manifests, "ConfigMap", "-test")["binaryData"]["picture.jpg"]
    (tmp_path / "picture.jpg").write_bytes(base64.b64decode(picture))
    start_worker(redis_url=redis_url, allow_folders=tmp_path)
    (container,) = of_kind(manifests, "Pod")["spec"]["containers"]
    assert container["command"] == ["shiwu"]
    args = [argument.replace("/etc/shiwu/test", str(tmp_path)) for argument in container["args"]]
    result = CliRunner().invoke(main, ["--redis-url", redis_url, *args])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert (answer["status"], answer["tags"][0]["label"]) == ("tagged", "动物")


def test_notes_warn(newest: Helm) -> None:
    """Of the pictogram model, of the trial server, of an S3 store that the policy may shut out."""
    values = {"valkey": {"enabled": True}, "s3": {"endpointUrl": "http://minio:9000"}}
    said = newest.run("install", "trial", str(CHART), "--dry-run=client", values=values)
    assert all(word in said for word in ("NOT photographs", "for trials", "networkPolicy.s3Peers", "helm test"))


def test_schema_and_readme_are_current() -> None:
    """`make chart-docs` would change nothing."""
    assert (CHART / "values.schema.json").read_text(encoding="utf-8") == chart_docs.schema_text()
    assert (CHART / "README.md").read_text(encoding="utf-8") == chart_docs.readme_text()


def test_the_package_is_whole(newest: Helm, tmp_path: Path) -> None:
    """`helm package` takes what the templates read, and not the examples."""
    newest.run("package", str(CHART), "--destination", str(tmp_path))
    (package,) = tmp_path.glob("*.tgz")
    assert Helm(newest.path).run("template", "trial", str(package), values=ALL_ON).count("kind:") > 15
