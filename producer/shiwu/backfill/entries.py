"""What a source yields, and the job that each entry becomes: its id, its request, its record in Redis."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Self

import msgspec
from pydantic_core import to_json

from shiwu.contract import ErrorCode, Request, RequestError, parse_request, split_s3, without_query

ID_DIGITS: Final = 24
"""Hexadecimal digits of the hash in an id: 96 bits."""
ANY_IMAGE: Final = "s3://bucket/key"
"""Stands for the image where only the other fields of a request are checked."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One image of a source, or a line that names none."""

    cursor: str
    """Where the source goes on after this entry."""
    reference: str
    version: str = ""
    """Version or ETag of the object, where the source has it: a changed object is another job."""
    size: int | None = None
    modified: datetime | None = None
    metadata: Any = None
    error: str = ""
    """Why the line names no image; then `reference` is empty, and `version` tells the line from others."""


class Record(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is kept in Redis of a job until its answer is written: enough to send it again."""

    image: str
    metadata: Any = None
    code: str = ""
    """Error code of an entry that cannot be a job; it is not sent."""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """One entry as a job. `request` is None where the entry cannot be one; its record has the reason."""

    id: str
    record: Record
    request: Request | None


class JobMaker:
    """Makes jobs of one backfill. The same entry has the same id in each run.

    Args:
        name: of the backfill.
        fields: of the request for all images: `labels`, `top_k`, `threshold`, `min_cosine`, `head`.

    Raises:
        RequestError: a field is invalid.
    """

    def __init__(self, name: str, fields: Mapping[str, Any]) -> None:
        self.prefix = id_prefix(name)
        self._base = parse_request({**fields, "image": ANY_IMAGE})
        self.shared = self._base.model_dump(exclude_defaults=True, exclude={"image"}, mode="json")
        """The fields that differ from their defaults."""
        self._has_many_fields = isinstance(self._base.labels, tuple)
        self._salt = to_json(self.shared)

    def make(self, entry: Entry) -> Job:
        """The job of one entry."""
        record = Record(entry.reference, entry.metadata)
        if entry.error:
            record = Record(entry.reference, code=ErrorCode.INVALID_REQUEST, error=entry.error)
        job_id = self._id(entry)
        request = None
        if not record.error:
            try:
                request = self.request(record)
            except RequestError as error:
                record = Record(entry.reference, code=str(error.code), error=str(error))
        return Job(job_id, record, request)

    def again(self, job_id: str, record: Record) -> Job:
        """The job of a record that was kept."""
        return Job(job_id, record, None if record.error else self.request(record))

    def request(self, record: Record) -> Request:
        """The request of one image.

        Raises:
            RequestError: the reference or the metadata are invalid.
        """
        if not self._has_many_fields:
            return parse_request({**self.shared, "image": record.image, "metadata": record.metadata})
        # These are checked once: a thousand labels would take longer than the rest of the entry.
        own = parse_request({"image": record.image, "metadata": record.metadata})
        return self._base.model_copy(update={"image": own.image, "metadata": own.metadata})

    def _id(self, entry: Entry) -> str:
        digest = hashlib.sha256(self._salt)
        for part in (entry.reference, entry.version):
            digest.update(b"\0" + part.encode(errors="surrogatepass"))
        if entry.metadata is not None:
            digest.update(b"\0" + msgspec.json.encode(entry.metadata, order="sorted"))
        return f"{self.prefix}{digest.hexdigest()[:ID_DIGITS]}"


def shown_reference(reference: str) -> str:
    """A reference as results show it: an object of a bucket as it is, also one that cannot be a job."""
    try:
        split_s3(reference)
    except ValueError:
        return without_query(reference)
    return reference


def id_prefix(name: str) -> str:
    """What the ids of a backfill begin with. Those of another one may begin so too, as `a` and `a.b`."""
    return f"bf.{name}."


_DECODER: Final = msgspec.json.Decoder(Record)
_ENCODER: Final = msgspec.json.Encoder()


@dataclass(frozen=True, slots=True)
class KeptRecord:
    """A record with the number of the portion in which it was registered."""

    portion: int
    record: Record

    def to_bytes(self) -> bytes:
        """`portion|JSON`."""
        return b"%d|%b" % (self.portion, _ENCODER.encode(self.record))

    @classmethod
    def from_bytes(cls, raw: bytes) -> Self:
        """Read what `to_bytes` wrote.

        Raises:
            ValueError: it is something else.
        """
        portion, _, record = raw.partition(b"|")
        return cls(int(portion), _DECODER.decode(record))
