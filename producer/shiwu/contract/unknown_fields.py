"""Finds request fields that this version does not know: a worker warns about them, and a client refuses them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from typing import Any, Final

from shiwu.contract.answer import AnswerWarning
from shiwu.contract.request import REQUEST_FIELDS
from shiwu.contract.vocabulary import WarningCode

MAX_NAMES: Final = 5
"""How many names an error text shows; a message may have any number."""
MAX_NAME_CHARS: Final = 40
_FIELDS: Final = frozenset(REQUEST_FIELDS)


def field_warnings(fields: Mapping[str, Any]) -> tuple[AnswerWarning, ...]:
    """A warning if the message has fields that this version does not know; otherwise empty."""
    if fields.keys() <= _FIELDS:
        return ()
    text = f"fields without effect, unknown to this worker: {unknown_names(fields, known=REQUEST_FIELDS)}"
    return (AnswerWarning(code=WarningCode.UNKNOWN_FIELD, message=text),)


def unknown_names(names: Iterable[str], *, known: Collection[str]) -> str:
    """The unknown names, each with the most similar known name; empty where all are known."""
    unknown = [name for name in names if name not in known]
    shown = [_with_suggestion(name[:MAX_NAME_CHARS], known) for name in unknown[:MAX_NAMES]]
    return ", ".join([*shown, "…"] if len(unknown) > MAX_NAMES else shown)


def _with_suggestion(name: str, known: Collection[str]) -> str:
    similar = get_close_matches(name, known, n=1)
    return f"{name!r} (did you mean {similar[0]!r}?)" if similar else repr(name)
