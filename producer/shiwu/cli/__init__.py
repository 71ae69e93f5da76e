"""`shiwu` on the command line: ask, wait, follow, look, tidy up."""

from __future__ import annotations

from shiwu.cli import ask, dead, gallery, labels, sweep
from shiwu.cli import inspect as look
from shiwu.cli.base import main

__all__ = ["ask", "dead", "gallery", "labels", "look", "main", "sweep"]
