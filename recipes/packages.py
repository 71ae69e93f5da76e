"""Packages of PyPI, npm and Debian: fetched by name and version, and checked against a sha256.

The registries' own clients fetch them: pip, npm, apt-get.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

TABLE: Final = Path(__file__).with_name("packages.tsv")
FETCH_S: Final = 600.0
DEBIAN_RELEASE: Final = "bookworm"
"""The release that has the versions of packages.tsv. The machine may run another one."""
KEYRING: Final = "/usr/share/keyrings/debian-archive-keyring.gpg"
# One wheel for every machine: the recipes read data files, and run no code of these packages.
WHEEL_TAGS: Final = (
    "--only-binary=:all:",
    "--implementation=cp",
    "--python-version=3.11",
    "--abi=cp311",
    "--abi=abi3",
    "--abi=none",
    "--platform=manylinux_2_28_x86_64",
    "--platform=manylinux_2_24_x86_64",
    "--platform=manylinux2014_x86_64",
)


class PackageError(Exception):
    """A package cannot be fetched, or its archive is another one than the recipes were written for."""


@dataclass(frozen=True, slots=True)
class Package:
    """One archive of a registry."""

    registry: str
    """`pypi`, `pypi-source`, `npm` or `debian`."""
    name: str
    version: str
    sha256: str

    @property
    def key(self) -> str:
        """Such as `npm:material-kit@2.0.4`; the other tables name packages so."""
        return f"{self.registry}:{self.name}@{self.version}"


def read_rows(path: Path) -> list[list[str]]:
    """The rows of a table with tabs between its columns, without empty lines and comments."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.split("\t") for line in lines if line and not line.startswith("#")]


def read_packages() -> dict[str, Package]:
    """All packages of packages.tsv, by their keys."""
    packages = [Package(*row) for row in read_rows(TABLE)]
    return {package.key: package for package in packages}


def unpack(key: str, folder: Path) -> Path:
    """Fetch and unpack one package, unless it is there already.

    Args:
        folder: keeps archives and unpacked packages between runs.

    Raises:
        PackageError: the package is not in packages.tsv, cannot be had, or has another sha256.
    """
    package = read_packages().get(key)
    if package is None:
        raise PackageError(f"{key}: expected a line in {TABLE.name}")
    place = folder / re.sub(r"[^\w.+-]", "_", key)
    if not place.is_dir():
        archive = fetch(package, folder / "archives")
        partial = place.with_name(f"{place.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _extract(archive, partial)
        partial.rename(place)
    return place


def fetch(package: Package, folder: Path) -> Path:
    """The archive of one package, downloaded unless it is there already, with the sha256 of packages.tsv."""
    kept = folder / package.sha256
    found = next(kept.iterdir(), None) if kept.is_dir() else None
    if found is None:
        with tempfile.TemporaryDirectory(prefix="shiwu-recipes-") as name:
            place = Path(name)
            for command in _commands(package, place):
                _run(package, command, place)
            archives = [path for path in place.iterdir() if path.is_file() and path.name != "sources.list"]
            if len(archives) != 1:
                raise PackageError(f"{package.key}: expected one archive, got {len(archives)}")
            _check(package, archives[0])
            kept.mkdir(parents=True, exist_ok=True)
            found = Path(shutil.move(archives[0], kept / archives[0].name))
    _check(package, found)
    return found


def _check(package: Package, archive: Path) -> None:
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise PackageError(f"{package.key}: expected an archive with sha256 {package.sha256}, got {digest}")


def _commands(package: Package, place: Path) -> Iterator[list[str]]:
    """The commands that leave the archive in the folder `place`, where they run."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--dest",
        ".",
    ]
    match package.registry:
        case "pypi":
            yield [*pip, *WHEEL_TAGS, f"{package.name}=={package.version}"]
        case "pypi-source":
            yield [*pip, "--no-binary=:all:", f"{package.name}=={package.version}"]
        case "npm":
            yield ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
        case "debian":
            apt = ["apt-get", *_apt_options(place), "-qq"]
            yield [*apt, "update"]
            yield [*apt, "download", f"{package.name}={package.version}"]
        case other:
            raise PackageError(f"{package.key}: expected pypi, pypi-source, npm or debian, got {other}")


def _apt_options(place: Path) -> Iterator[str]:
    """Options that leave this machine's lists of packages alone, and ask for DEBIAN_RELEASE at the machine's mirror."""
    (place / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    files = (Path("/etc/apt/sources.list"), Path("/etc/apt/sources.list.d/debian.sources"))
    line = re.compile(r"^(?:URIs:|deb)\s.*?(https?://\S+/debian)(?=[/\s])", re.MULTILINE)
    texts = [path.read_text(encoding="utf-8") for path in files if path.is_file()]
    mirror = next((found[1] for text in texts if (found := line.search(text))), "http://deb.debian.org/debian")
    sources = place / "sources.list"
    sources.write_text(f"deb [signed-by={KEYRING}] {mirror} {DEBIAN_RELEASE} main\n", encoding="utf-8")
    for option in (
        f"Dir::Etc::SourceList={sources}",
        "Dir::Etc::SourceParts=/dev/null",
        f"Dir::State::lists={place}/lists",
        f"Dir::Cache={place}/lists",
        "APT::Sandbox::User=root",
    ):
        yield from ("-o", option)


def _run(package: Package, command: list[str], place: Path) -> None:
    try:
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=FETCH_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PackageError(f"{package.key}: {command[0]} failed: {error}") from error
    if done.returncode:
        raise PackageError(f"{package.key}: {command[0]} exited with {done.returncode}: {done.stderr.strip()[-400:]}")


def _extract(archive: Path, place: Path) -> None:
    if archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", archive, place], check=True, timeout=FETCH_S)
    elif archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as zipped:
            zipped.extractall(place)
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(place, filter="data")
