"""The files with Redis users that the documentation has."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from tests.support.processes import ROOT

CONFIG = ROOT / "docs" / "redis-acl.conf"
CONFIG_6 = ROOT / "docs" / "redis-acl-6.conf"


def users_for(binary: Path) -> str:
    """The file with users that this server reads."""
    output = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
    [(major, minor)] = re.findall(r"v=(\d+)\.(\d+)", output)
    path = CONFIG if (int(major), int(minor)) >= (7, 2) else CONFIG_6
    return path.read_text(encoding="utf-8")
