"""Lines below a job without tags: the worker's message, and what to do about the error code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from shiwu.contract import CODES, ErrorCode, ErrorInfo

_COMMAND_LINE_REMEDIES: Final[Mapping[str, str]] = {
    ErrorCode.UNKNOWN_LABEL_SET: "For labels of your own use --label WORD, once for each, or --labels WORD,WORD; a "
    "single label needs a comma at its end: --labels WORD,",
    ErrorCode.CANCELLED: "",
}
"""Error code → remedy on the command line, where it differs from that in `CODES`; empty: none is needed."""


def notes_of(error: ErrorInfo | None) -> list[str]:
    """Lines to show below a job without tags: the worker's message, and what to do."""
    if error is None:
        return []
    code = str(error.code)  # a newer worker may send a code that this version does not know
    known = CODES.get(ErrorCode(code)) if code in set(ErrorCode) else None
    hint = _COMMAND_LINE_REMEDIES.get(code, known.remedy if known else "")
    return [note for note in (error.message, f"hint: {hint}" if hint else "") if note]
