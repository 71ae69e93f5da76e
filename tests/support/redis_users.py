"""The files with Redis users that the documentation has.

`python -m tests.support.redis_users > docs/redis-acl-cluster.conf` makes the file for a cluster from the one for one
server.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from shiwu.broker.sharding import cluster_shard
from shiwu.contract import RETENTION
from tests.support.processes import ROOT

CONFIG = ROOT / "docs" / "redis-acl.conf"
CONFIG_6 = ROOT / "docs" / "redis-acl-6.conf"
CONFIG_CLUSTER = ROOT / "docs" / "redis-acl-cluster.conf"
NOT_ON_CLUSTERS = ("scaler",)
"""KEDA's, which reads one number of the sweep instead of keys."""
SHARDS = 64
"""For so many shards a worker may hear Celery's revoke."""
_ALSO = {
    "+ping": "+ping +cluster|slots",
    "+publish": "+publish +spublish",
    "+subscribe": "+subscribe +ssubscribe",
    "+unsubscribe": "+unsubscribe +sunsubscribe",
}
"""Commands that a cluster needs besides others. Channels of a shard are on its node alone."""
_WATCHER = "# `shiwu watch`: sends like a producer, and keeps what it could not read."
_HEAD = """\
# Users for shiwu on a Valkey Cluster, or a Redis Cluster of 7.2 or newer (docs/cluster.md). Load it on every node.
#
# It is made from redis-acl.conf, whose notes apply here too, by `python -m tests.support.redis_users`; what differs:
# - Every key and channel begins with the tag of a shard: `{*}:`. A user may use all shards.
# - CLUSTER SLOTS names the node of a shard. SPUBLISH and SSUBSCRIBE are PUBLISH and SUBSCRIBE on one node.
# - A worker receives Celery's revoke from the first 64 shards, each of which is named; with more shards add the others.
# - Everyone may read the number of shards, and workers and the sweep store it at the first use.
# - MinIO's bucket events are in a server of their own, so `shiwu-watcher` has no rights on them here.
# - KEDA's Redis scaler does not work on a cluster, so its user is left out.
# Replicas log in at their primary: `primaryuser shiwu-admin` and `primaryauth` (on Redis `masteruser`, `masterauth`).
# tests/integration/test_acl_cluster.py runs each program as its user on three nodes of Valkey 9.

"""


def users_for(binary: Path) -> str:
    """The file with users that this server reads."""
    output = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
    [(major, minor)] = re.findall(r"v=(\d+)\.(\d+)", output)
    path = CONFIG if (int(major), int(minor)) >= (7, 2) else CONFIG_6
    return path.read_text(encoding="utf-8")


def users_for_cluster() -> str:
    """The text of the file for a cluster."""
    about: list[str] = []
    blocks = []
    for line in CONFIG.read_text(encoding="utf-8").partition("user default off")[2].splitlines():
        if line.startswith("user "):
            name = line.split()[1].removeprefix("shiwu-")
            if name not in NOT_ON_CLUSTERS:
                notes = [_WATCHER] if name == "watcher" else about
                blocks.append("\n".join([*notes, _on_cluster(line, name)]))
            about = []
        elif line:
            about.append(line)
    return _HEAD + "\n\n".join(["# No access without a user name.\nuser default off", *blocks]) + "\n"


def _on_cluster(line: str, name: str) -> str:
    """The line of one user, for all shards."""
    if name == "admin":
        return line
    line = re.sub(r" \([^)]*~bucketevents[^)]*\)", "", line)
    words = [re.sub(r"^(\(?)([~&])", r"\1\2{*}:", _ALSO.get(word, word)) for word in line.split()]
    if name == "worker":
        # A pattern that is subscribed to must be here word for word.
        place = words.index("-@all")
        words[place:place] = [f"&{cluster_shard(index).prefix}/0.celery.pidbox" for index in range(SHARDS)]
    if name in {"worker", "sweep"}:
        words.append("+hsetnx")
    else:
        words.append(f"(+hget ~{{*}}:{RETENTION})")
    return " ".join(words)


if __name__ == "__main__":
    sys.stdout.write(users_for_cluster())
