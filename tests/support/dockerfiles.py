"""Reads Dockerfiles as text: building takes minutes. One Dockerfile is a list of (instruction, its arguments)."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[2]
DOCKER: Final = ROOT / "docker"
PINNED: Final = re.compile(r"[\w./-]+:[\w.-]*\d[\w.-]*@sha256:[0-9a-f]{64}")
"""An image by a tag that tells a version, for people, and by digest, for machines."""
SECRET: Final = re.compile(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY|CREDENTIAL", re.I)

SCRIPTS: Final = Path(sysconfig.get_path("scripts"))

Instructions = list[tuple[str, str]]


def read(path: Path) -> Instructions:
    """In order, with continued lines joined and comments left out."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    split = (line.partition(" ") for line in joined.splitlines() if line.strip())
    return [(name.upper(), rest.strip()) for name, _, rest in split]


def of_kind(instructions: Instructions, kind: str) -> list[str]:
    """The arguments of every instruction of one kind."""
    return [rest for name, rest in instructions if name == kind]


def final_stage(instructions: Instructions) -> Instructions:
    """What makes the image that is shipped."""
    last = max(number for number, (name, _) in enumerate(instructions) if name == "FROM")
    return instructions[last:]


def variables(instructions: Instructions) -> dict[str, str]:
    """What ENV sets, without quotes."""
    pairs = re.findall(r'(\w+)=("[^"]*"|\S*)', " ".join(of_kind(instructions, "ENV")))
    return {name: value.strip('"') for name, value in pairs}


def health_command(instructions: Instructions) -> list[str]:
    """HEALTHCHECK's command in its exec form."""
    (check,) = of_kind(instructions, "HEALTHCHECK")
    command: Any = json.loads(check.partition("CMD ")[2])
    assert isinstance(command, list)
    return [str(part) for part in command]


@cache
def compose_command() -> list[str] | None:
    """Docker Compose itself: the plugin, or the binary of the development tools where it runs on this machine."""
    for command in (["docker", "compose"], [str(SCRIPTS / "docker-compose")]):
        if shutil.which(command[0]):
            try:
                done = subprocess.run([*command, "version"], capture_output=True, text=True, timeout=30, check=False)
            except OSError:
                continue
            if done.returncode == 0 and "Compose" in done.stdout:
                return command
    return None


def run_compose(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The output of Docker Compose with these arguments.

    Raises:
        FileNotFoundError: none runs on this machine.
    """
    command = compose_command()
    if command is None:
        raise FileNotFoundError("no Docker Compose runs on this machine")
    return subprocess.run(
        [*command, *arguments],
        capture_output=True,
        check=False,
        text=True,
        timeout=30,
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent"},
    )
