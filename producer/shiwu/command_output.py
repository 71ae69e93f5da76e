"""Ends a command whose output cannot be written, as on a full disk, with one line instead of a traceback."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import click

EXIT_OUTPUT: Final = 74
"""The same number for every command."""
_OUTPUT_ERRORS: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF})


class OutputGroup(click.Group):
    """A group of commands that end with EXIT_OUTPUT when their output cannot be written."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command."""
        with written_output(self.name or "shiwu"):
            return super().main(*args, **kwargs)


class OutputCommand(click.Command):
    """One command of the same kind."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command."""
        with written_output(self.name or "shiwu"):
            return super().main(*args, **kwargs)


@contextmanager
def written_output(command: str) -> Iterator[None]:
    """Explain an error of standard output. Errors that name a file are other errors, and pass through."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno not in _OUTPUT_ERRORS:
            raise
        drop_output()
        click.echo(
            f"{command}: output_failed: expected a standard output that can be written, got: {error.strerror}. Free "
            "space where it goes, or send it elsewhere, and run the command again",
            err=True,
        )
        sys.exit(EXIT_OUTPUT)


def drop_output() -> None:
    """Send the rest of standard output nowhere: the interpreter flushes it once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
