"""recipes.packages: the table of packages, and what happens where an archive is another one."""

from __future__ import annotations

import hashlib
import re
import zipfile
from pathlib import Path

import pytest
from recipes import packages
from recipes.packages import Package, PackageError, fetch, read_packages, unpack


def kept_archive(folder: Path, data: bytes, *, sha256: str) -> Package:
    """A package whose archive lies in the folder already."""
    (folder / sha256).mkdir(parents=True)
    (folder / sha256 / "a-1.whl").write_bytes(data)
    return Package("pypi", "a", "1", sha256)


def test_every_package_has_a_version_and_a_sha256() -> None:
    """Nothing is left to the day on which it is fetched."""
    found = read_packages()
    assert len(found) > 15
    for key, package in found.items():
        assert re.fullmatch(r"(pypi|pypi-source|npm|debian):[\w.+-]+@[0-9][\w.+~:-]*", key)
        assert re.fullmatch(r"[0-9a-f]{64}", package.sha256)


def test_package_not_in_the_table_is_refused(tmp_path: Path) -> None:
    """A recipe names packages of the table only."""
    with pytest.raises(PackageError, match=r"packages\.tsv"):
        unpack("pypi:none@1", tmp_path)


def test_archive_with_another_sha256_is_refused(tmp_path: Path) -> None:
    """A registry that serves something else is noticed before it is unpacked."""
    package = kept_archive(tmp_path, b"other", sha256=hashlib.sha256(b"right").hexdigest())
    with pytest.raises(PackageError, match="expected an archive with sha256"):
        fetch(package, tmp_path)


def test_kept_archive_is_unpacked_without_a_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second run needs no network."""
    wheel = tmp_path / "made.whl"
    with zipfile.ZipFile(wheel, "w") as zipped:
        zipped.writestr("a/picture.txt", "hello")
    data = wheel.read_bytes()
    package = kept_archive(tmp_path / "archives", data, sha256=hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(packages, "read_packages", lambda: {package.key: package})
    for _ in range(2):
        assert (unpack(package.key, tmp_path) / "a/picture.txt").read_text() == "hello"
