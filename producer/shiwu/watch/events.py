"""What an event of a bucket says: an object that was stored, something to ignore, or nothing that can be read."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, TypeAlias
from urllib.parse import quote

import msgspec

from shiwu.contract import reference_error

ID_PREFIX: Final = "ev."
_VERSION: Final = "?versionId="


class Reason(StrEnum):
    """Why an event becomes no job. Logs and metrics have the same words."""

    REMOVED = "removed"  # the object was deleted
    OTHER = "other"  # its bytes did not change, or are not complete yet
    TEST = "test"  # the store tries the connection
    NO_RULE = "no_rule"  # no rule matches the object
    DUPLICATE = "duplicate"  # this watcher has enqueued the same event before


@dataclass(frozen=True, slots=True)
class Ignored:
    """An event that becomes no job."""

    reason: Reason


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A message, or a part of one, that cannot be read; the text says what was expected and what came."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectStored:
    """An object was created or replaced. `key` is not URL-encoded; the last three are empty where they are unknown."""

    bucket: str
    key: str
    version: str = ""
    etag: str = ""
    sequencer: str = ""
    """Tells two events of one object apart: the store's sequencer, the id of its request, or the id of the event."""

    @property
    def id(self) -> str:
        """The job id. The same event has the same id whenever and however it arrives."""
        parts = (self.bucket, self.key, self.version or self.etag, self.sequencer)
        return f"{ID_PREFIX}{hashlib.sha256(msgspec.json.encode(parts)).hexdigest()}"

    def reference(self, *, has_version: bool = False) -> str:
        """The reference of the image; with its version, if asked for and known."""
        ending = f"{_VERSION}{quote(self.version, safe='')}" if has_version and self.version else ""
        return f"s3://{self.bucket}/{self.key}{ending}"


Finding: TypeAlias = ObjectStored | Ignored | Unreadable


def checked(stored: ObjectStored) -> Finding:
    """The event, or why no reference can name its object."""
    if stored.key.endswith("/"):
        return Ignored(Reason.OTHER)  # a folder of a console, without bytes
    if _VERSION in stored.key:
        return Unreadable(f"expected a key without {_VERSION}, which a reference would read as a version")
    if error := reference_error(stored.reference()):
        return Unreadable(error)
    return stored
