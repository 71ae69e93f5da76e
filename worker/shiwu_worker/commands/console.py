"""Where commands print tables: as wide as the terminal, and wide enough for each row in a pipe or a file."""

from __future__ import annotations

import sys
from typing import Final

from rich.console import Console

PIPE_COLUMNS: Final = 160
"""Rich takes 80 where there is no terminal, and would wrap cells."""


def make_console() -> Console:
    """Standard output without markup, emoji codes and syntax colours."""
    return Console(markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else PIPE_COLUMNS)
