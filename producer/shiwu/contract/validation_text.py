"""Says what a value that pydantic refuses should have been, in the words of shiwu's other errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pydantic_core import ErrorDetails

from shiwu.contract.text import NAME_PATTERN

MAX_SHOWN_CHARS: Final = 80
_TEXT = "a text"
_MAPPING = "a mapping of keys to values"
_EXPECTED: Final[Mapping[str, str]] = {
    "missing": "a value, there is none",
    "extra_forbidden": "no such key",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "invalid-json-value": "a value that JSON can write",
    "finite_number": "a finite number",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "literal_error": "{expected}",
    "enum": "{expected}",
    "string_type": _TEXT,
    "path_type": _TEXT,
    "string_unicode": "text that UTF-8 can write",
    "string_too_short": "a text of at least {min_length} characters",
    "string_too_long": "a text of at most {max_length} characters",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "too_short": "at least {min_length} items",
    "too_long": "at most {max_length} items",
    "dict_type": _MAPPING,
    "model_type": _MAPPING,
    "model_attributes_type": _MAPPING,
    "dataclass_type": _MAPPING,
}
"""Type of pydantic's error → what was expected; the names in braces are in its `ctx`."""
_PATTERNS: Final[Mapping[str, str]] = {
    NAME_PATTERN: "a name of 1 to 64 letters and digits, and after the first also _ . and -"
}
_OF_PYDANTIC: Final = ("Input should be", "String should match")
_HAS_NO_VALUE: Final = frozenset({"missing", "extra_forbidden"})


def expectation(error: ErrorDetails) -> str:
    """What was expected, without the field and without the value that came. Texts of own checks stay as they are."""
    text = _EXPECTED.get(error["type"])
    if error["type"] == "string_pattern_mismatch":
        text = _PATTERNS.get(error["ctx"]["pattern"])
    if text is None:
        return error["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    context = {
        name: f"{value:g}" if isinstance(value, float) else value for name, value in error.get("ctx", {}).items()
    }
    words = text.format_map(context)
    return f"expected {words}".replace(" 1 characters", " 1 character").replace(" 1 items", " 1 item")


def expected_and_got(error: ErrorDetails) -> str:
    """What was expected and what came, without the field. Not for fields that may hold a secret."""
    text = expectation(error)
    is_own_text = error["type"] not in _EXPECTED and not error["msg"].startswith(_OF_PYDANTIC)
    has_value = error["type"] not in _HAS_NO_VALUE and "got " not in text
    return f"{text}, got {_shown(error)}" if has_value and not is_own_text else text


def _shown(error: ErrorDetails) -> str:
    value: Any = error["input"]
    if error["type"] in {"too_short", "too_long"}:
        return str(error["ctx"]["actual_length"] or "none")
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}…"
