"""What docker/compose.yaml promises, as its text says and as Docker Compose reads it; no container is started.

Its Valkey is started, with the command and the variables that a container would have.
"""

from __future__ import annotations

import json
import re
import subprocess
import textwrap
from functools import cache
from pathlib import Path
from typing import Any, Final

import pytest
import redis
import yaml

from shiwu_worker.config.settings import Settings
from shiwu_worker.service.factories import LOADERS_CLOSE_TIMEOUT_S
from shiwu_worker.service.observability import TRACES_CLOSE_TIMEOUT_S
from tests.support.dockerfiles import DOCKER, PINNED, ROOT, SECRET, compose_command, read, run_compose, variables
from tests.support.processes import Process, clean_environment, free_ports
from tests.support.redis_server import valkey_binary
from tests.support.waiting import wait_until

COMPOSE: Final = DOCKER / "compose.yaml"
IMAGES_PAGE: Final = (ROOT / "docs" / "images.md").read_text(encoding="utf-8")
READ_BY_PRODUCERS: Final = {"SHIWU_REDIS_URL"}
OURS: Final = ["pictures", "worker", "worker-gpu", "producer", "sweep"]


@cache
def services() -> dict[str, dict[str, Any]]:
    """The services as they are written, anchors resolved."""
    content: dict[str, Any] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
    found: dict[str, dict[str, Any]] = content["services"]
    return found


def environment(name: str) -> dict[str, Any]:
    return dict(services()[name].get("environment") or {})


@pytest.mark.parametrize("profiles", [(), ("gpu", "observe")], ids=["plain", "gpu+observe"])
def test_docker_compose_reads_it(profiles: tuple[str, ...]) -> None:
    """The specification's schema and more, by Docker Compose: it knows every key and every reference between them."""
    if compose_command() is None:
        pytest.skip("no Docker Compose runs on this machine")
    asked = [part for profile in profiles for part in ("--profile", profile)]
    done = run_compose("-f", COMPOSE, *asked, "config", "--format", "json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    names = set(json.loads(done.stdout)["services"])
    assert {"valkey", "s3", "pictures", "worker", "producer"} <= names
    assert ("worker-gpu" in names, {"prometheus", "grafana", "sweep"} <= names) == (
        "gpu" in profiles,
        "observe" in profiles,
    )


def test_every_image_of_others_is_pinned() -> None:
    """By tag for people and by digest for machines; our own are built, never pulled."""
    for name, service in services().items():
        if name in OURS:
            assert service["image"].endswith(":local"), name
            assert "build" in service or service["pull_policy"] == "never", name
        else:
            assert PINNED.fullmatch(service["image"]), name


def test_the_parts_are_built_from_our_dockerfiles() -> None:
    """The same repository as context, and the device that the name says."""
    builds = {name: service["build"] for name, service in services().items() if "build" in service}
    assert set(builds) == {"worker", "worker-gpu", "producer", "sweep"}
    for name, build in builds.items():
        assert (DOCKER / build["context"]).resolve() == ROOT, name
        assert (ROOT / build["dockerfile"]).is_file(), name
    assert builds["worker"]["args"] == {"DEVICE": "cpu"}
    assert builds["worker-gpu"]["args"] == {"DEVICE": "cuda"}


def test_settings_exist() -> None:
    """Every SHIWU_ name is a setting of the worker, or one that the client reads."""
    known = {f"SHIWU_{name.upper()}" for name in Settings.model_fields}
    for name in services():
        assert {key for key in environment(name) if key.startswith("SHIWU_")} <= known, name
    assert set(environment("producer")) == READ_BY_PRODUCERS


def test_the_queue_keeps_what_it_is_given() -> None:
    """An AOF in a volume, and no eviction."""
    command = " ".join(services()["valkey"]["command"])
    assert "--appendonly yes" in command
    assert "--maxmemory-policy noeviction" in command
    assert "--maxmemory ${REDIS_MAXMEMORY:-1gb}" in command
    assert services()["valkey"]["volumes"][0] == "valkey:/data"


def filled(text: str) -> str:
    """A text with the defaults of its variables."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def start_valkey(folder: Path) -> tuple[Process, int]:
    """The server with its command and variables, and its port; files are those that are mounted."""
    service = services()["valkey"]
    mounted = {one["target"]: str(DOCKER / one["source"]) for one in service["volumes"] if isinstance(one, dict)}
    assert list(mounted) == ["/etc/shiwu/redis-acl.conf", "/etc/shiwu/valkey-users.sh"]
    [port] = free_ports(1)
    command = [filled(mounted.get(part, part)) for part in service["command"]]
    (folder / "valkey-server").symlink_to(valkey_binary())
    env = {name: filled(value) for name, value in environment("valkey").items()}
    env = clean_environment(env | {"PATH": f"{folder}:/usr/bin:/bin"})
    return Process([*command, "--port", str(port), "--dir", str(folder)], name="valkey", folder=folder, env=env), port


def test_each_service_logs_in_as_its_own_user(tmp_path: Path) -> None:
    """By the defaults; without a name, or as the administrator, no client gets in."""
    process, port = start_valkey(tmp_path)
    roles = {"worker": "worker", "worker-gpu": "worker", "producer": "client", "sweep": "sweep"}
    assert {name for name in services() if "SHIWU_REDIS_URL" in environment(name)} == set(roles)
    with process:
        with redis.Redis(port=port, socket_timeout=5) as client:
            wait_until(lambda: refuses_without_a_name(client), timeout_s=20, what="the server")
        assert b"shiwu-demo" not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
        for name, role in roles.items():
            url = filled(environment(name)["SHIWU_REDIS_URL"])
            with redis.Redis.from_url(url.replace("@valkey:6379/", f"@127.0.0.1:{port}/"), socket_timeout=5) as client:
                assert client.ping()
            assert url.startswith(f"redis://shiwu-{role}:"), name
        for password in ("", "shiwu-demo-admin", "change-me-admin"):
            with (
                redis.Redis(port=port, username="shiwu-admin", password=password, socket_timeout=5) as client,
                pytest.raises(redis.AuthenticationError),
            ):
                client.ping()


def refuses_without_a_name(client: redis.Redis) -> bool:
    """Whether the server answers so; the health check of the service waits for the same word."""
    assert services()["valkey"]["healthcheck"]["test"][1].endswith("grep -q NOAUTH")
    try:
        client.ping()
    except redis.AuthenticationError:
        return True
    except redis.ConnectionError:
        return False
    raise AssertionError("expected a refusal without a name")


def test_nothing_listens_beyond_this_machine() -> None:
    """Every published port is bound to loopback: the demo has no passwords worth the name."""
    ports = [port for service in services().values() for port in service.get("ports", [])]
    assert ports
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []
    assert [name for name, service in services().items() if "network_mode" in service] == []


def test_credentials_are_the_demos_own() -> None:
    """Each can be replaced from outside, its default says what it is, and only those who need the store have it."""
    for name in services():
        for key, value in environment(name).items():
            if SECRET.search(key) and not key.startswith("GF_"):
                is_disabled = key == "REDIS_ADMIN_PASSWORD"
                assert re.fullmatch(r"\$\{\w+:-\}" if is_disabled else r"\$\{\w+:-shiwu-demo[\w-]*\}", value), key
    holders = {name for name in services() if "AWS_SECRET_ACCESS_KEY" in environment(name)}
    assert holders == {"s3", "pictures", "worker", "worker-gpu"}


@pytest.mark.parametrize("name", OURS)
def test_our_own_containers_may_nothing(name: str) -> None:
    """A root that is read-only, no capabilities, no way to new ones; the image's own user."""
    service = services()[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"user", "privileged", "cap_add"} & set(service)


@pytest.mark.parametrize("name", ["worker", "worker-gpu"])
def test_a_worker_is_given_the_time_to_drain(name: str) -> None:
    """As the chart: the grace time, two replies of Redis, the ends of loaders and traces, 5 s to spare."""
    grace_s = float(environment(name)["SHIWU_GRACE_S"])
    drain_s = grace_s + 2 * Settings().redis_timeout_s + LOADERS_CLOSE_TIMEOUT_S + TRACES_CLOSE_TIMEOUT_S
    assert float(services()[name]["stop_grace_period"].removesuffix("s")) == drain_s + 5
    assert f"`--time {drain_s + 5:.0f}`" in IMAGES_PAGE


def test_page_makes_a_password_for_each_user(tmp_path: Path) -> None:
    """Its command leaves no user with the password of the demo."""
    [loop] = re.findall(r"^    for role in .*?^    done[^\n]*", IMAGES_PAGE, re.M | re.S)
    (tmp_path / "docker").mkdir()
    subprocess.run(["sh", "-c", textwrap.dedent(loop)], cwd=tmp_path, check=True, timeout=60)
    lines = (tmp_path / "docker" / ".env").read_text(encoding="utf-8").splitlines()
    made = dict(line.split("=") for line in lines)
    assert made.keys() == {key for key in environment("valkey") if key.startswith("REDIS_")}
    assert len(set(made.values())) == len(made)


def test_the_gpu_is_asked_for_in_its_profile_alone() -> None:
    """Without --profile gpu the file runs where there is none."""
    (device,) = services()["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert services()["worker-gpu"]["profiles"] == ["gpu"]
    assert [name for name, service in services().items() if "deploy" in service] == ["worker-gpu"]


def test_what_is_mounted_exists() -> None:
    """Docker would make an empty folder in place of a file that is missing."""
    mounts = [one for service in services().values() for one in service.get("volumes", [])]
    sources = [one["source"] if isinstance(one, dict) else one.partition(":")[0] for one in mounts]
    files = [(DOCKER / source).resolve() for source in sources if source.startswith(".")]
    assert len(files) >= 5
    assert [place for place in files if not place.exists()] == []


def test_every_picture_that_is_asked_about_is_put() -> None:
    """The producer's references are labels of the samples, in the bucket that the store makes."""
    rows = json.loads((ROOT / "tests/support/samples/samples.json").read_text(encoding="utf-8"))
    asked = [one for one in services()["producer"]["command"] if one.startswith("s3://")]
    assert len(asked) >= 10
    assert set(asked) <= {f"s3://pictures/{row['label']}.jpg" for row in rows}
    assert "-bucket=pictures" in services()["s3"]["command"]
    assert services()["pictures"]["entrypoint"][4:6] == ["--bucket", "pictures"]


def test_the_store_sends_no_telemetry() -> None:
    """SeaweedFS sends it unless it is told not to."""
    assert "-master.telemetry=false" in services()["s3"]["command"]


def test_prometheus_scrapes_workers_and_sweep() -> None:
    """The names of the services, the port of the image and of the sweep."""
    config = yaml.safe_load((DOCKER / "observe" / "prometheus.yaml").read_text(encoding="utf-8"))
    (job,) = config["scrape_configs"]
    (found,) = job["dns_sd_configs"]
    assert set(found["names"]) == {"worker", "worker-gpu", "sweep"}
    assert f"--metrics-port={found['port']}" in services()["sweep"]["command"]
    assert str(found["port"]) == variables(read(DOCKER / "worker.Dockerfile"))["SHIWU_HTTP_PORT"]
    mounted = file_mount("prometheus")
    assert config["rule_files"] == [mounted["target"]]
    assert (DOCKER / mounted["source"]).resolve() == ROOT / "helm/shiwu/files/rules.yaml"


def file_mount(name: str) -> dict[str, Any]:
    """The one file of the chart that is mounted; a missing one is an error, no empty folder."""
    (mounted,) = [one for one in services()[name]["volumes"] if isinstance(one, dict)]
    assert (mounted["read_only"], mounted["bind"]) == (True, {"create_host_path": False})
    return dict(mounted)


def test_grafana_reads_from_prometheus() -> None:
    """The data source's address is the service, and the folder of dashboards is the one that is mounted."""
    sources = yaml.safe_load((DOCKER / "observe/grafana/datasources/prometheus.yaml").read_text(encoding="utf-8"))
    assert [one["url"] for one in sources["datasources"]] == ["http://prometheus:9090"]
    boards = yaml.safe_load((DOCKER / "observe/grafana/dashboards/shiwu.yaml").read_text(encoding="utf-8"))
    (folder,) = [one["options"]["path"] for one in boards["providers"]]
    mounted = file_mount("grafana")
    assert Path(mounted["target"]).parent == Path(folder)
    assert (DOCKER / mounted["source"]).resolve() == ROOT / "helm/shiwu/files/dashboard.json"
