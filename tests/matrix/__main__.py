"""`python -m tests.matrix`: one environment for each Python and resolution, and the tests in it.

    lowest    each requirement of the project and its extras at the lower bound of pyproject.toml
    highest   each at the newest release that pyproject.toml allows

torch stays at the version of constraints.txt, because another one may be a download of gigabytes. Where pip finds no
CPU build of it for a Python, `--light` leaves out torch and transformers and the tests that need them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT: Final = Path(__file__).resolve().parents[2]
FOLDER: Final = ROOT / ".venv-matrix"
EXTRAS: Final = ("worker", "gallery", "otel", "obstore")
HEAVY: Final = frozenset({"torch", "transformers"})
PINNED: Final = frozenset({"torch"})
NO_TEST_TOOLS: Final = frozenset({"import-linter", "mypy", "ruff", "boto3-stubs", "types-pyyaml", "matplotlib"})
"""Development tools whose own requirements would hold back what is under test."""
SHOWN: Final = ("celery", "kombu", "redis", "pydantic", "msgspec", "pillow", "transformers", "numpy", "boto3")
TESTS: Final = (
    "tests/unit",
    "tests/integration/test_callbacks.py",
    "tests/integration/test_pending_callbacks.py",
    "tests/integration/test_claim.py",
    "tests/integration/test_client.py",
    "tests/integration/test_dead_letters.py",
    "tests/integration/test_stream.py",
    "tests/integration/test_waiting.py",
)


@dataclass(frozen=True)
class Environment:
    """A Python with one choice of versions."""

    python: Path
    resolution: str
    is_light: bool

    @property
    def name(self) -> str:
        """Such as `3.13-highest-light`."""
        told = subprocess.run(
            [self.python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout.strip()
        return "-".join((told, self.resolution, *(("light",) if self.is_light else ())))


@dataclass(frozen=True)
class Outcome:
    """What became of one environment."""

    name: str
    versions: str
    result: str
    seconds: float
    is_green: bool


def project_requirements() -> Iterator[Requirement]:
    """What the project and the extras that the tests need ask for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for group in (project["dependencies"], *(project["optional-dependencies"][name] for name in EXTRAS)):
        yield from map(Requirement, group)


def pins() -> Iterator[str]:
    """Lines of constraints.txt that hold in every environment: torch, and tools that are not under test."""
    under_test = {canonicalize_name(requirement.name) for requirement in project_requirements()} - PINNED
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    tools = {canonicalize_name(Requirement(line).name) for line in project["optional-dependencies"]["dev"]}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split():
        if canonicalize_name(line.partition("==")[0]) in (tools - under_test) | PINNED:
            yield line


def wanted(environment: Environment) -> list[str]:
    """What pip is asked for beside the project itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*map(str, project_requirements()), *project["optional-dependencies"]["dev"]]
    left_out = NO_TEST_TOOLS | HEAVY if environment.is_light else NO_TEST_TOOLS
    return [line for line in lines if canonicalize_name(Requirement(line).name) not in left_out]


def install(environment: Environment, folder: Path, pip_args: Sequence[str]) -> Path:
    """Make the environment; returns its Python.

    uv chooses the versions, because pip knows no lowest ones. pip installs them, because it honours the configuration
    by which this machine finds its torch.
    """
    subprocess.run([environment.python, "-m", "venv", "--clear", folder], check=True, timeout=300)
    python = folder / "bin" / "python"
    asked, fixed, chosen = (folder / name for name in ("asked.txt", "pins.txt", "chosen.txt"))
    asked.write_text("\n".join(wanted(environment)) + "\n", encoding="utf-8")
    fixed.write_text("\n".join(pins()) + "\n", encoding="utf-8")
    resolution = {"lowest": "lowest-direct", "highest": "highest"}[environment.resolution]
    uv = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--python", python, "--resolution", resolution]
    subprocess.run([*uv, "-c", fixed, "-o", chosen, asked], check=True, timeout=600)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pip_args]
    subprocess.run([*pip, "-c", chosen, "-r", asked], check=True, timeout=1800)
    subprocess.run([*pip, "--no-deps", "-e", ROOT], check=True, timeout=300)
    return python


def versions(python: Path) -> str:
    """The versions that decide, as `celery 5.7.0, …`."""
    code = (
        "import importlib.metadata as m, sys\n"
        "for name in sys.argv[1:]:\n"
        "    try: print(name, m.version(name))\n"
        "    except m.PackageNotFoundError: pass"
    )
    told = subprocess.run([python, "-c", code, *SHOWN], capture_output=True, text=True, timeout=60, check=True)
    return ", ".join(told.stdout.split("\n")).strip(", ")


def run(environment: Environment, *, pip_args: Sequence[str], pytest_args: Sequence[str]) -> Outcome:
    """Install and test one environment."""
    began_s = time.monotonic()
    name = environment.name
    print(f"--- {name}: installing", flush=True)
    try:
        python = install(environment, FOLDER / name, pip_args)
    except subprocess.SubprocessError as error:
        return Outcome(name, "", f"not installed: {error}"[:200], time.monotonic() - began_s, is_green=False)
    found = versions(python)
    print(f"--- {name}: {found}", flush=True)
    command = [python, "-m", "pytest", "-q", "-m", "not gpu and not long and not slow", "-n", "2"]
    command += ["--dist", "loadgroup", "--no-loadscope-reorder", *pytest_args]
    if environment.is_light:
        command += ["-p", "tests.matrix.without_torch"]
    done = subprocess.run([*command, *TESTS], cwd=ROOT, check=False, timeout=3600)
    result = "green" if done.returncode == 0 else f"pytest exit code {done.returncode}"
    return Outcome(name, found, result, time.monotonic() - began_s, is_green=done.returncode == 0)


def main() -> None:
    """Test every environment that is asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__.partition("\n")[0])
    parser.add_argument("--python", action="append", type=Path, help="a Python; may be repeated; default: this one")
    parser.add_argument("--resolution", choices=["lowest", "highest"], help="default: both")
    parser.add_argument("--light", action="store_true", help="without torch and transformers")
    parser.add_argument("--pip-args", default="", help="arguments for pip, such as another index")
    parser.add_argument("pytest_args", nargs="*", help="arguments for pytest, after --")
    asked = parser.parse_args()
    environments = [
        Environment(python, resolution, asked.light)
        for python in asked.python or [Path(sys.executable)]
        for resolution in ([asked.resolution] if asked.resolution else ["lowest", "highest"])
    ]
    outcomes = [
        run(environment, pip_args=asked.pip_args.split(), pytest_args=asked.pytest_args) for environment in environments
    ]
    for outcome in outcomes:
        print(f"{outcome.name:24} {outcome.result:24} {outcome.seconds:5.0f} s   {outcome.versions}")
    sys.exit(0 if all(outcome.is_green for outcome in outcomes) else 1)


if __name__ == "__main__":
    main()
