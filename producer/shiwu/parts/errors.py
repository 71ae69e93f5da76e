"""Errors of reading and writing, each with a stable code."""

from __future__ import annotations

from shiwu.errors import ShiwuError


class SourceError(ShiwuError):
    """A file or an object cannot be read; the text says what was expected, what came and what to do."""

    code = "source_unreadable"


class TargetError(ShiwuError):
    """Results cannot be written; the text says what was expected, what came and what to do."""

    code = "target_unwritable"
