"""The producer's side stays light: no model library and no Celery is loaded by it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import ROOT

WITHOUT_LIBRARIES = """
import importlib.abc, runpy, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
sys.argv[1:] = ARGS
runpy.run_module("shiwu_worker", run_name="__main__")
"""
MISSING = {"torch", "transformers", "PIL", "boto3", "botocore", "numpy", "celery", "kombu", "structlog", "yaml"} | {
    "pydantic_settings",
    "pynvml",
    "prometheus_client",
    "urllib3",
}
HEAVY = {"torch", "transformers", "PIL", "boto3", "numpy", "celery", "kombu", "shiwu_worker", "jinja2"}


@pytest.mark.parametrize(
    "statement", ["import shiwu", "import shiwu.contract", "from shiwu import Client", "import shiwu.cli"]
)
def test_importing_the_producer_loads_nothing_heavy(statement: str) -> None:
    """In a fresh interpreter, since this one has everything loaded."""
    code = f"{statement}; import sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert not HEAVY & set(loaded.split())


@pytest.mark.parametrize(("args", "code"), [([], 64), (["--check"], 64), (["--tune"], 64), (["--help"], 0)])
def test_the_worker_without_its_libraries_says_so(args: list[str], code: int) -> None:
    """One line with what to run, and no traceback, where only the producer's side is installed."""
    script = WITHOUT_LIBRARIES.replace("MISSING", repr(MISSING)).replace("ARGS", repr(args))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == code, done.stderr
    told = done.stderr.splitlines()
    assert len(told) == (1 if code else 0)
    assert all("pip install '.[worker]'" in line for line in told)


def test_celery_options_without_celery_say_what_to_install() -> None:
    """A name of our package is no hint that another one is missing."""
    script = WITHOUT_LIBRARIES.replace("MISSING", repr({"celery"})).replace("ARGS", "[]")
    script = script.replace('runpy.run_module("shiwu_worker", run_name="__main__")', "import shiwu.celery")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert "shiwu.celery needs celery: run `pip install '.[celery]'` in a clone of shiwu" in done.stderr


def test_no_text_installs_shiwu_from_an_index() -> None:
    """There it is not, and another project may have the name."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    texts = [ROOT / name for name in tracked if name.endswith((".md", ".py", ".txt", ".yaml", ".tpl", "file"))]
    wrong = re.compile(r"pip install +(?:-[^ ]+ +)*['\"]?shiwu\b")
    own = Path(__file__)
    found = [str(path) for path in texts if path != own and wrong.search(path.read_text(encoding="utf-8"))]
    assert found == []
