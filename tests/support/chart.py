"""The chart as helm renders it, its files, and the schemas that its objects must fit."""

from __future__ import annotations

import copy
import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from tests.support import chart_tools
from tests.support.processes import ROOT

CHART: Final = ROOT / "helm" / "shiwu"
KUBERNETES: Final = "1.35.0"
_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

Manifest = dict[str, Any]
IMAGES: Final = {
    "worker": {"image": {"repository": "shiwu-worker"}},
    "sweep": {"image": {"repository": "shiwu-producer"}},
}
"""The chart has no default for them."""


class ChartError(RuntimeError):
    """helm refused; the text is what it said."""


@dataclass(frozen=True)
class Helm:
    """One helm."""

    path: Path

    def run(self, *args: str, values: Mapping[str, Any] | None = None) -> str:
        """What a command prints.

        Args:
            values: of the chart, over the names of its images.

        Raises:
            ChartError: when it fails.
        """
        command = [str(self.path), *args, *(["--values", "-"] if values is not None else [])]
        done = subprocess.run(
            command,
            input=json.dumps(merged(IMAGES, values)) if values is not None else None,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            # helm looks for a cluster, and keeps caches, at home.
            env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", "KUBECONFIG": "/nonexistent"},
        )
        if done.returncode:
            raise ChartError(done.stderr + done.stdout)
        return done.stdout

    def render(self, values: Mapping[str, Any]) -> list[Manifest]:
        """Every object of the chart, the hooks too."""
        text = _rendered(self, json.dumps(values, sort_keys=True))
        return [found for found in yaml.load_all(text, Loader=_LOADER) if found]


@lru_cache(maxsize=256)
def _rendered(helm: Helm, values: str) -> str:
    return helm.run("template", "trial", str(CHART), "--namespace", "pictures", values=json.loads(values))


def merged(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """Values as helm merges them."""
    result = copy.deepcopy(dict(low))
    for key, value in high.items():
        inner = result.get(key)
        result[key] = merged(inner, value) if isinstance(value, dict) and isinstance(inner, dict) else value
    return result


def tool(name: str) -> Path:
    """A program, or a loud skip; where CI is set a failure."""
    found = chart_tools.find(name)
    if found is None:
        text = f"no {name}: `make chart-tools` installs it"
        if os.environ.get("CI"):
            pytest.fail(text)
        pytest.skip(text)
    return found


@cache
def _custom() -> Mapping[str, Any]:
    """The models of custom resources, which take two seconds to import."""
    from cloudcoil.models.keda import v1alpha1 as keda  # noqa: PLC0415 takes a second
    from cloudcoil.models.prometheus_operator import v1 as operator  # noqa: PLC0415 takes a second

    return {
        "ScaledObject": keda.ScaledObject,
        "TriggerAuthentication": keda.TriggerAuthentication,
        "PodMonitor": operator.PodMonitor,
        "ServiceMonitor": operator.ServiceMonitor,
        "PrometheusRule": operator.PrometheusRule,
    }


def wrongs(manifest: Manifest) -> list[str]:
    """What the schema of its kind says against an object; unknown keys are wrong too.

    Raises:
        KeyError: for a kind without a schema here.
    """
    import kubernetes_validate  # noqa: PLC0415 takes as long as a hundred test files

    kind = manifest["kind"]
    if manifest["apiVersion"].partition("/")[0] in {"keda.sh", "monitoring.coreos.com"}:
        read = _custom()[kind].model_validate(manifest).model_dump(by_alias=True, exclude_unset=True, mode="json")
        return [f"{kind} {path}: unknown key" for path in sorted(_paths(manifest) - _paths(read))]
    try:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{kind} {manifest['metadata']['name']}: {error.message} at {list(error.path)}"]
    return []


def _paths(value: Any, at: str = "") -> set[str]:
    if isinstance(value, dict):
        return {deep for key, inner in value.items() for deep in {f"{at}.{key}", *_paths(inner, f"{at}.{key}")}}
    if isinstance(value, list):
        return {deep for number, inner in enumerate(value) for deep in _paths(inner, f"{at}[{number}]")}
    return set()


def of_kind(manifests: list[Manifest], kind: str, ending: str = "") -> Manifest:
    """The one object of a kind whose name ends so."""
    (found,) = [each for each in manifests if each["kind"] == kind and str(each["metadata"]["name"]).endswith(ending)]
    return found


def pods(manifests: list[Manifest]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, pod's spec) of everything that runs pods."""
    for each in manifests:
        name, spec = f"{each['kind']} {each['metadata']['name']}", each.get("spec", {})
        if each["kind"] == "Pod":
            yield name, spec
        elif each["kind"] == "CronJob":
            yield name, spec["jobTemplate"]["spec"]["template"]["spec"]
        elif "template" in spec:
            yield name, spec["template"]["spec"]


def variables(container: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of a container: value, or where it comes from."""
    return {each["name"]: each.get("value", each.get("valueFrom")) for each in container.get("env", [])}
