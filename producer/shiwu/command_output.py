"""Ends commands with one line instead of a traceback: on Ctrl-C, and where output cannot be written."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import click

from shiwu.entry import EXIT_INTERRUPTED

EXIT_OUTPUT: Final = 74
"""The same number for every command, as the next one."""
_OUTPUT_ERRORS: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF})


class OutputCommand(click.Command):
    """A command that ends with EXIT_OUTPUT when its output cannot be written, and with EXIT_INTERRUPTED on Ctrl-C."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command."""
        with written_output(self.name or "shiwu"):
            return super().main(*args, **kwargs)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Parse the arguments."""
        with interruptible(self.name or "shiwu"):
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with interruptible(self.name or "shiwu"):
            return super().invoke(ctx)


class OutputGroup(OutputCommand, click.Group):
    """A group of commands of the same kind."""


@contextmanager
def interruptible(command: str) -> Iterator[None]:
    """End with one line and EXIT_INTERRUPTED on Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"{command}: interrupted", err=True)
        sys.exit(EXIT_INTERRUPTED)


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
