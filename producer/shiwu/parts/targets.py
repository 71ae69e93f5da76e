"""Where results go: a folder, or a prefix of a bucket.

A file gets a temporary name first, and its own name when it is complete and durable.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path
from typing import Protocol

from shiwu.parts.errors import TargetError
from shiwu.parts.objects import Objects


class Target(Protocol):
    """A place for files. Methods raise TargetError."""

    def local(self, name: str) -> Path:
        """A path on this machine for the file while it is written."""

    def stage(self, name: str, *, token: str) -> str:
        """Make the file that was written at `local(name)` durable under a temporary name, and return this name."""

    def publish(self, temporary: str, name: str) -> None:
        """Give a staged file its name; it replaces a file of this name."""

    def put(self, name: str, raw: bytes) -> None:
        """Write a small file as a whole."""

    def delete(self, name: str) -> None:
        """Delete a file; a missing one is no error."""

    def names(self) -> set[str]:
        """The names of all files."""

    def close(self) -> None:
        """Remove what is left of files that were never staged."""


def open_target(address: str, *, objects: Objects, temporary: str) -> Target:
    """The target at a folder or at s3://bucket/prefix/.

    Args:
        temporary: how temporary names begin. Each program has its own, so that none deletes what another writes.

    Raises:
        TargetError: there is no such folder, and it cannot be made.
    """
    if address.startswith("s3://"):
        return BucketTarget(objects, address, temporary=temporary)
    return FolderTarget(Path(address), temporary=temporary)


class FolderTarget:
    """A folder of this machine."""

    def __init__(self, folder: Path, *, temporary: str) -> None:
        self._folder = folder
        self._temporary = temporary
        # Process ids repeat: in two containers with one volume both may be 1.
        self._token = secrets.token_hex(4)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TargetError(f"expected a folder to write to at {folder} ({error.strerror or error})") from None

    def local(self, name: str) -> Path:
        """A temporary name in the folder, because a file can be renamed within its file system only."""
        return self._folder / f"{self._temporary}{self._token}-{name}"

    def stage(self, name: str, *, token: str) -> str:
        """Write the file to the disk."""
        path = self.local(name)
        try:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            staged = path.with_name(f"{self._temporary}{token}-{name}")
            path.replace(staged)
        except OSError as error:
            raise _failed(path, error) from None
        return staged.name

    def publish(self, temporary: str, name: str) -> None:
        """Rename the file, and write the folder to the disk."""
        try:
            (self._folder / temporary).replace(self._folder / name)
            descriptor = os.open(self._folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise _failed(self._folder / name, error) from None

    def put(self, name: str, raw: bytes) -> None:
        """Write the file under a temporary name, and rename it."""
        path = self.local(name)
        try:
            path.write_bytes(raw)
        except OSError as error:
            raise _failed(path, error) from None
        self.publish(path.name, name)

    def delete(self, name: str) -> None:
        """Delete a file."""
        path = self._folder / name
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise _failed(path, error) from None

    def names(self) -> set[str]:
        """The names of all files."""
        try:
            return {path.name for path in self._folder.iterdir() if path.is_file()}
        except OSError as error:
            raise _failed(self._folder, error) from None

    def close(self) -> None:
        """Do nothing: the next start removes temporary files."""


class BucketTarget:
    """A prefix of a bucket. Files are written to a temporary folder of this machine first."""

    def __init__(self, objects: Objects, address: str, *, temporary: str) -> None:
        self._objects = objects
        self._address = address
        self._temporary = temporary
        self._folder = tempfile.TemporaryDirectory(prefix="shiwu-parts-")

    def local(self, name: str) -> Path:
        """A path in the temporary folder."""
        return Path(self._folder.name, name)

    def stage(self, name: str, *, token: str) -> str:
        """Upload the file under a temporary key."""
        path, staged = self.local(name), f"{self._temporary}{token}-{name}"
        self._objects.upload(path, f"{self._address}{staged}")
        path.unlink()
        return staged

    def publish(self, temporary: str, name: str) -> None:
        """Copy the object to its key, and delete the temporary one."""
        self._objects.move(f"{self._address}{temporary}", f"{self._address}{name}")

    def put(self, name: str, raw: bytes) -> None:
        """Write an object, which stores do as a whole."""
        self._objects.put(raw, f"{self._address}{name}")

    def delete(self, name: str) -> None:
        """Delete an object."""
        self._objects.delete(f"{self._address}{name}")

    def names(self) -> set[str]:
        """The keys below the prefix, without it."""
        return set(self._objects.names(self._address))

    def close(self) -> None:
        """Remove the temporary folder."""
        self._folder.cleanup()


def _failed(path: Path, error: OSError) -> TargetError:
    return TargetError(f"{path}: {error.strerror or error}")
