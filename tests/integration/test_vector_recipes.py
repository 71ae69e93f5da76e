"""The scripts of docs/vectors.md that load vectors into databases, run as they stand there.

Their libraries are large, so they are no part of the development environment. `RECIPES_PYTHON` names an interpreter
that has some of them, and `DATABASE_URL` a database of PostgreSQL with pgvector and without a table `images`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.support.processes import ROOT
from tests.support.vector_parts import write_parts

PAGE: Final = ROOT / "docs" / "vectors.md"
PYTHON: Final = os.environ.get("RECIPES_PYTHON", sys.executable)
LIBRARIES: Final = {
    "LanceDB": "lancedb",
    "Qdrant": "qdrant_client",
    "pgvector": "psycopg",
    "Milvus": "pymilvus, milvus_lite",
}


def recipes() -> dict[str, str]:
    """Heading → script."""
    found = re.findall(r"^### (\w+)\n.*?^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    return dict(found)


def test_each_database_of_the_page_has_a_script() -> None:
    """So that the test below runs all of them."""
    assert recipes().keys() == LIBRARIES.keys()


@pytest.mark.parametrize("name", LIBRARIES)
def test_script_of_the_page_finds_the_nearest_images(name: str, tmp_path: Path) -> None:
    """The first image itself comes first, with the distance 0 or the cosine 1."""
    script = recipes()[name]
    compile(script, name, "exec")
    imported = subprocess.run([PYTHON, "-c", f"import {LIBRARIES[name]}"], capture_output=True, check=False)
    if imported.returncode or (name == "pgvector" and "DATABASE_URL" not in os.environ):
        pytest.skip("no vector database for the recipes of docs/vectors.md")
    write_parts(tmp_path / "kept", 500, 320, model="m", revision="r")
    done = subprocess.run(
        [PYTHON, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=170, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("s3://")]
    assert len(rows) == 3
    assert rows[0][0] == "s3://pictures/0.jpg"
    assert min(abs(float(rows[0][1])), abs(float(rows[0][1]) - 1.0)) < 1e-3
