"""Makes one cluster of some nodes: gives them all slots in equal parts, and lets them meet.

`make_cluster.py HOST:PORT HOST:PORT …` logs in as shiwu-admin with REDIS_ADMIN_PASSWORD. It may run again: slots that a
node has stay there, and nodes whose addresses have changed meet again.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from typing import Any

import redis

SLOTS = 16_384
TIMEOUT_S = 60.0


def main(addresses: list[str]) -> None:
    """Make the cluster, and wait until each node reports it as complete."""
    until_s = time.monotonic() + TIMEOUT_S
    nodes = [connect(*address.rsplit(":", 1)) for address in addresses]
    if not any(slots_of(node) for node in nodes):
        for index, node in enumerate(nodes):
            first, end = (SLOTS * at // len(nodes) for at in (index, index + 1))
            call(node, "CLUSTER", "ADDSLOTSRANGE", first, end - 1)
            call(node, "CLUSTER", "SET-CONFIG-EPOCH", index + 1)
    for address in addresses[1:]:
        host, port = address.rsplit(":", 1)
        settings: Any = nodes[addresses.index(address)].config_get("cluster-port")
        bus = int(settings["cluster-port"]) or int(port) + 10_000
        call(nodes[0], "CLUSTER", "MEET", socket.gethostbyname(host), port, bus)
    while not all(is_complete(node, len(nodes)) for node in nodes):
        if time.monotonic() > until_s:
            sys.exit(f"expected a cluster of {len(nodes)} nodes within {TIMEOUT_S:g} s; see the logs of the nodes")
        time.sleep(0.2)  # nodes have no way to call when they have met
    print(f"a cluster of {len(nodes)} nodes has all {SLOTS} slots")


def connect(host: str, port: str) -> redis.Redis:
    """One node, as the administrator."""
    return redis.Redis(
        host=host,
        port=int(port),
        username="shiwu-admin",
        password=os.environ["REDIS_ADMIN_PASSWORD"],
        socket_timeout=5,
        decode_responses=True,
    )


def call(node: redis.Redis, *words: str | int) -> Any:
    """The reply to a command."""
    return node.execute_command(*words)  # type: ignore[no-untyped-call]  # redis' own


def slots_of(node: redis.Redis) -> list[Any]:
    """The ranges of slots that a node knows."""
    return list(call(node, "CLUSTER SLOTS"))


def is_complete(node: redis.Redis, count: int) -> bool:
    """Whether a node knows so many nodes, and that each slot has one."""
    info = call(node, "CLUSTER INFO")
    found = info if isinstance(info, dict) else dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    return found["cluster_state"] == "ok" and int(found["cluster_known_nodes"]) == count


if __name__ == "__main__":
    main(sys.argv[1:])
