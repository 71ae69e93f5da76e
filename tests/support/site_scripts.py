"""Scripts of the documentation site that its theme would otherwise load from a web address.

`python -m tests.support.site_scripts` takes them out of npm packages and puts them into `.venv/site-scripts`; a second
run finds them there. It needs npm, and no root.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.support.processes import ROOT

FOLDER: Final = ROOT / ".venv" / "site-scripts"
"""docs/site/hooks.py reads it."""


@dataclass(frozen=True)
class Script:
    """One file of an npm package, and the sha256 of the package."""

    package: str
    member: str
    sha256: str


SCRIPTS: Final = {
    # The theme's code calls this version of mermaid.
    "mermaid.min.js": Script(
        "mermaid@11.17.2",
        "package/dist/mermaid.min.js",
        "6ad2f42c3fc26bbf9e45cbb6d11898972573ea52b33a5f4ff51952899f950ffd",
    ),
    # Searches where pages are opened as files: browsers start no worker there.
    "iframe-worker.js": Script(
        "iframe-worker@1.0.4",
        "package/shim/index.js",
        "e8c5d12d87829c503afba01d67772ea9f4aba5b7ae57a0c98e1917711030efbb",
    ),
}


class ScriptsError(RuntimeError):
    """The scripts cannot be had here."""


def are_there() -> bool:
    """Whether all scripts were installed."""
    return all((FOLDER / name).exists() for name in SCRIPTS)


def install() -> None:
    """Install the scripts that are missing.

    Raises:
        ScriptsError: npm is missing, cannot reach its registry, or a package is not the expected one.
    """
    if are_there():
        return
    if not shutil.which("npm"):
        raise ScriptsError("expected npm")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, script in SCRIPTS.items():
        with tempfile.TemporaryDirectory(prefix=".script-", dir=FOLDER) as folder:
            _take(script, Path(folder)).rename(FOLDER / name)


def _take(script: Script, folder: Path) -> Path:
    """Download a package and return the path of the script, taken out of it."""
    command = ["npm", "pack", "--silent", "--pack-destination", str(folder), script.package]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise ScriptsError(f"npm pack {script.package}: exit code {done.returncode}: {done.stderr.strip()[-300:]}")
    package = next(folder.glob("*.tgz"))
    found = hashlib.sha256(package.read_bytes()).hexdigest()
    if found != script.sha256:
        raise ScriptsError(f"{script.package}: expected sha256 {script.sha256}, got {found}")
    with tarfile.open(package) as archive:
        archive.extract(script.member, folder, filter="data")
    return folder / script.member


if __name__ == "__main__":
    try:
        install()
    except (ScriptsError, OSError, subprocess.TimeoutExpired, StopIteration, KeyError) as error:
        sys.exit(f"site scripts: {error}; pages opened as files have no search, and diagrams stay text")
