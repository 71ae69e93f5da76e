"""`shiwu sweep --http-port` on a real cluster: one number for all shards, from a real process."""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

from shiwu import Client
from shiwu.broker.sharding import PoolOptions, cluster_shard, open_shards
from shiwu.contract import WORKERS
from tests.support.processes import LOOPBACK, Process, clean_environment, free_ports
from tests.support.valkey_cluster import ValkeyCluster
from tests.support.waiting import wait_until

SHARDS = 6
JOBS = 30


def get(port: int, path: str) -> str:
    """A page, or an empty text while there is none."""
    try:
        with urllib.request.urlopen(f"http://{LOOPBACK}:{port}{path}", timeout=5) as reply:
            return str(reply.read().decode())
    except OSError:
        return ""


def load(port: int) -> dict[str, Any]:
    """What the page of the load says."""
    found: dict[str, Any] = json.loads(get(port, "/load") or "{}")
    return found


def test_load_of_all_shards_is_one_number(cluster: ValkeyCluster, tmp_path: Path) -> None:
    """Also while a node is down: its shards count as before."""
    url = cluster.url(shards=SHARDS)
    [port] = free_ports(1)
    command = [sys.executable, "-m", "shiwu.cli", "--redis-url", url, "sweep", "--every", "0.1"]
    command += ["--metrics-host", LOOPBACK, "--http-port", str(port)]
    with Process(command, name="sweep", folder=tmp_path, env=clean_environment({})), Client(url) as client:
        wait_until(lambda: load(port).get("jobs") == 0, timeout_s=30, what="the first count")
        list(client.enqueue_many([{"image": "s3://b/k"} for _ in range(JOBS)]))
        [first, *_] = clients = open_shards(url, PoolOptions(timeout_s=5))
        first.zadd(WORKERS, {"worker": 2**50})
        for each in clients:
            each.close()
        wait_until(lambda: load(port).get("jobs") == JOBS, timeout_s=30, what="the jobs")
        assert load(port)["workers"] == 1
        wait_until(lambda: f" {JOBS}.0" in get(port, "/metrics"), timeout_s=30, what="the metrics")
        down = cluster.server(cluster.owner(cluster_shard(0).slot or 0))
        down.kill()
        try:
            wait_until(lambda: load(port).get("shards_away"), timeout_s=60, what="the shards are away")
            assert load(port)["jobs"] == JOBS
        finally:
            down.start()
