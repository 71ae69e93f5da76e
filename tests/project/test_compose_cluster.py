"""What docker/compose.cluster.yaml promises; its nodes are started with the commands and variables of containers."""

from __future__ import annotations

import json
import re
import sys
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml
from redis.backoff import NoBackoff
from redis.retry import Retry

from shiwu.broker.redis_url import read_redis_url
from shiwu.broker.sharding import PoolOptions, open_shards
from tests.support.dockerfiles import DOCKER, compose_command, run_compose
from tests.support.processes import LOOPBACK, Process, clean_environment, free_ports
from tests.support.redis_server import valkey_binary
from tests.support.waiting import wait_until

NODES = ("valkey-1", "valkey-2", "valkey-3")
USERS = {"worker": "worker", "worker-gpu": "worker", "producer": "client", "sweep": "sweep"}


class Loader(yaml.SafeLoader):
    """Reads the tags of Docker Compose as what they stand before."""


Loader.add_multi_constructor(
    "!",
    lambda loader, _, node: (
        loader.construct_mapping(node, deep=True)
        if isinstance(node, yaml.MappingNode)
        else loader.construct_scalar(node)
    ),
)


@cache
def services() -> dict[str, dict[str, Any]]:
    """The services as they are written, anchors resolved."""
    content: dict[str, Any] = yaml.load((DOCKER / "compose.cluster.yaml").read_text(encoding="utf-8"), Loader)  # noqa: S506 a SafeLoader
    found: dict[str, dict[str, Any]] = content["services"]
    return found


def filled(text: str) -> str:
    """A text with the defaults of its variables."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def environment(name: str) -> dict[str, str]:
    """The variables of a service, with their defaults."""
    return {key: filled(value) for key, value in services()[name]["environment"].items()}


def start_node(name: str, folder: Path, port: int, bus: int) -> Process:
    """A node with its command and variables; files are those that are mounted."""
    service = services()[name]
    mounted = {one["target"]: str(DOCKER / one["source"]) for one in service["volumes"] if isinstance(one, dict)}
    command = [filled(mounted.get(part, part)) for part in service["command"]]
    command += ["--port", str(port), "--cluster-port", str(bus), "--dir", str(folder), "--bind", LOOPBACK]
    folder.mkdir()
    (folder / "valkey-server").symlink_to(valkey_binary())
    env = clean_environment(environment(name) | {"PATH": f"{folder}:/usr/bin:/bin"})
    return Process(command, name=name, folder=folder, env=env)


def refuses_without_a_name(port: int) -> bool:
    """Whether a node answers so, as the health check asks."""
    try:
        # Tried once: a refusal would be tried again for seconds.
        with redis.Redis(host=LOOPBACK, port=port, socket_timeout=5, retry=Retry(NoBackoff(), 0)) as client:
            return bool(client.ping())
    except redis.AuthenticationError:
        return True
    except redis.ConnectionError:
        return False


def test_nodes_become_a_cluster_that_each_service_uses(tmp_path: Path) -> None:
    """Also at a second start; the shards are spread over all nodes."""
    ports = free_ports(6)
    addresses = [f"{LOOPBACK}:{port}" for port in ports[:3]]
    with ExitStack() as stack:
        for name, port, bus in zip(NODES, ports[:3], ports[3:], strict=True):
            stack.enter_context(start_node(name, tmp_path / name, port, bus))
        for port in ports[:3]:
            wait_until(lambda port=port: refuses_without_a_name(port), timeout_s=20, what="the node")
        command = [sys.executable, str(DOCKER / "make_cluster.py"), *addresses]
        assert services()["cluster"]["entrypoint"][2:] == [f"{name}:6379" for name in NODES]
        for number in range(2):
            made = Process(
                command, name=f"made{number}", folder=tmp_path, env=clean_environment(environment("cluster"))
            )
            with made:
                assert made.wait(timeout_s=60) == 0, made.log_tail()
        for name, user in USERS.items():
            url = environment(name)["SHIWU_REDIS_URL"]
            address = read_redis_url(url, may_be_cluster=True)
            assert (address.username, address.hosts) == (f"shiwu-{user}", tuple((node, 6379) for node in NODES))
            url = url.replace(",".join(f"{node}:6379" for node in NODES), ",".join(addresses))
            clients = open_shards(url, PoolOptions(timeout_s=5))
            assert len({_port_after_ping(client) for client in clients}) == len(NODES)


def _port_after_ping(client: redis.Redis) -> int:
    with client:
        assert client.ping()
        connection: Any = client.connection_pool.get_connection()
        client.connection_pool.release(connection)
        return int(connection.port)


def test_docker_compose_reads_both_files() -> None:
    """The nodes take the place of the one server, and each service waits for the cluster."""
    if compose_command() is None:
        pytest.skip("no Docker Compose runs on this machine")
    files = [part for name in ("compose.yaml", "compose.cluster.yaml") for part in ("-f", DOCKER / name)]
    done = run_compose(*files, "--profile", "gpu", "--profile", "observe", "config", "--format", "json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)["services"]
    assert "valkey" not in found
    assert {*NODES, "cluster", *USERS} <= set(found)
    for name in ("worker", "worker-gpu", "sweep"):
        assert set(found[name]["depends_on"]) == {"cluster"}
    for name in USERS:
        assert found[name]["environment"]["SHIWU_REDIS_URL"] == environment(name)["SHIWU_REDIS_URL"]


def test_nodes_are_the_server_of_the_other_file() -> None:
    """The same image and passwords, and they keep what they are given."""
    other = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))["services"]["valkey"]
    for name in NODES:
        service = services()[name]
        assert service["image"] == other["image"]
        assert "ports" not in service
        assert service["volumes"][-1] == f"{name}:/data"
        variables = dict(service["environment"])
        assert variables.pop("REDIS_ADMIN_PASSWORD") == "${REDIS_ADMIN_PASSWORD:-shiwu-demo-admin}"
        assert variables.items() <= other["environment"].items()
        assert "--appendonly yes" in " ".join(service["command"])
