"""Errors of reading and writing, each with a stable code."""

from __future__ import annotations

from shiwu.errors import ShiwuError


class SourceError(ShiwuError):
    """A file or an object cannot be read; the text says what was expected, what came and what to do."""

    code = "source_unreadable"


class WrongSource(SourceError):
    """The name of a source has no known form, or names nothing; a command ends with the code of wrong usage."""


class TargetError(ShiwuError):
    """Results cannot be written; the text says what was expected, what came and what to do."""

    code = "target_unwritable"


class WrongTarget(TargetError):
    """The output has results of something else; a command ends with the code of wrong usage."""
