"""A container of a rendered pod as a process of this machine: its command, variables, ConfigMaps and probes."""

from __future__ import annotations

import base64
import http.client
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Final

from tests.support.chart import Manifest, of_kind
from tests.support.processes import LOOPBACK, Process, clean_environment

OWN: Final = {"/tmp", "/dev/shm"}  # noqa: S108 what a pod has for itself stands for the same places here
_REFERENCE: Final = re.compile(r"\$\(([A-Za-z_][A-Za-z0-9_]*)\)")


@dataclass(frozen=True)
class Probe:
    """One probe as the kubelet would ask it."""

    port: int
    path: str
    period_s: float
    timeout_s: float
    failures: int

    @property
    def patience_s(self) -> float:
        """So long it may fail."""
        return self.period_s * self.failures

    def passes(self) -> bool:
        """Whether the answer comes in time and is 200 to 399."""
        return (status := self.status()) is not None and 200 <= status < 400

    def status(self) -> int | None:
        """The HTTP status; None where no answer comes in time."""
        connection = http.client.HTTPConnection(LOOPBACK, self.port, timeout=self.timeout_s)
        try:
            connection.request("GET", self.path)
            return connection.getresponse().status
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()


class PodProcess(Process):
    """The first container of a pod's spec.

    Args:
        spec: the pod's spec, out of `manifests`.
        secrets: name of a Secret → its keys and values; ConfigMaps are those of the chart.
        module: a module in place of the command's script, for one with a fault.
    """

    def __init__(
        self,
        spec: Mapping[str, Any],
        manifests: list[Manifest],
        *,
        folder: Path,
        name: str,
        secrets: Mapping[str, Mapping[str, str]],
        module: str | None = None,
    ) -> None:
        (self.container, *_) = spec["containers"]
        self.grace_s = float(spec["terminationGracePeriodSeconds"])
        self._folders = _mounted(spec, self.container, manifests, folder / name)
        env = _variables(self.container, name=name, secrets=secrets)
        super().__init__(
            _here([*self.container.get("command", []), *self.container.get("args", [])], module=module),
            name=name,
            folder=folder,
            env=clean_environment({key: self._moved(value) for key, value in env.items()}),
        )

    def path(self, inside: str) -> Path:
        """Where a path of the container lies here."""
        return Path(self._moved(inside))

    def probe(self, kind: str) -> Probe:
        """The container's `startup`, `readiness` or `liveness` probe."""
        said = self.container[f"{kind}Probe"]
        ports = {each["name"]: int(each["containerPort"]) for each in self.container["ports"]}
        return Probe(
            port=ports[said["httpGet"]["port"]],
            path=said["httpGet"]["path"],
            period_s=said["periodSeconds"],
            timeout_s=said["timeoutSeconds"],
            failures=said["failureThreshold"],
        )

    def _moved(self, text: str) -> str:
        for inside, here in self._folders.items():
            text = text.replace(inside, str(here))
        return text


def _here(command: Sequence[str], *, module: str | None) -> list[str]:
    """The command with this interpreter's own scripts, and without an init that this machine lacks."""
    init = list(command[:2]) if list(command[:2]) == ["tini", "--"] else []
    name, *args = command[len(init) :]
    (script,) = entry_points(group="console_scripts", name=name)
    run = f"import sys; from {script.module} import {script.attr} as main; sys.exit(main())"
    own = ["-m", module] if module else ["-c", run]
    return [*(init if shutil.which("tini") else []), sys.executable, *own, *args]


def _variables(container: Mapping[str, Any], *, name: str, secrets: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for each in container.get("env", []):
        source = each.get("valueFrom", {})
        if "secretKeyRef" in source:
            value = secrets[source["secretKeyRef"]["name"]][source["secretKeyRef"]["key"]]
        elif source:
            if source != {"fieldRef": {"fieldPath": "metadata.name"}}:
                raise ValueError(f"{each['name']}: expected a Secret's key or the pod's name, got {source}")
            value = name
        else:
            # As Kubernetes: earlier variables are filled in, others stay as they are written.
            value = _REFERENCE.sub(lambda match: found.get(match[1], match[0]), each.get("value", ""))
        found[each["name"]] = value
    return found


def _mounted(
    spec: Mapping[str, Any], container: Mapping[str, Any], manifests: list[Manifest], folder: Path
) -> dict[str, Path]:
    """Path in the container → folder here, with what the chart's ConfigMaps put there."""
    volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
    found = {}
    for mount in container.get("volumeMounts", []):
        if mount["mountPath"] in OWN:
            continue
        here = folder / mount["name"]
        here.mkdir(parents=True)
        config = of_kind(manifests, "ConfigMap", volumes[mount["name"]]["configMap"]["name"])
        for name, text in config.get("data", {}).items():
            (here / name).write_text(text, encoding="utf-8")
        for name, raw in config.get("binaryData", {}).items():
            (here / name).write_bytes(base64.b64decode(raw))
        found[mount["mountPath"]] = here
    return found
