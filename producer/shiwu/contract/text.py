"""Which characters the texts of a message may contain."""

from __future__ import annotations

import re
from typing import Final

UNSAFE_RANGES: Final = (
    r"\u0000-\u001f\u007f-\u009f"  # C0, DEL and C1: line breaks, terminal sequences
    r"\u2028\u2029"  # line and paragraph separator
    r"\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # they change the direction of the text around them
    r"\u00ad\u180e\u200b\u2060-\u2065\u206a-\u206f\ufeff\ufff9-\ufffb"  # no width: they hide a difference
)
"""Characters that a terminal obeys or hides. Messages may not contain them, and output escapes them.

Joiners (U+200C, U+200D) and variation selectors are not among them: emoji and several scripts need them.
"""
NO_CONTROLS_PATTERN: Final = f"^[^{UNSAFE_RANGES}]*$"
"""Written in the syntax that JSON Schema, Python and Rust share."""
_UNSAFE: Final = re.compile(f"[{UNSAFE_RANGES}\ud800-\udfff]")

_NOT_IN_NAMES: Final = (
    r"\u0000-\u002c\u002f\u003a-\u0040\u005b-\u005e\u0060\u007b-\u00bf"  # ASCII and Latin-1, spaces included
    r"\u061c\u2000-\u206f\u3000-\u3004\u3008-\u3020\ufeff"  # general and Chinese punctuation, spaces included
    r"\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"  # full-width punctuation
)
NAME_PATTERN: Final = rf"^[^{_NOT_IN_NAMES}_.\-][^{_NOT_IN_NAMES}]{{0,63}}$"
"""1 to 64 letters and digits of any script, with `_`, `.` and `-` after the first."""


def control_character(text: str) -> str | None:
    """The first control character as `U+000A`, or None.

    Control characters are C0 and C1, line separators, characters that change the direction of text or have no width,
    and lone surrogates, which UTF-8 cannot encode.
    """
    if text.isascii() and text.isprintable():
        return None
    found = _UNSAFE.search(text)
    return f"U+{ord(found[0]):04X}" if found else None
