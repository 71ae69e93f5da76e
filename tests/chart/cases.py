"""Values for the chart: those that must render, and those that must be refused."""

from __future__ import annotations

from typing import Any

import yaml

from tests.support.chart import CHART

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
        "compileCache": {"existingClaim": "compiled"},
        "runtimeClassName": "nvidia",
        "priorityClassName": "high",
        "nodeSelector": {"nvidia.com/gpu.product": "Tesla-T4"},
        "affinity": {"podAntiAffinity": {}},
        "podAnnotations": {"a": "b"},
        "podLabels": {"c": "d"},
        "image": {"digest": "sha256:" + "0" * 64},
    },
    "model": {"source": "download", "download": {"id": "OFA-Sys/chinese-clip-vit-base-patch16", "tokenSecret": "hub"}},
    "labels": {
        "sets": {
            "mine": {
                "head": "sigmoid",
                "scale": 100,
                "bias": -28.5,
                "templates": ["一张{}的照片"],
                "labels": ["猫", {"label": "狗", "min_cosine": 0.25}],
            },
            "颜色": {"labels": ["红", "绿"]},
            "rules": {
                "version": 2,
                "head": "z",
                "unknown": "其他",
                "calibration": "rules.json",
                "labels": ["猫", {"label": "狗", "texts": ["狗", "犬"], "aliases": ["dog"], "threshold": 0.5}],
                "groups": {"animals": {"exclusive": True, "labels": ["猫", "狗"], "parent": "动物"}},
            },
        },
        "calibrations": {"rules.json": {"version": 1, "z": 2.123456}, "text.json": '{"version": 1}\n'},
    },
    "s3": {
        "endpointUrl": "https://s3.pictures.svc",
        "region": "eu",
        "client": "obstore",
        "existingSecret": "s3",
        "podIdentity": True,
    },
    "serviceAccount": {"annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/x"}},
    "autoscaling": {"keda": {"enabled": True, "username": "shiwu-scaler", "passwordKey": "scaler"}},
    "sweep": {"username": "shiwu-sweep", "passwordKey": "sweep"},
    "test": {"username": "shiwu-client", "passwordKey": "client"},
    "producer": {"enabled": True, "references": ["s3://pictures/a.jpg"]},
    "hooks": {
        "enabled": True,
        "endpoints": [
            {"name": "orders", "url": "https://shop.example.org/tags", "secret_file": "orders", "on": ["tagged"]},
        ],
        "urls": {"secret_file": "urls"},
        "existingSecret": "hooks-secrets",
        "args": ["--in-flight", "4"],
        "extraEnv": [{"name": "SHIWU_ALLOW_HOSTS", "value": "shop.internal:8080"}],
        "username": "shiwu-hooks",
        "passwordKey": "hooks",
    },
    "watch": {
        "enabled": True,
        "source": "http://0.0.0.0:8080/events",
        "rules": [{"match": {"bucket": "photos", "suffix": [".jpg"]}, "lane": "bulk", "labels": ["猫", "狗"]}],
        "tokenSecret": "watch-tokens",
        "from": [{"podSelector": {"matchLabels": {"app": "minio"}}}],
        "args": ["--portion", "100"],
        "username": "shiwu-watcher",
        "passwordKey": "watcher",
    },
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
CLUSTER: dict[str, Any] = {
    "existingSecret": "shiwu-redis",
    "username": "shiwu-worker",
    "cluster": {"enabled": True, "addresses": ["a:6379", "b:6380"], "shards": 64},
}
EVENTS: dict[str, Any] = {"enabled": True, "rules": [{"lane": "bulk"}]}
BY_LOAD: dict[str, Any] = {
    "keda": {"enabled": True, "trigger": "metrics-api", "metricsApi": {"url": "http://sweep.pictures.svc:9809/load"}}
}
MATRIX: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "all-on": ALL_ON,
    "all-off": ALL_OFF,
    "gpus": PLAIN | {"worker": {"gpu": {"count": 4}}, "monitoring": {"serviceMonitor": {"enabled": True}}},
    "trial": {"valkey": {"enabled": True}, "autoscaling": {"keda": {"enabled": True}}},
    "trial-in-memory": {"valkey": {"enabled": True, "size": ""}},
    "sentinel-keda": {"redis": SENTINEL, "autoscaling": {"keda": {"enabled": True}}},
    "cluster-keda": {"redis": CLUSTER, "autoscaling": BY_LOAD},
    "url": {"redis": {"existingSecret": "shiwu-redis", "urlKey": "url"}},
    "sqs": PLAIN | {"watch": EVENTS | {"source": "sqs://uploads", "metrics": {"enabled": False}}},
    "cluster-extensions": {
        "redis": CLUSTER,
        "hooks": ALL_ON["hooks"],
        "watch": EVENTS | {"sourceSecret": "minio-events", "sourceKey": "url"},
    },
    "hpa": PLAIN | {"autoscaling": {"hpa": {"enabled": True}}, "monitoring": {"serviceMonitor": {"enabled": True}}},
    "pvc": PLAIN | {"model": {"source": "pvc", "path": "clip", "pvc": {"existingClaim": "models"}}},
    "baked": PLAIN | {"model": {"source": "baked", "path": "OFA-Sys/chinese-clip-vit-base-patch16"}},
    "image": PLAIN | {"model": {"source": "image", "image": {"reference": "registry.example/model:1"}}},
}
EXAMPLES = sorted((CHART / "examples").glob("*.yaml"))
MATRIX |= {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in EXAMPLES}
WRONG: dict[str, tuple[dict[str, Any], str | list[str]]] = {
    "no redis": ({"redis": {"host": ""}}, "expected redis.host, redis.sentinel.enabled, redis.cluster.enabled"),
    "no image of the worker": (
        {"worker": {"device": "cpu", "image": {"repository": ""}}},
        "such as registry.example/shiwu-worker-cpu, got none: no registry has images of shiwu",
    ),
    "no image of the sweep": (
        {"sweep": {"image": {"repository": ""}}},
        "sweep.image.repository: expected the producer's image as your cluster pulls it",
    ),
    "hooks without endpoints": (
        {"hooks": {"enabled": True, "existingSecret": "s"}},
        "hooks.endpoints: expected endpoints",
    ),
    "hooks without secrets": (
        {"hooks": {"enabled": True, "urls": {"secret_file": "urls"}}},
        "hooks.existingSecret: expected a Secret",
    ),
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
    "grace": ({"worker": {"graceS": 60, "terminationGracePeriodSeconds": 70}}, "expected at least 78"),
    "grace with a patient Redis": (
        {"worker": {"terminationGracePeriodSeconds": 40, "settings": {"REDIS_TIMEOUT_S": 8.5}}},
        "expected at least 46",
    ),
    "a variable with a value of its own": (
        {"worker": {"extraEnv": [{"name": "SHIWU_GRACE_S", "value": "300"}]}},
        "extraEnv: SHIWU_GRACE_S: expected it as the value worker.graceS",
    ),
    "nothing returns delayed jobs": (
        {"sweep": {"enabled": False}, "autoscaling": {"keda": {"enabled": True}}},
        "sweep.enabled: expected true if autoscaling.keda.minReplicas is 0",
    ),
    "a download that nothing lets through": (
        {"model": {"source": "download", "download": {"id": "a/b"}}, "networkPolicy": {"publicWeb": False}},
        "networkPolicy: expected publicWeb",
    ),
    "two autoscalers": ({"autoscaling": {"keda": {"enabled": True}, "hpa": {"enabled": True}}}, "got both enabled"),
    "two monitors": (
        {"monitoring": {"podMonitor": {"enabled": True}, "serviceMonitor": {"enabled": True}}},
        "every number would count twice",
    ),
    "trial and real server": ({"valkey": {"enabled": True}}, "together with the trial server"),
    "sentinel with TLS": ({"redis": SENTINEL | {"tls": {"enabled": True}}}, "expected no TLS together with sentinel"),
    "no sentinels": ({"redis": {"sentinel": {"enabled": True}}}, "expected host:port of each sentinel"),
    "no source of events": ({"watch": EVENTS}, "watch.source: expected source or sourceSecret, got neither"),
    "no rules for events": (
        {"watch": {"enabled": True, "source": "sqs://uploads"}},
        "watch.rules: expected at least one rule",
    ),
    "two sources of events": (
        {"watch": EVENTS | {"source": "sqs://uploads", "sourceSecret": "s"}},
        "expected source or sourceSecret, got both",
    ),
    "port below 1024": ({"watch": EVENTS | {"source": "http://0.0.0.0/e"}}, "expected a port from 1024"),
    "port without tokens": (
        {"watch": EVENTS | {"source": "http://0.0.0.0:8080/e"}},
        "watch.tokenSecret: expected a Secret with the tokens",
    ),
    "no nodes": ({"redis": {"cluster": {"enabled": True}}}, "expected host:port of some nodes"),
    "sentinel and cluster": ({"redis": SENTINEL | CLUSTER}, "expected redis.sentinel or redis.cluster"),
    "database of a cluster": ({"redis": CLUSTER | {"database": 1}}, "expected 0 on a cluster"),
    "KEDA's keys on a cluster": (
        {"redis": CLUSTER, "autoscaling": {"keda": {"enabled": True}}},
        "expected metrics-api on a cluster",
    ),
    "load without URL": (
        {"autoscaling": {"keda": {"enabled": True, "trigger": "metrics-api"}}},
        "metricsApi.url: expected the URL",
    ),
    "user without secret": ({"redis": {"username": "shiwu-worker"}}, "redis.existingSecret: expected a Secret"),
    "KEDA and a URL": (
        {"redis": {"host": "", "urlKey": "url", "existingSecret": "s"}, "autoscaling": {"keda": {"enabled": True}}},
        "KEDA cannot read a URL",
    ),
    "workers that ask for workers": (
        {"autoscaling": {"keda": {"enabled": True, "jobsPerWorker": 100}}},
        "expected at least 792, which one busy worker holds",
    ),
    "more at least than at most": ({"autoscaling": {"keda": {"minReplicas": 5}}}, "at least minReplicas 5, got 4"),
    "no claim": ({"model": {"source": "pvc"}}, "model.pvc.existingClaim: expected a claim"),
    "no model": ({"model": {"source": "download"}}, "model.download.id: expected a hub id"),
    "no model image": ({"model": {"source": "image"}}, "model.image.reference: expected an image"),
    "no baked model": ({"model": {"source": "baked"}}, "model.path: expected the folder below /models"),
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
