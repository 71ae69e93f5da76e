"""Print what pyproject.toml asks for, one requirement a line: `requirements.py [EXTRA …]` or `--build-system`.

An image installs this before our own code is copied, so that a change of the code does not install torch again. Run by
the base image's Python: standard library only.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def requirements(text: str, *asked: str) -> list[str]:
    """The requirements in a pyproject.toml: of the project and these extras, or with `--build-system` of its build."""
    content = tomllib.loads(text)
    if asked == ("--build-system",):
        return list(content["build-system"]["requires"])
    project = content["project"]
    return [*project["dependencies"], *(line for name in asked for line in project["optional-dependencies"][name])]


if __name__ == "__main__":
    pyproject = Path(__file__).resolve().parents[1] / "pyproject.toml"
    print("\n".join(requirements(pyproject.read_text(encoding="utf-8"), *sys.argv[1:])))
