"""What the rendered ScaledObject counts, and as which Redis user."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
from bench.autoscaler import Rules
from redis.exceptions import NoPermissionError, ResponseError

from shiwu.contract import CANVAS_DUE, CLAIMS, Lane
from shiwu.contract.keys import QUARANTINE
from tests.chart.cases import ALL_ON, BY_LOAD, CLUSTER
from tests.support.chart import Helm, of_kind
from tests.support.processes import ROOT
from tests.support.servers import Valkey


def test_keda_counts_waiting_and_claimed_jobs(newest: Helm) -> None:
    """Every key of both lanes, claims, the quarantine and unsent callbacks, each once in the formula."""
    spec = of_kind(newest.render(ALL_ON), "ScaledObject")["spec"]
    keys = [trigger["metadata"]["listName"] for trigger in spec["triggers"]]
    assert sorted(keys) == sorted(
        [*itertools.chain.from_iterable(lane.keys for lane in Lane), CLAIMS, QUARANTINE, CANVAS_DUE]
    )
    formula = spec["advanced"]["scalingModifiers"]["formula"]
    names = [trigger["name"] for trigger in spec["triggers"]]
    assert sorted(re.findall(r"[a-z]\w+", formula)) == sorted(names)
    lengths = dict.fromkeys(names, 0) | {"interactive_0": 3, "bulk_9": 20, "claimed": 7, "callbacks": 1}
    assert eval(formula, {"__builtins__": {}}, lengths) == 58  # noqa: S307 our own arithmetic
    assert "replicas" not in of_kind(newest.render(ALL_ON), "Deployment", "worker")["spec"]
    assert {trigger["metadata"]["username"] for trigger in spec["triggers"]} == {"shiwu-scaler"}


def test_keda_asks_for_one_number_on_a_cluster(newest: Helm) -> None:
    """It logs in nowhere, and divides the jobs of all shards by those for a worker."""
    manifests = newest.render({"redis": CLUSTER, "autoscaling": BY_LOAD})
    spec = of_kind(manifests, "ScaledObject")["spec"]
    [trigger] = spec["triggers"]
    assert trigger == {
        "type": "metrics-api",
        "metricType": "AverageValue",
        "metadata": {
            "url": "http://sweep.pictures.svc:9809/load",
            "valueLocation": "jobs",
            "targetValue": "1000",
            "activationTargetValue": "0",
        },
    }
    assert "scalingModifiers" not in spec["advanced"]
    assert not [manifest for manifest in manifests if manifest["kind"] == "TriggerAuthentication"]


def test_keda_has_the_permissions_to_count(newest: Helm, valkey_session: Valkey, redis_client: Any) -> None:
    """Its user in redis-acl.conf may run KEDA's script on each key of the ScaledObject, and sees what is there."""
    users = (ROOT / "docs" / "redis-acl.conf").read_text(encoding="utf-8")
    [rights] = re.findall(r"^user shiwu-scaler on >change-me-scaler (.*)$", users, re.M)
    redis_client.execute_command("ACL", "SETUSER", "shiwu-scaler", "on", ">secret", *rights.split())
    redis_client.lpush(Lane.INTERACTIVE.keys[2], "a", "b")
    redis_client.lpush(Lane.BULK.queue, "a")
    redis_client.hset(CLAIMS, mapping={"a": "", "b": ""})
    redis_client.zadd(CANVAS_DUE, {"a": 1})
    rules = Rules.read(of_kind(newest.render(ALL_ON), "ScaledObject"))
    try:
        with valkey_session.client(username="shiwu-scaler", password="secret") as scaler:
            assert rules.metric(scaler) == 10 * 2 + 1 + 2 + 1
            with pytest.raises(NoPermissionError):
                scaler.get("shiwu:results")
            with pytest.raises(ResponseError, match="no permissions to run the 'del' command"):
                scaler.eval("return redis.call('DEL', KEYS[1])", 1, CLAIMS)
    finally:
        redis_client.execute_command("ACL", "DELUSER", "shiwu-scaler")
