"""The producer's side stays light: no model library and no Celery is loaded by it."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "PIL", "boto3", "numpy", "celery", "kombu", "shiwu_worker"}


@pytest.mark.parametrize(
    "statement", ["import shiwu", "import shiwu.contract", "from shiwu import Client", "import shiwu.cli"]
)
def test_importing_the_producer_loads_nothing_heavy(statement: str) -> None:
    """In a fresh interpreter, since this one has everything loaded."""
    code = f"{statement}; import sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert not HEAVY & set(loaded.split())
