"""What a producer asks about one picture."""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    Field,
    JsonValue,
    StringConstraints,
    ValidationError,
)
from pydantic_core import PydanticCustomError, to_json

from shiwu.contract.references import reference_error
from shiwu.contract.words import (
    ID_PATTERN,
    MAX_INLINE_LABELS,
    MAX_LABEL_CHARS,
    MAX_METADATA_BYTES,
    MAX_TOP_K,
    ErrorCode,
    RequestError,
    Wire,
)

_ID = re.compile(ID_PATTERN)


def _check_reference(image: str) -> str:
    if error := reference_error(image):
        raise PydanticCustomError("invalid_reference", "{reason}", {"reason": error})
    return image


def _check_labels(labels: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(labels)) != len(labels):
        raise PydanticCustomError("invalid_labels", "expected every label once")
    return labels


def _check_metadata(metadata: JsonValue) -> JsonValue:
    size = len(to_json(metadata))
    if size > MAX_METADATA_BYTES:
        raise PydanticCustomError(
            "metadata_too_large",
            "expected at most {limit} bytes as JSON, got {size}",
            {"limit": MAX_METADATA_BYTES, "size": size},
        )
    return metadata


LabelSetName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
Label = Annotated[str, StringConstraints(min_length=1, max_length=MAX_LABEL_CHARS, strip_whitespace=True)]
InlineLabels = Annotated[
    tuple[Label, ...], Field(min_length=1, max_length=MAX_INLINE_LABELS), AfterValidator(_check_labels)
]
Head = Literal["softmax", "sigmoid"]
Want = Literal["tags", "embedding"]


class Request(Wire):
    """What a producer asks about one picture."""

    image: Annotated[str, AfterValidator(_check_reference)]
    labels: LabelSetName | InlineLabels | None = None
    top_k: Annotated[int, Field(ge=1, le=MAX_TOP_K)] = 5
    threshold: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    head: Head | None = None
    metadata: Annotated[JsonValue, AfterValidator(_check_metadata)] = None
    want: Annotated[tuple[Want, ...], Field(min_length=1, max_length=2)] = ("tags",)


REQUEST_FIELDS: Final = tuple(Request.model_fields)


def parse_request(fields: dict[str, Any]) -> Request:
    """Read the keyword arguments of a `shiwu.tag` message.

    Raises:
        RequestError: with the code of the first field that breaks the contract.
    """
    try:
        return Request.model_validate(fields)
    except ValidationError as error:
        raise _request_error(error) from None


def check_id(job_id: object) -> str:
    """Return the id if it is a valid key, or raise RequestError(invalid_id)."""
    if isinstance(job_id, str) and _ID.fullmatch(job_id):
        return job_id
    raise RequestError(
        ErrorCode.INVALID_ID,
        f"expected an id of 1 to 128 letters, digits or _ . : - that begins with a letter or digit, got {job_id!r:.80}",
    )


def _request_error(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False, include_input=False)[0]
    field = str(first["loc"][0]) if first["loc"] else "request"
    message = f"{field}: {first['msg']}"
    if first["type"] in {"invalid_reference", "invalid_labels", "metadata_too_large"}:
        return RequestError(ErrorCode(first["type"]), message)
    if field == "labels":
        return RequestError(
            ErrorCode.INVALID_LABELS,
            f"labels: expected the name of a label set or 1 to {MAX_INLINE_LABELS} different words "
            f"of 1 to {MAX_LABEL_CHARS} characters ({first['msg']})",
        )
    if field == "image":
        return RequestError(ErrorCode.INVALID_REFERENCE, message)
    return RequestError(ErrorCode.INVALID_REQUEST, message)
