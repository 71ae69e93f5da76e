"""Reads answers from JSON lines, as `shiwu results` and `shiwu tag --json` print them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, Final

from shiwu.contract import Answer

MAX_LINE_BYTES: Final = 16 * 1024 * 1024
"""An answer may carry metadata and a vector; a longer line is none."""


def read_answers(lines: BinaryIO) -> Iterator[Answer]:
    """Yield the answer of each line; empty lines are skipped.

    Raises:
        ValueError: a line is no answer; the text names the line.
    """
    number = 0
    while line := lines.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise ValueError(f"line {number}: expected an answer of at most {MAX_LINE_BYTES} bytes")
        text = line.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else line.strip()
        if not text:
            continue
        try:
            yield Answer.from_json(text)
        except ValueError as error:
            raise ValueError(f"line {number}: expected an answer as JSON ({error})") from None
