"""The language both sides speak: request, answer, timing, error codes, lanes and key names.

Everything that crosses Redis is defined here and nowhere else. Readers ignore fields they do not know, so an old worker
can serve a new producer; fields are added, never renamed. The JSON Schema files in `docs/schema/` are generated from
these classes.
"""

from __future__ import annotations

from shiwu.contract.answer import (
    Answer,
    ErrorInfo,
    ImageInfo,
    LabelsInfo,
    ModelInfo,
    Tag,
    Timing,
)
from shiwu.contract.keys import (
    ATTEMPTS,
    CLAIMS,
    COUNTERS,
    DEAD,
    DELAYED,
    LEASES,
    PARKED,
    RESULT_STREAM,
    WORKERS,
    done_key,
    result_key,
)
from shiwu.contract.references import (
    reference_error,
    without_query,
)
from shiwu.contract.request import (
    REQUEST_FIELDS,
    Head,
    InlineLabels,
    Label,
    LabelSetName,
    Request,
    Want,
    check_id,
    parse_request,
)
from shiwu.contract.words import (
    CONTRACT_VERSION,
    ID_PATTERN,
    MAX_IMAGE_CHARS,
    MAX_INLINE_LABELS,
    MAX_LABEL_CHARS,
    MAX_MESSAGE_BYTES,
    MAX_METADATA_BYTES,
    MAX_TOP_K,
    TASK_NAME,
    ErrorCode,
    Lane,
    RequestError,
    Stage,
    Status,
)

__all__ = [
    "ATTEMPTS",
    "CLAIMS",
    "CONTRACT_VERSION",
    "COUNTERS",
    "DEAD",
    "DELAYED",
    "ID_PATTERN",
    "LEASES",
    "MAX_IMAGE_CHARS",
    "MAX_INLINE_LABELS",
    "MAX_LABEL_CHARS",
    "MAX_MESSAGE_BYTES",
    "MAX_METADATA_BYTES",
    "MAX_TOP_K",
    "PARKED",
    "REQUEST_FIELDS",
    "RESULT_STREAM",
    "TASK_NAME",
    "WORKERS",
    "Answer",
    "ErrorCode",
    "ErrorInfo",
    "Head",
    "ImageInfo",
    "InlineLabels",
    "Label",
    "LabelSetName",
    "LabelsInfo",
    "Lane",
    "ModelInfo",
    "Request",
    "RequestError",
    "Stage",
    "Status",
    "Tag",
    "Timing",
    "Want",
    "check_id",
    "done_key",
    "parse_request",
    "reference_error",
    "result_key",
    "without_query",
]
