"""The answer: the one terminal record of a job, with the time of every stage."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Annotated, Any, Self, get_args

import msgspec

from shiwu.contract.request import Head
from shiwu.contract.vocabulary import (
    CONTRACT_VERSION,
    AttemptEnd,
    Cache,
    ErrorCode,
    Lane,
    Stage,
    Status,
    WarningCode,
    as_utf8,
    known_word,
)

_ENCODER = msgspec.json.Encoder()


def _open(words: Iterable[str]) -> msgspec.Meta:
    return msgspec.Meta(
        description="One of the examples, or a word of a newer version, which a reader must accept.",
        examples=[str(word) for word in words],
    )


# Workers are upgraded before consumers, so a reader meets unknown words. They pass as plain strings; known words become
# members of their enum. The type is `str` because msgspec cannot decode a union of an enum and `str`.
StatusWord = Annotated[str, _open(Status)]
ErrorWord = Annotated[str, _open(ErrorCode)]
StageWord = Annotated[str, _open(Stage)]
LaneWord = Annotated[str, _open(Lane)]
AttemptWord = Annotated[str, _open((*AttemptEnd, *ErrorCode))]
WarningWord = Annotated[str, _open(WarningCode)]
CacheWord = Annotated[str, _open(Cache)]
HeadWord = Annotated[str, _open((*get_args(Head), "z"))]


def moment(ms: float) -> datetime:
    """A time of Redis' clock, in milliseconds since 1970, as a `datetime` in UTC."""
    return datetime.fromtimestamp(ms / 1000, UTC)


class AnswerModel(msgspec.Struct, frozen=True, omit_defaults=True):
    """Base of everything a worker writes: immutable, and cheap to create. Unknown fields of newer versions are ignored.

    Fields that are None are left out of the JSON. Other defaults come from a `default_factory`, so that they are
    written. Parts that hold only texts and numbers have `gc=False`: they cannot form a cycle, and a worker creates ten
    for each job.
    """

    def to_json(self) -> bytes:
        """Compact UTF-8 JSON without the fields that are unset."""
        return _ENCODER.encode(self)

    @classmethod
    def from_json(cls, raw: bytes) -> Self:
        """Read what `to_json` wrote.

        Raises:
            ValueError: the JSON does not match; names the path of the first wrong field.
        """
        try:
            return msgspec.json.decode(raw, type=cls)
        except RecursionError as error:
            raise ValueError(f"expected JSON with fewer levels ({error})") from None


class Tag(AnswerModel, frozen=True, gc=False):
    """One label that an image got, with its score."""

    label: str
    score: float
    """Softmax or sigmoid of the scaled cosine, 0 to 1. A softmax score depends on the other labels of the set."""
    cosine: float
    """Cosine of the image and label vectors, -1 to 1; comparable across label sets of one model."""
    p: float | None = None
    """Probability that the image shows the label, 0 to 1, for labels that were calibrated with labelled images."""
    z: float | None = None
    """By how many deviations the cosine exceeds the mean of images without the label; with the head z only."""
    group: str | None = None
    """The group of the label in its label set."""


class Timing(AnswerModel, frozen=True, gc=False):
    """Milliseconds of each stage of the last attempt; with `earlier` and `queue` they add up to `total`.

    `queue` is the wait in the lane before the last attempt; it is absent where the message has no time of sending.
    `earlier` is the time from sending to that wait: earlier attempts and their pauses, or a countdown. `batch` is the
    wait for the device, and `encode` is the whole forward pass; neither is divided by the batch size. The commit stage
    comes after the answer is made and is not included.
    """

    queue: float | None = None
    claim: float = msgspec.field(default_factory=float)
    fetch: float = msgspec.field(default_factory=float)
    decode: float = msgspec.field(default_factory=float)
    batch: float = msgspec.field(default_factory=float)
    encode: float = msgspec.field(default_factory=float)
    score: float = msgspec.field(default_factory=float)
    earlier: float | None = None
    total: float = msgspec.field(default_factory=float)


class ImageInfo(AnswerModel, frozen=True, gc=False):
    """The image as it was read. `reference` is as it was sent, but http(s) URLs have no query and no user name.

    `bytes` is the size of the file, `width` and `height` are in pixels, and `sha256` is hexadecimal.
    """

    reference: str
    format: str | None = None
    width: int | None = None
    height: int | None = None
    bytes: int | None = None
    sha256: str | None = None


class LabelsInfo(AnswerModel, frozen=True, gc=False):
    """The label set that the image was compared with. The digest covers everything that decides the tags.

    `calibration` is the digest of the calibration file that the label set names. `calibrated` is true if its limits
    were chosen from images for this revision of the model, and false if for another one, so that they may not hold; it
    is absent where they were not chosen from images.
    """

    digest: str
    count: int
    head: HeadWord
    name: str | None = None
    calibration: str | None = None
    calibrated: bool | None = None


class ModelInfo(AnswerModel, frozen=True, gc=False):
    """The model that encoded the image, and how it ran."""

    id: str
    revision: str
    dtype: str
    device: str


class ErrorInfo(AnswerModel, frozen=True, gc=False):
    """Why a job has no tags. `code` is stable; `message` is for people and may change between versions."""

    code: ErrorWord
    message: str
    stage: StageWord | None = None
    retryable: bool = msgspec.field(default_factory=bool)

    def __post_init__(self) -> None:
        """Escape lone surrogates, which UTF-8 cannot encode, and convert known words to members of their enums."""
        msgspec.structs.force_setattr(self, "message", as_utf8(self.message))
        if type(self.code) is str:
            msgspec.structs.force_setattr(self, "code", known_word(ErrorCode, self.code))
        if type(self.stage) is str:
            msgspec.structs.force_setattr(self, "stage", known_word(Stage, self.stage))


class AnswerWarning(AnswerModel, frozen=True, gc=False):
    """A reason to read the tags of an answer with care; the answer is valid."""

    code: WarningWord
    message: str

    def __post_init__(self) -> None:
        """Escape lone surrogates, which UTF-8 cannot encode, and convert known words to members of their enums."""
        msgspec.structs.force_setattr(self, "message", as_utf8(self.message))
        if type(self.code) is str:
            msgspec.structs.force_setattr(self, "code", known_word(WarningCode, self.code))


class Attempt(AnswerModel, frozen=True):
    """An earlier attempt of a job that returned to its lane."""

    attempt: int
    code: AttemptWord
    """An error code, or how the worker ended (`AttemptEnd`)."""
    at: datetime
    """When the attempt ended, by Redis' clock, in UTC."""
    stage: StageWord | None = None
    worker: str = msgspec.field(default_factory=str)
    pause: float | None = None
    """Milliseconds until the job returned to its lane; None where the worker asked for no pause."""

    def __post_init__(self) -> None:
        """Convert known words to members of their enums."""
        if type(self.code) is str:
            code = known_word(AttemptEnd, known_word(ErrorCode, self.code))
            msgspec.structs.force_setattr(self, "code", code)
        if type(self.stage) is str:
            msgspec.structs.force_setattr(self, "stage", known_word(Stage, self.stage))


class Answer(AnswerModel, frozen=True):
    """The one terminal record of a job: status, tags or error, and times.

    Exactly one of `tags` and `error` is set, except that a request which does not want tags gets none.
    """

    id: str
    status: StatusWord
    version: int = msgspec.field(default_factory=lambda: CONTRACT_VERSION)
    image: ImageInfo | None = None
    tags: tuple[Tag, ...] | None = None
    labels: LabelsInfo | None = None
    model: ModelInfo | None = None
    timing: Timing = msgspec.field(default_factory=Timing)
    batch_size: int | None = None
    attempts: int = msgspec.field(default_factory=lambda: 1)
    worker: str = msgspec.field(default_factory=str)
    lane: LaneWord | None = None
    error: ErrorInfo | None = None
    metadata: Any = None
    embedding: tuple[float, ...] | None = None
    warnings: tuple[AnswerWarning, ...] | None = None
    """Reasons to read the tags with care; None where there are none."""
    answered_at: datetime | None = None
    """When the answer was sent to Redis, by Redis' clock, in UTC (RFC 3339)."""
    history: tuple[Attempt, ...] | None = None
    """The last ten earlier attempts, oldest first; None where there are none."""
    callback: str | None = None
    """The webhook that the request named; None where it named none."""
    vector: str | None = None
    """The unit vector of the image as float16, little-endian, in base64, for a request that wants it. The tags of such
    an answer are made from this rounded vector, so that they can be computed again from it, bit by bit."""
    cache: CacheWord | None = None
    """Where the vector came from if another job encoded the same image; None if this job did."""
    unknown: bool | None = None
    """True where no label passed its limits, so that the only tag is the one that the label set gives then."""

    @classmethod
    def from_json(cls, raw: bytes) -> Self:
        """Read what `to_json` wrote, and convert known words to members of their enums.

        Raises:
            ValueError: the JSON does not match; names the path of the first wrong field.
        """
        answer = super().from_json(raw)
        answer.recognise_words()
        return answer

    def recognise_words(self) -> None:
        """Convert known words to members of their enums, after the answer was read.

        `__post_init__` does not do it, because a worker creates thousands of answers a second, all with enum members.
        """
        if type(self.status) is str:
            msgspec.structs.force_setattr(self, "status", known_word(Status, self.status))
        if type(self.lane) is str:
            msgspec.structs.force_setattr(self, "lane", known_word(Lane, self.lane))
        if type(self.cache) is str:
            msgspec.structs.force_setattr(self, "cache", known_word(Cache, self.cache))
