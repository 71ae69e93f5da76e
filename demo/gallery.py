"""The last step of the demo: `shiwu gallery` makes one HTML page of the answers."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from tests.support.processes import ROOT, clean_environment

from shiwu.contract import Answer

PAGE: Final = ROOT / "demo" / "out" / "gallery.html"
GALLERY_S: Final = 120.0


def write_page(answers: Sequence[Answer], page: Path, *, settings: Mapping[str, str]) -> Path | None:
    """Write the page and return its path; None where it cannot be made, which standard error tells.

    Args:
        settings: variables of the worker, by which the thumbnails are fetched.
    """
    with contextlib.suppress(OSError):  # the command below says what is wrong with the place
        page.parent.mkdir(parents=True, exist_ok=True)
    made = subprocess.run(
        [sys.executable, "-m", "shiwu.cli", "gallery", "--jsonl", "-", "-o", str(page), "--title", "shiwu demo"],
        input=b"".join(answer.to_json() + b"\n" for answer in answers),
        stdout=subprocess.DEVNULL,
        env=clean_environment(settings),
        timeout=GALLERY_S + 2 * len(answers),
        check=False,
    )
    return page.resolve() if made.returncode == os.EX_OK else None
