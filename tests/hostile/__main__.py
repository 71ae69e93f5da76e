"""`make hostile`: other projects' test images, crashes and fuzz corpora through the real loaders.

Fetches Pillow's source package from the index that pip uses (pypi.org) and the sources of Debian packages from the
mirror that apt uses (deb.debian.org), once, to `.hostile/`. Packages that cannot be fetched are left out and
reported. The exit code is 0 only if every file was answered, no loader was replaced, and memory and time stayed within
their limits.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Final

from tests.support import bombs
from tests.support.loader_pool import Found, Pool, load_all

ROOT: Final = Path(__file__).resolve().parents[2]
FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF", "HEIF")
DEBIAN: Final = ("libpng1.6", "libheif", "tiff", "giflib", "exiv2")
NAMES: Final = re.compile(
    r"\.(jpe?g|jpe|jfif|mpo|a?png|webp|gif|avif|heic|heif|tiff?|bmp|dib|ico|crash|poc|bin)$|crash|oom|timeout|poc|fuzz",
    re.IGNORECASE,
)
SOURCES: Final = re.compile(
    r"\.(c|cc|cpp|h|hpp|py|txt|md|rst|in|am|cmake|sh|out|xmp|html|m4|yml|exv|po)$", re.IGNORECASE
)
MAX_BYTES: Final = 20 * 1024 * 1024
MEMORY_BYTES: Final = 2 * 1024**3
LOAD_S: Final = 60.0
"""Enough for bombs that are eight times the largest allowed image together, on two cores."""
FETCH_S: Final = 300.0
RUN_S: Final = 900.0


def main() -> None:
    """Fetch all corpora, run them, and count."""
    parser = argparse.ArgumentParser(prog="hostile", description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / ".hostile", help="keeps what was fetched")
    parser.add_argument("--offline", action="store_true", help="take what is there, fetch nothing")
    asked = parser.parse_args()
    if not asked.offline:
        fetch_pillow(asked.folder / "pillow")
        for package in DEBIAN:
            fetch_debian(package, asked.folder / package)
    is_good = True
    corpora = sorted(path.name for path in asked.folder.iterdir()) if asked.folder.is_dir() else []
    for name in ["own", *corpora]:
        with tempfile.TemporaryDirectory(prefix="shiwu-hostile-") as place:
            files = own() if name == "own" else unpacked(asked.folder / name)
            paths = list(written(files, Path(place)))
            if paths:
                is_good &= run(name, paths, Path(place))
    sys.exit(0 if is_good else 1)


def run(name: str, paths: list[Path], folder: Path) -> bool:
    """Run one corpus; print the figures, and return whether they keep the promises."""
    options = {"max_bytes": MAX_BYTES, "max_pixels": bombs.MAX_PIXELS, "max_side": 65_535, "formats": FORMATS}
    with Pool(
        folder, processes=2, spares=1, memory_bytes=MEMORY_BYTES, task_timeout_s=LOAD_S, is_exact=False, **options
    ) as pool:
        found = load_all(paths, pool, timeout_s=RUN_S)
    is_good = (
        len(found.answers) == len(paths)
        and not found.restarts
        and found.peak_bytes < MEMORY_BYTES
        and "decoder_timeout" not in found.counts
    )
    print(f"{name}: {'as promised' if is_good else 'NOT AS PROMISED'}: {summary(found, len(paths))}", flush=True)
    return is_good


def summary(found: Found, count: int) -> str:
    """Return one line of figures."""
    counts = ", ".join(f"{name} {number}" for name, number in found.counts.most_common())
    return (
        f"{len(found.answers)} of {count} answered in {found.took_s:.0f} s, {found.restarts} loaders replaced, "
        f"{found.peak_bytes / 1e6:.0f} MB at most in one sandbox, {found.slowest[0]:.1f} s for {found.slowest[1]}; "
        f"{counts}"
    )


def own() -> Iterator[tuple[str, bytes]]:
    """shiwu's own bombs and truncated files."""
    yield from bombs.all_files().items()


def unpacked(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the images in a corpus' source archives."""
    for archive in folder.glob("*.tar.*"):
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.isfile() and NAMES.search(member.name) and not SOURCES.search(member.name):
                    file = tar.extractfile(member)
                    data = file.read(MAX_BYTES + 1) if file else b""
                    yield Path(member.name).name, data


def written(files: Iterator[tuple[str, bytes]], folder: Path) -> Iterator[Path]:
    """Write each different file once, under a name made of its digest and its own name."""
    digests = set()
    for name, data in files:
        digest = hashlib.sha256(data).hexdigest()[:8]
        if digest not in digests:
            digests.add(digest)
            path = folder / f"{digest}-{re.sub(r'[^A-Za-z0-9._-]', '_', name)[-80:]}"
            path.write_bytes(data)
            yield path


def fetch_pillow(folder: Path) -> None:
    """Fetch Pillow's source package in the installed version, with about a thousand test images."""
    if any(folder.glob("*.tar.gz")):
        return
    wanted = f"pillow=={version('pillow')}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", wanted]
    _try("pillow", [*command, "--dest", str(folder)], folder)


def fetch_debian(package: str, folder: Path) -> None:
    """Fetch a Debian source package without changing this machine's package lists."""
    if any(folder.glob("*.tar.*")):
        return
    with tempfile.TemporaryDirectory(prefix="shiwu-apt-") as name:
        place = Path(name)
        (place / "lists" / "partial").mkdir(parents=True)
        (place / "sources.list").write_text("".join(f"{line}\n" for line in _source_lines()))
        options = [
            f"Dir::Etc::SourceList={place}/sources.list",
            "Dir::Etc::SourceParts=/dev/null",
            f"Dir::State::lists={place}/lists",
            f"Dir::Cache={place}",
            "APT::Sandbox::User=root",
        ]
        flags = [part for option in options for part in ("-o", option)]
        if _try(package, ["apt-get", *flags, "-qq", "update"], folder):
            _try(package, ["apt-get", *flags, "-qq", "source", "--download-only", package], folder)


def _source_lines() -> Iterator[str]:
    """Yield deb-src lines for the mirror and release that this machine's apt uses."""
    old, new = Path("/etc/apt/sources.list"), Path("/etc/apt/sources.list.d/debian.sources")
    texts = [path.read_text() for path in (old, new) if path.is_file()]
    line = re.compile(r"^(?:URIs:|deb)\s.*?(https?://\S+/debian)(?=[/\s])", re.MULTILINE)
    mirror = next((found[1] for text in texts if (found := line.search(text))), None)
    release = re.search(r"VERSION_CODENAME=(\w+)", Path("/etc/os-release").read_text())
    key = "/usr/share/keyrings/debian-archive-keyring.gpg"
    name = release[1] if release else "stable"
    yield f"deb-src [signed-by={key}] {mirror or 'http://deb.debian.org/debian'} {name} main"


def _try(name: str, command: list[str], folder: Path) -> bool:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=FETCH_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"{name}: left out: {type(error).__name__}")
        return False
    if done.returncode:
        print(f"{name}: left out: {' '.join(command[:2])} ended with {done.returncode}: {done.stderr.strip()[-200:]}")
    return done.returncode == 0


if __name__ == "__main__":
    main()
