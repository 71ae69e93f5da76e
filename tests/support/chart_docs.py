"""The chart's schema and README, made from its values.yaml, and its copy of the Redis users.

`python -m tests.support.chart_docs` writes all three.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

import yaml

from shiwu_worker.config.settings import Settings
from tests.support.processes import ROOT

CHART: Final = ROOT / "helm" / "shiwu"
_SIZE: Final = {"type": "string", "pattern": r"^[0-9.]+([KMGT]i?)?$"}
_SECONDS: Final = {"type": "number", "exclusiveMinimum": 0}
_COUNT: Final = {"type": "integer", "minimum": 0}
_SOME: Final = {"type": "integer", "minimum": 1}
_PORT: Final = {"type": "integer", "minimum": 1, "maximum": 65535}
_FREE: Final = {"type": "object"}
_WORDS: Final = {"type": "object", "additionalProperties": {"type": "string"}}
_STRINGS: Final = {"type": "array", "items": {"type": "string", "minLength": 1}}
_COSINE: Final = {"type": "number", "minimum": -1, "maximum": 1}
_TEXT: Final = {"type": "string", "minLength": 1}
_TEXTS: Final = {"type": "array", "items": _TEXT}
_TEMPLATES: Final = {"type": "array", "items": {"type": "string", "pattern": r"\{\}"}, "minItems": 1}
_SHARE: Final = {"type": "number", "minimum": 0, "maximum": 1}
_LABEL: Final = {
    "type": ["string", "object"],
    "minLength": 1,
    "additionalProperties": False,
    "required": ["label"],
    "properties": {
        "label": _TEXT,
        "min_cosine": _COSINE,
        "texts": _TEXTS,
        "aliases": _TEXTS,
        "templates": _TEMPLATES,
        "group": _TEXT,
        "hidden": {"type": "boolean"},
        "threshold": _SHARE,
    },
}
_GROUP: Final = {
    "type": "object",
    "additionalProperties": False,
    "properties": {"exclusive": {"type": "boolean"}, "parent": _TEXT, "threshold": _SHARE, "labels": _TEXTS},
}
_FILE_NAME: Final = "^[-._a-zA-Z0-9]+$"
_LABEL_SET: Final = {
    "type": "object",
    "additionalProperties": False,
    "required": ["labels"],
    "properties": {
        "labels": {"type": "array", "items": _LABEL, "minItems": 1, "uniqueItems": True},
        "version": {"enum": [1, 2]},
        "templates": _TEMPLATES,
        "head": {"enum": ["softmax", "sigmoid", "z"]},
        "scale": {"type": "number", "exclusiveMinimum": 0},
        "bias": {"type": "number"},
        "min_cosine": _COSINE,
        "description": {"type": "string"},
        "unknown": _TEXT,
        "calibration": {"type": "string", "pattern": _FILE_NAME},
        "groups": {"type": "object", "additionalProperties": _GROUP},
    },
}
_FORMS: Final[Mapping[str, dict[str, Any]]] = {
    "*.resources": _FREE,
    "*.pullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]},
    "*.digest": {"type": "string", "pattern": "^(sha256:[0-9a-f]{64})?$"},
    "*.labels": _WORDS,
    "*.annotations": _WORDS,
    "*.replicas": _COUNT,
    "*.minReplicas": _COUNT,
    "*.maxReplicas": _SOME,
    "imagePullSecrets": {"type": "array", "items": _FREE},
    "commonLabels": _WORDS,
    "extraObjects": {"type": "array", "items": {"type": ["object", "string"]}},
    "worker.command": _STRINGS,
    "worker.args": _STRINGS,
    "worker.device": {"enum": ["gpu", "cpu"]},
    "worker.gpu.count": {"type": "integer", "minimum": 1, "maximum": 16},
    "worker.gpu.resourceName": {"type": "string", "pattern": "^[a-z0-9.-]+/[A-Za-z0-9._-]+$"},
    "worker.loaders": {"type": "integer", "minimum": 1, "maximum": 256},
    "worker.torchThreads": _COUNT,
    "worker.maxBatch": {"type": "integer", "minimum": 0, "maximum": 512},
    "worker.slots": {"type": "integer", "minimum": 0, "maximum": 4096},
    "worker.graceS": _COUNT,
    "worker.terminationGracePeriodSeconds": {"type": ["integer", "null"], "minimum": 1},
    "worker.strategy": _FREE,
    "worker.pdb.unhealthyPodEvictionPolicy": {"enum": ["AlwaysAllow", "IfHealthyBudget"]},
    "worker.nodeSelector": _WORDS,
    "worker.affinity": _FREE,
    "worker.podAnnotations": _WORDS,
    "worker.podLabels": _WORDS,
    "worker.shmSize": _SIZE,
    "worker.tmpSize": _SIZE,
    "worker.probes.*": _SOME,
    "worker.pdb.maxUnavailable": {"type": ["integer", "string"]},
    "model.source": {"enum": ["embedded", "pvc", "download", "image", "baked"]},
    "model.path": {"type": "string", "pattern": r"^([A-Za-z0-9_][A-Za-z0-9._/-]*)?$"},
    "model.download.id": {
        "type": "string",
        "pattern": r"^([A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*)?$",
    },
    "model.download.size": _SIZE,
    "labels": {},
    "labels.sets": {
        "type": "object",
        # Go's syntax: helm checks it.
        "propertyNames": {"pattern": r"^[\p{L}\p{N}][\p{L}\p{M}\p{N}_.-]{0,63}$"},
        "additionalProperties": _LABEL_SET,
    },
    "labels.calibrations": {
        "type": "object",
        "propertyNames": {"pattern": _FILE_NAME},
        "additionalProperties": {"type": ["string", "object"]},
    },
    "redis.port": _PORT,
    "redis.database": _COUNT,
    "redis.sentinel.addresses": {"type": "array", "items": {"type": "string", "pattern": "^[^:@/]+:[0-9]+$"}},
    "redis.cluster.addresses": {"type": "array", "items": {"type": "string", "pattern": "^[^:@/]+:[0-9]+$"}},
    "redis.cluster.shards": {"type": "integer", "minimum": 1, "maximum": 256},
    "valkey.size": {"type": "string", "pattern": r"^([0-9.]+[KMGT]i?)?$"},
    "http.port": {"type": "integer", "minimum": 1024, "maximum": 65535},
    "s3.client": {"enum": ["boto3", "obstore"]},
    "networkPolicy.s3Port": _PORT,
    "podSecurityContext": _FREE,
    "securityContext": _FREE,
    "autoscaling.keda.jobsPerWorker": _SOME,
    "autoscaling.keda.interactiveWeight": _SOME,
    "autoscaling.keda.activation": _COUNT,
    "autoscaling.keda.pollingIntervalS": _SOME,
    "autoscaling.keda.fallback.failures": _SOME,
    "autoscaling.keda.trigger": {"enum": ["redis", "metrics-api"]},
    "autoscaling.keda.metricsApi.url": {"type": "string", "pattern": "^(https?://[^/]+.*)?$"},
    "autoscaling.hpa.minReplicas": _SOME,
    "sweep.everyS": _SECONDS,
    "sweep.metrics.port": _PORT,
    "hooks.replicas": _COUNT,
    "hooks.endpoints": {"type": "array", "items": {"type": "object", "required": ["name", "url", "secret_file"]}},
    "hooks.urls": _FREE,
    "hooks.args": _STRINGS,
    "hooks.metrics.port": _PORT,
    "watch.replicas": _COUNT,
    "watch.source": {"type": "string", "pattern": "^([a-z]+://.+)?$"},
    "watch.rules": {"type": "array", "items": _FREE},
    "watch.args": _STRINGS,
    "watch.metrics.port": _PORT,
    "*.nodeSelector": _WORDS,
    "producer.lane": {"enum": ["interactive", "bulk"]},
    "producer.references": {
        "type": "array",
        "items": {"type": "string", "pattern": "^(s3|https?|file)://"},
    },
    "producer.args": _STRINGS,
    "test.timeoutS": _SOME,
}
"""Schemas of values whose default does not tell their form, by path; `*` is any one part."""


def _settings() -> dict[str, Any]:
    names = sorted(name.upper() for name in Settings.model_fields)
    # Named one by one and not by `propertyNames`, which helm reports at a wrong place.
    plain = {"type": ["string", "number", "boolean"]}
    return {"type": "object", "additionalProperties": False, "properties": dict.fromkeys(names, plain)}


def _schema(value: Any, path: str, special: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    parent, _, name = path.rpartition(".")
    known = special.get(path) or special.get(f"{parent}.*") or (special.get(f"*.{name}") if parent else None)
    if known:
        return known
    if isinstance(value, dict):
        inner = {key: _schema(each, f"{path}.{key}".lstrip("."), special) for key, each in value.items()}
        return {"type": "object", "additionalProperties": False, "properties": inner}
    if isinstance(value, list):
        return {"type": "array", "items": {"type": "object"}}
    if isinstance(value, bool):
        return {"type": "boolean"}
    if isinstance(value, int):
        return _COUNT
    if isinstance(value, str):
        return {"type": "string"}
    raise TypeError(f"values.yaml: {path}: expected a default that tells its type, got {value!r}")


def schema_text() -> str:
    """values.schema.json."""
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    schema = _schema(values, "", {**_FORMS, "worker.settings": _settings()})
    schema["properties"]["global"] = {"type": "object"}
    return json.dumps({"$schema": "http://json-schema.org/draft-07/schema#", **schema}, indent=2) + "\n"


def _rows() -> list[str]:
    rows: list[str] = []
    stack: list[str] = []
    comment = ""
    lines = (CHART / "values.yaml").read_text(encoding="utf-8").splitlines()
    values = yaml.safe_load("\n".join(lines))
    for line in lines:
        if said := re.match(r"\s*# -- (.*)", line):
            comment = said[1]
            continue
        key = re.match(r"(\s*)([A-Za-z0-9]+):(.*)", line)
        if key is None:
            continue
        depth = len(key[1]) // 2
        stack = [*stack[:depth], key[2]]
        value = values
        for part in stack:
            if not isinstance(value, dict) or part not in value:
                break
            value = value[part]
        else:
            if key[3].strip() or comment:
                shown = json.dumps(value, ensure_ascii=False).replace("|", "\\|")
                rows.append(f"| `{'.'.join(stack)}` | `{shown}` | {comment} |")
        comment = ""
    return rows


def readme_text() -> str:
    """README.md: its head by hand, the table from values.yaml."""
    head = (CHART / "README.head.md").read_text(encoding="utf-8")
    table = "\n".join(["| value | default | what it is |", "|---|---|---|", *_rows()])
    return f"{head}\n## Values\n\nMade from values.yaml by `make chart-docs`.\n\n{table}\n"


def users_text() -> str:
    """files/redis-acl.conf: a chart can read its own files only."""
    return (ROOT / "docs" / "redis-acl.conf").read_text(encoding="utf-8")


def write() -> None:
    """All three files."""
    (CHART / "files" / "redis-acl.conf").write_text(users_text(), encoding="utf-8")
    (CHART / "values.schema.json").write_text(schema_text(), encoding="utf-8")
    (CHART / "README.md").write_text(readme_text(), encoding="utf-8")


if __name__ == "__main__":
    write()
