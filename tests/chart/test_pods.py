"""The rendered pods: connection to Redis, termination, probes, label sets, models and network policy."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import time
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from shiwu.broker.redis_url import read_redis_url
from shiwu.cli import main
from shiwu.network.ip_ranges import read_table
from shiwu_worker.config.settings import Settings
from shiwu_worker.errors import ExitCode
from shiwu_worker.health.probe_files import ProbeFiles
from shiwu_worker.launcher.placement import make_placements
from shiwu_worker.runtime.nvidia import Gpu
from shiwu_worker.service.factories import LOADERS_CLOSE_TIMEOUT_S
from shiwu_worker.service.observability import TRACES_CLOSE_TIMEOUT_S
from shiwu_worker.stages.score.label_files import load_label_sets
from tests.chart.cases import ALL_OFF, ALL_ON, CLUSTER, MATRIX, PLAIN, SENTINEL
from tests.conftest import StartWorker
from tests.support.chart import CHART, ChartError, Helm, Manifest, of_kind, pods, variables
from tests.support.checkpoints import quiet_transformers, write_2022
from tests.support.dockerfiles import DOCKER, read
from tests.support.dockerfiles import variables as dockerfile_variables
from tests.support.hub_server import HubServer
from tests.support.processes import clean_environment
from tests.support.rule_sets import write_calibration


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
        (CLUSTER, "cluster://shiwu-worker:$(REDIS_PASSWORD)@a:6379,b:6380/?shards=64"),
        (
            CLUSTER | {"tls": {"enabled": True, "caSecret": "ca"}},
            "clusters://shiwu-worker:$(REDIS_PASSWORD)@a:6379,b:6380/?shards=64"
            "&ssl_ca_certs=/etc/shiwu/redis-ca/ca.crt",
        ),
    ],
)
def test_pods_reach_redis_as_configured(newest: Helm, redis: dict[str, Any], url: str, tmp_path: Path) -> None:
    found = variables(worker_of(newest.render({"redis": redis}))[1])
    assert found["SHIWU_REDIS_URL"] == url
    (tmp_path / "ca.crt").touch()
    filled = re.sub(r"\$\((\w+)\)", "p%40ss", url).replace("/etc/shiwu/redis-ca", str(tmp_path))
    address = read_redis_url(filled, may_be_cluster=True)
    assert (address.password == "p@ss") == ("existingSecret" in redis)
    assert (address.tls is not None, bool(address.primary)) == ("tls" in redis, "sentinel" in redis)
    order = list(found)
    for name in re.findall(r"\$\((\w+)\)", url):
        assert order.index(name) < order.index("SHIWU_REDIS_URL"), "Kubernetes fills in earlier variables only"


def test_gpu_resource_names_are_accepted(newest: Helm) -> None:
    values = PLAIN | {"worker": {"gpu": {"resourceName": "nvidia.com/mig-1g.18gb"}}}
    assert worker_of(newest.render(values))[1]["resources"]["limits"]["nvidia.com/mig-1g.18gb"] == 1
    container = worker_of(newest.render(ALL_OFF))[1]
    assert list(container["resources"]["limits"]) == ["memory"]
    assert variables(container)["SHIWU_DEVICE"] == "cpu"


def test_pod_with_several_gpus_is_probed_at_its_launcher(newest: Helm, tmp_path: Path) -> None:
    """The port of one worker says nothing of the others, and a lost GPU closes it; all of them are scraped."""
    worker = {"gpu": {"count": 3}, "settings": {"ALIVE_FILE": f"{tmp_path}/alive"}}
    manifests = newest.render(PLAIN | {"worker": worker, "monitoring": {"podMonitor": {"enabled": True}}})
    container = worker_of(manifests)[1]
    found, ports = variables(container), {each["name"]: each["containerPort"] for each in container["ports"]}
    assert ports == {"http": 9808, "http-1": 9809, "http-2": 9810}
    placed = make_placements(
        [Gpu(f"gpu{n}", f"GPU-{n}") for n in range(3)],
        settings=Settings.model_validate({"ready_file": found["SHIWU_READY_FILE"]}),
        environment={"SHIWU_HTTP_PORT": found["SHIWU_HTTP_PORT"]},
        cpus=frozenset(range(8)),
    )
    assert [int(each.environment["SHIWU_HTTP_PORT"]) for each in placed] == list(ports.values())
    assert container["readinessProbe"]["exec"]["command"] == ["test", "-e", found["SHIWU_READY_FILE"]]
    assert container["startupProbe"]["exec"] == container["livenessProbe"]["exec"]
    live = container["livenessProbe"]["exec"]["command"]

    process_1 = tmp_path / "stat"

    def is_live(*, started_s_ago: float = 1000.0) -> bool:
        start = float(Path("/proc/uptime").read_text().split()[0]) - started_s_ago
        process_1.write_text(f"1 (tini) S {'0 ' * 18}{int(100 * start)} 0 0\n")
        command = [word.replace("/proc/1/stat", str(process_1)) for word in live]
        return subprocess.run(command, capture_output=True, check=False, timeout=10).returncode == 0

    assert not is_live(), "nothing has started"
    files = ProbeFiles(ready_file=None, alive_file=tmp_path / "alive")
    files.touch_alive(at_s=time.time() - 30)
    assert is_live()
    assert not is_live(started_s_ago=10), "the file of an earlier container"
    files.touch_alive(at_s=time.time() - 5)
    assert is_live(started_s_ago=10)
    files.touch_alive(at_s=time.time() - 90)
    assert not is_live()
    endpoints = of_kind(manifests, "PodMonitor", "worker")["spec"]["podMetricsEndpoints"]
    opened = of_kind(manifests, "NetworkPolicy", "worker")["spec"]["ingress"][0]["ports"]
    served = of_kind(manifests, "Service", "worker")["spec"]["ports"]
    assert [each["port"] for each in endpoints] == [each["port"] for each in opened] == list(ports)
    assert {each["name"]: each["port"] for each in served} == ports


def test_pod_with_several_gpus_holds_more_jobs(newest: Helm) -> None:
    """As many for each GPU; with fewer for each pod, busy pods would ask for more pods."""
    keda = {"keda": {"enabled": True, "jobsPerWorker": 2000}}
    assert newest.render(PLAIN | {"worker": {"gpu": {"count": 2}}, "autoscaling": keda})
    with pytest.raises(ChartError, match="expected at least 2376, which one busy worker holds"):
        newest.render(PLAIN | {"worker": {"gpu": {"count": 3}}, "autoscaling": keda})


def test_grace_time_and_probes_fit_the_settings(newest: Helm) -> None:
    """A pod may drain; nothing but /livez ends it; it has minutes to start."""
    spec, container = worker_of(newest.render(PLAIN | {"worker": {"graceS": 50}}))
    drain_s = 50 + 2 * Settings().redis_timeout_s + LOADERS_CLOSE_TIMEOUT_S + TRACES_CLOSE_TIMEOUT_S
    assert spec["terminationGracePeriodSeconds"] == drain_s + 5
    assert variables(container)["SHIWU_GRACE_S"] == "50"
    by_default, _ = worker_of(newest.render(PLAIN))
    page = (CHART / "README.head.md").read_text(encoding="utf-8")
    assert f"{by_default['terminationGracePeriodSeconds']} by default" in page
    probes = {name: container[f"{name}Probe"] for name in ("startup", "readiness", "liveness")}
    assert {name: probe["httpGet"]["path"] for name, probe in probes.items()} == {
        "startup": "/livez",
        "readiness": "/readyz",
        "liveness": "/livez",
    }
    assert {probe["httpGet"]["port"] for probe in probes.values()} == {"http"}
    assert probes["startup"]["failureThreshold"] * probes["startup"]["periodSeconds"] >= 600
    assert container["ports"][0]["containerPort"] == int(variables(container)["SHIWU_HTTP_PORT"])


def test_ipv6_only_cluster_is_supported(newest: Helm) -> None:
    container = worker_of(newest.render(PLAIN | {"http": {"host": "::"}}))[1]
    assert variables(container)["SHIWU_HTTP_HOST"] == "::"


def test_changed_labels_restart_the_workers(newest: Helm) -> None:
    """Their checksum is on the pods; and the rendered file is one that the worker reads."""

    def checksum(word: str) -> str:
        values = PLAIN | {"labels": {"sets": {"mine": {"labels": ["猫", word]}}}}
        deployment = of_kind(newest.render(values), "Deployment", "worker")
        return str(deployment["spec"]["template"]["metadata"]["annotations"]["checksum/labels"])

    assert checksum("狗") == checksum("狗") != checksum("马")


def test_label_sets_are_read_by_the_worker(newest: Helm, tmp_path: Path) -> None:
    """Also one of version 2 with its calibration file, which may be a text or an object."""
    (tmp_path / "made").mkdir()
    rules = ALL_ON["labels"]["sets"]["rules"]
    text = (tmp_path / "made" / write_calibration(tmp_path / "made", rules, z=2.123456)).read_text(encoding="utf-8")
    given = {"rules.json": json.loads(text), "text.json": text}
    labels = ALL_ON["labels"] | {"calibrations": given}
    data = of_kind(newest.render(ALL_ON | {"labels": labels}), "ConfigMap", "-labels")["data"]
    assert json.loads(data["text.json"]) == json.loads(data["rules.json"]) == json.loads(text)
    for name, content in data.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    sets = load_label_sets([tmp_path])
    found = sets["mine"]
    assert (found.words, found.templates, found.head) == (("猫", "狗"), ("一张{}的照片",), "sigmoid")
    assert (found.scale, found.bias, found.min_cosines) == (100, -28.5, (-1, 0.25))
    assert sets["颜色"].words == ("红", "绿")
    decided = sets["rules"].rules
    assert decided is not None
    assert decided.calibration is not None
    assert (decided.calibration.z, decided.aliases[1], decided.thresholds[1]) == (2.123456, ("dog",), 0.5)
    assert all(re.fullmatch(r"[-._a-zA-Z0-9]+", name) for name in data), "Kubernetes takes no other keys"


def test_private_addresses_stay_blocked(newest: Helm) -> None:
    """What the worker refuses is shut on 80 and 443 too, but for the agent of Pod Identity when asked."""
    policy = of_kind(newest.render(PLAIN), "NetworkPolicy", "worker")["spec"]
    web = [rule for rule in policy["egress"] if {port["port"] for port in rule["ports"]} & {80, 443}]
    (rule,) = web
    blocks = [to["ipBlock"] for to in rule["to"]]
    assert [block["cidr"] for block in blocks] == ["0.0.0.0/0", "2000::/3"]
    whole = [ip_network(block["cidr"]) for block in blocks]
    shut: list[Any] = [ip_network(text) for block in blocks for text in block["except"]]
    for special in (row.network for row in read_table()):
        # Kubernetes takes exceptions of a block only where they lie in it; the rest of IPv6 is not open at all.
        is_open = any(special.version == block.version and special.overlaps(block) for block in whole)
        covers = [each for each in shut if each.version == special.version and special.subnet_of(each)]
        assert covers or not is_open, special
    assert all(any(each.version == block.version and each.subnet_of(block) for block in whole) for each in shut)
    with_agent = of_kind(newest.render(ALL_ON), "NetworkPolicy", "worker")["spec"]
    assert "169.254.170.23/32" in str(with_agent)
    assert [block for rule in with_agent["egress"][:2] for block in re.findall(r"'cidr': '(.+?)'", str(rule))] == [
        "169.254.20.10/32"  # NodeLocal DNSCache
    ]


def test_downloaded_model_is_used_offline(newest: Helm) -> None:
    """The init container writes where the worker reads, and the worker can't write there."""
    spec, container = worker_of(newest.render(ALL_ON))
    (init,) = spec["initContainers"]
    assert init["command"][-1] == variables(container)["SHIWU_MODEL"]
    assert variables(container)["HF_HUB_OFFLINE"] == "1"
    assert variables(init)["HF_HUB_OFFLINE"] == "0", "the image sets 1"
    assert not variables(init)["HF_HOME"].startswith("/models")
    (mount,) = [each for each in container["volumeMounts"] if each["name"] == "model"]
    assert mount["readOnly"] is True


@pytest.mark.parametrize("is_whole", [True, False])
def test_download_without_weights_fails_the_pod(newest: Helm, tmp_path: Path, *, is_whole: bool) -> None:
    """The init container's own command and environment, at a hub whose repository is whole or lacks the weights."""
    spec, _ = worker_of(newest.render(ALL_ON))
    (init,) = spec["initContainers"]
    with quiet_transformers():
        folder = write_2022(tmp_path / "published")
    if not is_whole:
        (folder / "pytorch_model.bin").unlink()
    own = variables(init)
    hub_id, _, revision = own["SHIWU_MODEL"].partition("@")
    hub = HubServer().start()
    try:
        hub.add(hub_id, folder, ref=revision)
        assert init["command"][:3] == ["tini", "--", "shiwu-worker"]
        target = tmp_path / init["command"][-1].lstrip("/")
        env = {name: value for name, value in own.items() if isinstance(value, str)}
        env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hub"), "HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-m", "shiwu_worker", init["command"][3], str(target)],
            env=clean_environment(env),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        hub.stop()
    assert done.returncode == (0 if is_whole else ExitCode.MODEL), done.stderr
    assert (target / ".whole").exists() == is_whole


def test_model_in_the_image_is_not_hidden(newest: Helm) -> None:
    """Nothing is mounted over the image's own folder."""
    container = worker_of(newest.render(MATRIX["baked"]))[1]
    assert variables(container)["SHIWU_MODEL"] == "/models/OFA-Sys/chinese-clip-vit-base-patch16"
    assert not [mount for mount in container["volumeMounts"] if mount["mountPath"].startswith("/models")]


def test_compiled_models_are_kept_in_a_claim(newest: Helm) -> None:
    """Where torch and Triton keep them, with the same paths as the image's; without a claim they are in /tmp."""
    values = {"worker": {"compileCache": {"existingClaim": "compiled"}}}
    spec, container = worker_of(newest.render(PLAIN | values))
    [mount] = [each for each in container["volumeMounts"] if each["name"] == "compiled"]
    [volume] = [each for each in spec["volumes"] if each["name"] == "compiled"]
    assert volume == {"name": "compiled", "persistentVolumeClaim": {"claimName": "compiled"}}
    assert not mount.get("readOnly")
    of_the_image = dockerfile_variables(read(DOCKER / "worker.Dockerfile"))
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        assert variables(container)[name] == of_the_image[name]
        assert Path(of_the_image[name]).parent == Path(mount["mountPath"])
    spec, _ = worker_of(newest.render(PLAIN))
    assert "compiled" not in [each["name"] for each in spec["volumes"]]


def test_volumes_and_mounts_match(newest: Helm) -> None:
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


def test_dns_is_the_clusters_alone(newest: Helm) -> None:
    """Port 53 of other hosts is closed by default: data could leave by it."""
    for name in ("worker", "producer"):
        egress = of_kind(newest.render(PLAIN), "NetworkPolicy", name)["spec"]["egress"]
        [dns] = [rule for rule in egress if {"port": 53, "protocol": "UDP"} in rule["ports"]]
        assert len(dns["to"]) == 2, name


def test_each_part_uses_its_own_redis_user(newest: Helm) -> None:
    found = {}
    for where, spec in pods(newest.render(ALL_ON)):
        own = variables(spec["containers"][0])
        user = own["SHIWU_REDIS_URL"].split("//")[1].split(":")[0]
        found[where.rpartition("shiwu-")[2]] = (user, own["REDIS_PASSWORD"]["secretKeyRef"]["key"])
    assert found == {
        "worker": ("shiwu-worker", "password"),
        "sweep": ("shiwu-sweep", "sweep"),
        "hooks": ("shiwu-hooks", "hooks"),
        "watch": ("shiwu-watcher", "watcher"),
        "producer": ("shiwu-worker", "password"),
        "test-answer": ("shiwu-client", "client"),
    }


def test_each_part_may_have_its_own_url(newest: Helm) -> None:
    """Whole URLs of a Secret; without one a part has the workers'."""
    redis = {"existingSecret": "s", "urlKey": "url"}
    values = ALL_ON | {
        "redis": redis,
        "autoscaling": {},
        "sweep": {"urlKey": "sweep-url"},
        "hooks": ALL_ON["hooks"] | {"urlKey": "hooks-url"},
        "watch": ALL_ON["watch"] | {"urlKey": "watch-url"},
        "test": {"urlKey": "test-url"},
    }
    found = {}
    for where, spec in pods(newest.render(values)):
        source = variables(spec["containers"][0])["SHIWU_REDIS_URL"]["secretKeyRef"]
        assert source["name"] == "s"
        found[where.rpartition("shiwu-")[2]] = source["key"]
    assert found == {
        "worker": "url",
        "sweep": "sweep-url",
        "hooks": "hooks-url",
        "watch": "watch-url",
        "producer": "url",
        "test-answer": "test-url",
    }


def test_redis_is_reached_at_its_peers_alone(newest: Helm) -> None:
    """The port of Redis is open to the named peers; the port of the trial server to its pods."""
    peers = [{"ipBlock": {"cidr": "10.1.2.3/32"}}]
    values = PLAIN | {"redis": {"host": "r", "port": 7000}, "networkPolicy": {"redisPeers": peers}}
    for name in ("worker", "producer"):
        policy = of_kind(newest.render(values), "NetworkPolicy", name)["spec"]
        [rule] = [rule for rule in policy["egress"] if {"port": 7000, "protocol": "TCP"} in rule["ports"]]
        assert rule["to"] == peers
        policy = of_kind(newest.render(MATRIX["trial"]), "NetworkPolicy", name)["spec"]
        [rule] = [rule for rule in policy["egress"] if {"port": 6379, "protocol": "TCP"} in rule["ports"]]
        [to] = rule["to"]
        assert to["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "valkey"


def test_helm_test_gets_its_answer(newest: Helm, start_worker: StartWorker, redis_url: str, tmp_path: Path) -> None:
    """The command of `helm test` and the image of the chart, with a real worker."""
    manifests = newest.render(PLAIN)
    picture = of_kind(manifests, "ConfigMap", "-test")["binaryData"]["picture.jpg"]
    (tmp_path / "picture.jpg").write_bytes(base64.b64decode(picture))
    start_worker(redis_url=redis_url, allow_folders=tmp_path)
    (container,) = of_kind(manifests, "Pod")["spec"]["containers"]
    assert container["command"] == ["tini", "--", "shiwu"]
    args = [argument.replace("/etc/shiwu/test", str(tmp_path)) for argument in container["args"]]
    result = CliRunner().invoke(main, ["--redis-url", redis_url, *args])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert (answer["status"], answer["tags"][0]["label"]) == ("tagged", "动物")
