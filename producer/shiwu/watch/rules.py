"""The operator's rules: which objects become jobs, in which lane and with which labels. The first match wins.

- match: {bucket: photos, prefix: in/, suffix: [.jpg, .png]}
  lane: interactive
  labels: moderation
  metadata: {team: a}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, TypeAdapter, ValidationError

from shiwu.broker.message_writer import build_message
from shiwu.cli.yaml_files import FileError, read_yaml
from shiwu.client.sender import SendOptions
from shiwu.contract import (
    MAX_MESSAGE_BYTES,
    ErrorCode,
    Lane,
    Request,
    RequestError,
    parse_request,
    printable,
)
from shiwu.contract.validation_text import expected_and_got
from shiwu.watch.events import ObjectStored

MAX_RULES: Final = 1000
MAX_TEXTS: Final = 1000
MAX_ID_CHARS: Final = 67
"""Of the id of an event."""
_ANY_IMAGE: Final = "s3://bucket/key"
"""Stands for the image where only the other fields of a request are checked."""
_LONGEST_IMAGE: Final = "s3://bucket/" + "k" * 4000
_REQUEST_FIELDS: Final = ("labels", "top_k", "threshold", "min_cosine", "head", "want", "metadata", "callback")


class RulesError(ValueError):
    """The file of rules cannot be read, or a value is wrong; the text says what was expected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule. An empty tuple matches every bucket, prefix or suffix."""

    buckets: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = ()
    """In lower case, because cameras write `.JPG`."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the request that are not the default."""
    options: SendOptions = field(default_factory=lambda: SendOptions(Lane.BULK))
    has_version: bool = False
    """Whether the job reads the version that the event names, which takes the right s3:GetObjectVersion."""

    def matches(self, stored: ObjectStored) -> bool:
        """Whether this rule is about the object."""
        return (
            (not self.buckets or stored.bucket in self.buckets)
            and (not self.prefixes or stored.key.startswith(self.prefixes))
            and (not self.suffixes or stored.key.lower().endswith(self.suffixes))
        )


class Rules:
    """All rules of a file, in their order."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.all = tuple(rules)

    def find(self, stored: ObjectStored) -> int | None:
        """The index of the first rule that matches, or None."""
        return next((index for index, rule in enumerate(self.all) if rule.matches(stored)), None)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


_Texts = Annotated[
    tuple[Annotated[str, Field(min_length=1, max_length=1024)], ...],
    BeforeValidator(_as_list),
    Field(min_length=1, max_length=MAX_TEXTS),
]


class _Match(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    bucket: _Texts | None = None
    prefix: _Texts | None = None
    suffix: _Texts | None = None


class _Rule(BaseModel):
    """One rule as it is written. `parse_request` checks the fields of the request."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    match: _Match
    lane: Lane = Lane.BULK
    labels: Any = None
    top_k: Any = None
    threshold: Any = None
    min_cosine: Any = None
    head: Any = None
    want: Any = None
    metadata: Any = None
    callback: Any = None
    version: StrictBool = False
    priority: Any = 0
    expires_s: Any = None
    answer_by_s: Any = None


_FILE: Final = TypeAdapter(Annotated[list[_Rule], Field(min_length=1, max_length=MAX_RULES)])


def read_rules(path: Path) -> Rules:
    """Read the file of rules.

    Raises:
        RulesError: it cannot be read, or a value is wrong.
    """
    try:
        written = _FILE.validate_python(read_yaml(path))
    except FileError as error:
        raise RulesError(str(error)) from None
    except ValidationError as error:
        raise RulesError(f"{path}: {_first_error(error)}") from None
    return Rules([_rule(path, number, each) for number, each in enumerate(written, 1)])


def _rule(path: Path, number: int, written: _Rule) -> Rule:
    given = {name: getattr(written, name) for name in _REQUEST_FIELDS if getattr(written, name) is not None}
    try:
        request = parse_request({**given, "image": _ANY_IMAGE})
        options = SendOptions(
            lane=written.lane,
            priority=written.priority,
            expires_s=written.expires_s,
            answer_by_s=written.answer_by_s,
        )
        _check_size(request, options)
    except RequestError as error:
        raise RulesError(f"{path}: rule {number}: {printable(str(error))}") from None
    match = written.match
    return Rule(
        buckets=match.bucket or (),
        prefixes=match.prefix or (),
        suffixes=tuple(suffix.lower() for suffix in match.suffix or ()),
        fields=request.model_dump(exclude_defaults=True, exclude={"image"}, mode="json"),
        options=options,
        has_version=written.version,
    )


def _check_size(request: Request, options: SendOptions) -> None:
    """Refuse labels and metadata that leave no space for a long key, before the first event comes."""
    longest = request.model_copy(update={"image": _LONGEST_IMAGE})
    raw = build_message(longest, job_id="x" * MAX_ID_CHARS, lane=options.lane, sent_ms=0.0)
    if len(raw) > MAX_MESSAGE_BYTES:
        raise RequestError(
            ErrorCode.MESSAGE_TOO_LARGE,
            f"expected messages of at most {MAX_MESSAGE_BYTES} bytes, this rule makes {len(raw)}; use a label set",
        )


def _first_error(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    numbers = [part + 1 if isinstance(part, int) else part for part in first["loc"]]
    where = ": ".join(["rule " + str(numbers[0]), ".".join(map(str, numbers[1:]))] if numbers else ["file"]).rstrip(
        ": "
    )
    if first["type"] == "extra_forbidden":
        names = _Match.model_fields if len(numbers) > 2 else _Rule.model_fields
        return printable(f"{where}: expected one of {', '.join(names)}")
    if first["type"] == "list_type":
        return f"{where}: expected a list of rules, each `- match: …`, got {type(first['input']).__name__}"
    return printable(f"{where}: {expected_and_got(first)}")
