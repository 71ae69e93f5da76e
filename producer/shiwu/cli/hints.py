"""What to do about an error of an answer, by its stable code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from shiwu.contract import ErrorCode, ErrorInfo

_LATER: Final = "when it is repaired, `shiwu dead requeue ID` sends the job again"
_HINTS: Final[Mapping[str, str]] = {
    ErrorCode.MALFORMED_MESSAGE: "send Celery messages of task protocol 2 with a JSON body; `shiwu dead show ID` "
    "prints what came",
    ErrorCode.MESSAGE_TOO_LARGE: "send fewer labels or less metadata in one message",
    ErrorCode.UNKNOWN_TASK: "only shiwu.tag is answered in these lanes",
    ErrorCode.UNSUPPORTED_CANVAS: "send fewer callbacks, or call them when the answer is there",
    ErrorCode.CALLBACK_REFUSED: "the operator allows callbacks by SHIWU_CALLBACK_TASKS and SHIWU_CALLBACK_QUEUES",
    ErrorCode.UNKNOWN_LABEL_SET: "for words of your own use --label WORD, once for each, or --labels WORD,WORD; "
    "one word alone needs a comma at its end: --labels WORD,",
    ErrorCode.SOURCE_NOT_FOUND: "check the bucket and the key, or the address, for spelling and upper case",
    ErrorCode.SOURCE_FORBIDDEN: "check that the worker's credentials may read it, and the worker's lists of allowed "
    "hosts, buckets and folders",
    ErrorCode.SOURCE_NOT_A_FILE: "name one object or file, not a folder or a prefix",
    ErrorCode.SOURCE_UNAVAILABLE: f"check that the worker can reach the source; {_LATER}",
    ErrorCode.SOURCE_THROTTLED: "the source asks for fewer requests; `shiwu dead requeue ID` sends the job again later",
    ErrorCode.SOURCE_ARCHIVED: "restore the object from its archive, then `shiwu dead requeue ID`",
    ErrorCode.SOURCE_CREDENTIALS: f"the operator checks the worker's credentials with `shiwu-worker --check`; {_LATER}",
    ErrorCode.SOURCE_CLOCK_SKEW: f"the operator sets the clock of the worker's machine; {_LATER}",
    ErrorCode.SOURCE_ERROR: f"the worker's log has the reply of the source; {_LATER}",
    ErrorCode.PICTURE_TOO_LARGE: "send a smaller image, or let the operator raise SHIWU_MAX_BYTES, SHIWU_MAX_PIXELS, "
    "SHIWU_MAX_SIDE, SHIWU_MAX_FRAMES or SHIWU_MAX_SCANS",
    ErrorCode.NOT_A_PICTURE: "check what the reference really holds: an error page or a login page is no image",
    ErrorCode.PICTURE_UNSUPPORTED: "convert the image to JPEG or PNG, or let the operator add its format to "
    "SHIWU_FORMATS",
    ErrorCode.PICTURE_BROKEN: "check that the upload was complete; another copy may be whole",
    ErrorCode.DECODER_TIMEOUT: "send a smaller image, or let the operator raise SHIWU_DECODE_CPU_S",
    ErrorCode.OUT_OF_MEMORY: "the operator lowers SHIWU_MAX_BATCH or gives the device more memory; "
    "`shiwu dead requeue ID` sends the job again",
    ErrorCode.EXPIRED: "no worker got to it in time: `shiwu status` shows what waits; allow more time, or more workers",
    ErrorCode.ATTEMPTS_EXHAUSTED: "the logs of its workers say why they gave it up; `shiwu dead requeue ID` sends the "
    "job again",
    ErrorCode.ALREADY_ANSWERED: "enqueue the image under a new id",
}


def notes_of(error: ErrorInfo | None) -> list[str]:
    """Lines to show below a job that has no tags: what the worker says, and what to do."""
    if error is None:
        return []
    hint = _HINTS.get(str(error.code))
    return [note for note in (error.message, f"hint: {hint}" if hint else None) if note]
