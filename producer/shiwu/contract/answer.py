"""The one terminal result of a job, with the time of every stage."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Annotated, Any, Self, get_args

import msgspec

from shiwu.contract.request import Head
from shiwu.contract.vocabulary import (
    CONTRACT_VERSION,
    AttemptEnd,
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


# Workers are upgraded before their consumers, so a reader meets words that it does not know. They pass as plain
# strings; known words are members of their enum. The type is `str`: msgspec decodes no union of an enum and `str`.
StatusWord = Annotated[str, _open(Status)]
ErrorWord = Annotated[str, _open(ErrorCode)]
StageWord = Annotated[str, _open(Stage)]
LaneWord = Annotated[str, _open(Lane)]
AttemptWord = Annotated[str, _open((*AttemptEnd, *ErrorCode))]
WarningWord = Annotated[str, _open(WarningCode)]
HeadWord = Annotated[str, _open(get_args(Head))]


def moment(ms: float) -> datetime:
    """A time of Redis' clock, as answers tell it."""
    return datetime.fromtimestamp(ms / 1000, UTC)


class AnswerModel(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a worker writes: immutable, cheap enough for every picture, and deaf to fields of a newer version.

    What is None is left out of the JSON. Other defaults come from a `default_factory`, which keeps them in it. Parts
    that hold only texts and numbers have `gc=False`: they cannot be in a cycle, and a worker makes ten for each job.
    """

    def to_json(self) -> bytes:
        """Compact UTF-8 JSON without the fields that are unset."""
        return _ENCODER.encode(self)

    @classmethod
    def from_json(cls, raw: bytes) -> Self:
        """Read it back.

        Raises:
            ValueError: for anything else, with the path of the first field that is wrong.
        """
        return msgspec.json.decode(raw, type=cls)


class Tag(AnswerModel, frozen=True, gc=False):
    """One label of an answer."""

    label: str
    score: float
    """Softmax or sigmoid of the scaled cosine; softmax is relative to the label set."""
    cosine: float
    """Cosine of picture and label vectors, comparable across label sets of one model."""


class Timing(AnswerModel, frozen=True, gc=False):
    """Milliseconds of each stage of the last attempt; with `earlier` and `queue` they add up to `total`.

    `queue` is the wait in the lane before the last attempt; it is absent when the sender did not say when it enqueued.
    `earlier` is the time between that moment and the wait: earlier attempts and their pauses, or a countdown. `batch`
    is waiting and `encode` is the whole forward pass: neither is divided by the batch size. Commit lies after the
    answer.
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
    """The image as it was read. `reference` is as it was sent, but http(s) URLs have no query and no user name."""

    reference: str
    format: str | None = None
    width: int | None = None
    height: int | None = None
    bytes: int | None = None
    sha256: str | None = None


class LabelsInfo(AnswerModel, frozen=True, gc=False):
    """Which labels were compared; the digest covers words, templates and head."""

    digest: str
    count: int
    head: HeadWord
    name: str | None = None


class ModelInfo(AnswerModel, frozen=True, gc=False):
    """Which weights answered, and how they were run."""

    id: str
    revision: str
    dtype: str
    device: str


class ErrorInfo(AnswerModel, frozen=True, gc=False):
    """Why there are no tags."""

    code: ErrorWord
    message: str
    stage: StageWord | None = None
    retryable: bool = msgspec.field(default_factory=bool)

    def __post_init__(self) -> None:
        """Spell out what UTF-8 cannot write, because the answer must always be writable; recognise known words."""
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
        """Spell out what UTF-8 cannot write, because the answer must always be writable; recognise known words."""
        msgspec.structs.force_setattr(self, "message", as_utf8(self.message))
        if type(self.code) is str:
            msgspec.structs.force_setattr(self, "code", known_word(WarningCode, self.code))


class Attempt(AnswerModel, frozen=True):
    """An earlier try of a job that came back to its lane."""

    attempt: int
    code: AttemptWord
    """An error code, or how the worker ended; see `history` of the answer."""
    at: datetime
    """When it ended, by Redis' clock, in UTC."""
    stage: StageWord | None = None
    worker: str = msgspec.field(default_factory=str)
    pause: float | None = None
    """Milliseconds until the job was in its lane again, where the worker asked for a pause."""

    def __post_init__(self) -> None:
        """Recognise known words in what was read."""
        if type(self.code) is str:
            code = known_word(AttemptEnd, known_word(ErrorCode, self.code))
            msgspec.structs.force_setattr(self, "code", code)
        if type(self.stage) is str:
            msgspec.structs.force_setattr(self, "stage", known_word(Stage, self.stage))


class Answer(AnswerModel, frozen=True):
    """The one terminal result of a job."""

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
    """When the answer was on its way to Redis, by Redis' clock, in UTC (RFC 3339)."""
    history: tuple[Attempt, ...] | None = None
    """Earlier tries, the last ten of them, the oldest first; None where there are none."""

    @classmethod
    def from_json(cls, raw: bytes) -> Self:
        """Read it back; known words are members of their enums.

        Raises:
            ValueError: for anything else, with the path of the first field that is wrong.
        """
        answer = super().from_json(raw)
        answer.recognise_words()
        return answer

    def recognise_words(self) -> None:
        """Make known words members of their enums, after the answer was read.

        Not done for each answer that is made: a worker makes thousands a second, of words that it knows.
        """
        if type(self.status) is str:
            msgspec.structs.force_setattr(self, "status", known_word(Status, self.status))
        if type(self.lane) is str:
            msgspec.structs.force_setattr(self, "lane", known_word(Lane, self.lane))
