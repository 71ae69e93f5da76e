"""Escapes control characters in text that people read in a terminal or a log."""

from __future__ import annotations

import re
from typing import Final

from shiwu.contract.text import UNSAFE_RANGES

_UNPRINTABLE: Final = re.compile(f"[{UNSAFE_RANGES}\ud800-\udfff\U000e0000-\U000e007f]")
"""Also lone surrogates, which no encoding can write, and the invisible tags of a few flags."""


def printable(text: str) -> str:
    r"""The text with every character that a terminal obeys or hides written as `\uXXXX`.

    All user-supplied text (references, labels, ids, messages) passes through here before a terminal or a log shows it.
    The form is JSON's own, so JSON without line breaks keeps its meaning.
    """
    return text if text.isprintable() else _UNPRINTABLE.sub(_escape, text)


def printable_lines(text: str) -> str:
    """A text of several lines: escaped like `printable`, but line breaks stay."""
    return "\n".join(map(printable, text.split("\n")))


def printable_json(raw: bytes) -> str:
    """JSON for a terminal: escaped like `printable`, but line breaks between fields stay."""
    return printable_lines(raw.decode())


def _escape(found: re.Match[str]) -> str:
    number = ord(found[0])
    if number < 0x10000:
        return f"\\u{number:04x}"
    number -= 0x10000
    return f"\\u{0xD800 + (number >> 10):04x}\\u{0xDC00 + (number & 0x3FF):04x}"
