"""The request: which image to tag, with which labels and options."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    JsonValue,
    StringConstraints,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import ErrorDetails, PydanticCustomError, to_json

from shiwu.contract.references import reference_error
from shiwu.contract.text import NAME_PATTERN, NO_CONTROLS_PATTERN, control_character
from shiwu.contract.validation_text import expected_and_got
from shiwu.contract.vocabulary import (
    MAX_CALLBACK_CHARS,
    MAX_INLINE_LABELS,
    MAX_LABEL_CHARS,
    MAX_METADATA_BYTES,
    MAX_TOP_K,
    ErrorCode,
    RequestError,
    RequestModel,
)

_NAME: Final = re.compile(NAME_PATTERN)
OF_THE_SET: Final = "set"
"""The threshold of a request that wants the limits of its label set; the same as 0, which every worker reads."""


def _check_reference(image: str) -> str:
    if error := reference_error(image):
        raise PydanticCustomError("invalid_reference", "{reason}", {"reason": error})
    return image


def _check_labels(labels: tuple[str, ...]) -> tuple[str, ...]:
    if reason := labels_error(labels):
        raise PydanticCustomError("invalid_labels", "{reason}", {"reason": reason})
    return labels


def labels_error(labels: Sequence[str]) -> str | None:
    """Why these texts cannot be the labels of one set, or None. Their lengths are checked elsewhere."""
    if len(set(labels)) != len(labels):
        twice = next(label for label, times in Counter(labels).items() if times > 1)
        return f"expected every label once, got {twice!r} again"
    # One search over all labels, because most sets have no such character.
    if control_character("".join(labels)):
        label, found = next((label, found) for label in labels if (found := control_character(label)))
        return f"expected labels without control characters, got {found} in {label!r}"
    return None


def _check_metadata(metadata: JsonValue) -> JsonValue:
    try:
        size = len(to_json(metadata))
    except ValueError:
        raise PydanticCustomError("no_utf8", "expected texts that UTF-8 can write, got a lone surrogate") from None
    if size > MAX_METADATA_BYTES:
        raise PydanticCustomError(
            "metadata_too_large",
            "expected at most {limit} bytes as JSON, got {size}",
            {"limit": MAX_METADATA_BYTES, "size": size},
        )
    return metadata


def _read_threshold(threshold: Any) -> Any:
    if threshold == OF_THE_SET:
        return 0.0
    if isinstance(threshold, str):
        try:
            return float(threshold)
        except ValueError:
            text = 'expected a number from 0 to 1, or "set" for the limits of the label set, got {value}'
            raise PydanticCustomError("invalid_threshold", text, {"value": f"{threshold!r:.80}"}) from None
    return threshold


def _check_callback(callback: str) -> str:
    if _NAME.fullmatch(callback):
        return callback
    is_url = callback.startswith("https://") and len(callback) <= MAX_CALLBACK_CHARS
    if not is_url or reference_error(callback) or "#" in callback:
        raise PydanticCustomError(
            "invalid_callback",
            "expected the name of an endpoint, 1 to 64 letters and digits, or https://host/path without a user name",
        )
    return callback


LabelSetName = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
Label = Annotated[
    str,
    StringConstraints(min_length=1, max_length=MAX_LABEL_CHARS, strip_whitespace=True),
    Field(json_schema_extra={"pattern": NO_CONTROLS_PATTERN}),
]
"""Surrounding white space is removed. `_check_labels` searches the whole set for control characters."""
InlineLabels = Annotated[
    tuple[Label, ...], Field(min_length=1, max_length=MAX_INLINE_LABELS), AfterValidator(_check_labels)
]
Callback = Annotated[
    str,
    AfterValidator(_check_callback),
    Field(
        json_schema_extra={
            "anyOf": [{"pattern": NAME_PATTERN}, {"pattern": "^https://[^/]", "maxLength": MAX_CALLBACK_CHARS}]
        }
    ),
]
Threshold = Annotated[
    float,
    BeforeValidator(_read_threshold),
    Field(ge=0.0, le=1.0),
    WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0.0, "maximum": 1.0}, {"const": OF_THE_SET}]}),
]
Head = Literal["softmax", "sigmoid"]
Want = Literal["tags", "embedding", "vector"]


class Request(RequestModel):
    """One image to tag, with labels and options. Immutable; `parse_request` checks every field."""

    image: Annotated[str, AfterValidator(_check_reference)]
    labels: LabelSetName | InlineLabels | None = None
    top_k: Annotated[int, Field(ge=1, le=MAX_TOP_K)] = 5
    threshold: Threshold = 0.0
    """The lowest `p` or score of a tag, 0 to 1. 0, or the word "set", means the thresholds of the label set."""
    head: Head | None = None
    metadata: Annotated[JsonValue, AfterValidator(_check_metadata)] = None
    want: Annotated[tuple[Want, ...], Field(min_length=1, max_length=3)] = ("tags",)
    min_cosine: Annotated[float, Field(ge=-1.0, le=1.0)] | None = None
    """The lowest cosine of a tag, -1 to 1; replaces the limits of the label set."""
    callback: Callback | None = None
    """The webhook that gets the answer: the name of an endpoint, or an https URL; see docs/webhooks.md."""


REQUEST_FIELDS: Final = tuple(Request.model_fields)


def parse_request(fields: dict[str, Any]) -> Request:
    """Read the keyword arguments of a `shiwu.tag` message.

    Raises:
        RequestError: has the code of the first field that breaks the contract.
    """
    try:
        return Request.model_validate(fields)
    except ValidationError as error:
        raise _request_error(error) from None


def _request_error(error: ValidationError) -> RequestError:
    first, *others = error.errors(include_url=False)
    field = str(first["loc"][0]) if first["loc"] else "request"
    if field == "labels":
        return _labels_error([first, *(other for other in others if other["loc"][0] == field)])
    message = f"{field}: {expected_and_got(first)}"
    if first["type"] in {"invalid_reference", "metadata_too_large"}:
        return RequestError(ErrorCode(first["type"]), message)
    if field == "image":
        return RequestError(ErrorCode.INVALID_REFERENCE, message)
    return RequestError(ErrorCode.INVALID_REQUEST, message)


def _labels_error(errors: Sequence[ErrorDetails]) -> RequestError:
    """`labels` may be a name or a list, and each form has its own errors: report those of the form that was sent."""
    expected = (
        f"expected the name of a label set or a list of 1 to {MAX_INLINE_LABELS} different labels "
        f"of 1 to {MAX_LABEL_CHARS} characters"
    )
    for error in errors:
        if error["type"] == "invalid_labels":
            return RequestError(ErrorCode.INVALID_LABELS, f"labels: {error['msg']}")
        if error["type"] == "string_pattern_mismatch":
            name = f"{error['input']!r:.80}"
            why = f"got {name}: a name has 1 to 64 letters and digits, and after the first _ . -"
            return RequestError(ErrorCode.INVALID_LABELS, f"labels: {expected}, {why}")
    wrong = next((error for error in errors if isinstance(error["loc"][-1], int)), errors[-1])
    which = f"label {wrong['loc'][-1] + 1}: " if isinstance(wrong["loc"][-1], int) else ""
    return RequestError(ErrorCode.INVALID_LABELS, f"labels: {expected} ({which}{expected_and_got(wrong)})")
