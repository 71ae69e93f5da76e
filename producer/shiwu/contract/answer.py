"""The one terminal result of a job, with the time of every stage."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import JsonValue

from shiwu.contract.request import Head
from shiwu.contract.words import CONTRACT_VERSION, ErrorCode, Lane, Stage, Status, Wire


# A plain dataclass, as cheap as it gets: five of them are made for every picture.
@dataclass(frozen=True, slots=True)
class Tag:
    """One label of an answer."""

    label: str
    score: float
    """Softmax or sigmoid of the scaled cosine; softmax is relative to the label set."""
    cosine: float
    """Cosine of picture and label vectors, comparable across label sets of one model."""


class Timing(Wire):
    """Milliseconds of each stage; they follow each other without gaps and add up to `total`.

    `queue` is the wait in the lane and is absent when the sender did not say when it enqueued. `batch` is waiting and
    `encode` is the whole forward pass: neither is divided by the batch size. Commit lies after the answer.
    """

    queue: float | None = None
    claim: float = 0.0
    fetch: float = 0.0
    decode: float = 0.0
    batch: float = 0.0
    encode: float = 0.0
    score: float = 0.0
    total: float = 0.0


class ImageInfo(Wire):
    """The picture as it was read. `reference` never has a query."""

    reference: str
    format: str | None = None
    width: int | None = None
    height: int | None = None
    bytes: int | None = None
    sha256: str | None = None


class LabelsInfo(Wire):
    """Which labels were compared; the digest covers words, templates and head."""

    name: str | None = None
    digest: str
    count: int
    head: Head


class ModelInfo(Wire):
    """Which weights answered, and how they were run."""

    id: str
    revision: str
    dtype: str
    device: str


class ErrorInfo(Wire):
    """Why there are no tags."""

    code: ErrorCode
    message: str
    stage: Stage | None = None
    retryable: bool = False


class Answer(Wire):
    """The one terminal result of a job."""

    version: int = CONTRACT_VERSION
    id: str
    status: Status
    image: ImageInfo | None = None
    tags: tuple[Tag, ...] | None = None
    labels: LabelsInfo | None = None
    model: ModelInfo | None = None
    timing: Timing = Timing()
    batch_size: int | None = None
    attempts: int = 1
    worker: str = ""
    lane: Lane | None = None
    error: ErrorInfo | None = None
    metadata: JsonValue = None
    embedding: tuple[float, ...] | None = None
