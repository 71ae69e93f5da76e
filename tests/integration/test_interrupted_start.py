"""Ctrl-C while the modules of a command are imported: exit code 130 and no traceback."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import pytest

from tests.support.processes import clean_environment

CONSOLE_SCRIPT = """
import os, signal, sys
from importlib.metadata import entry_points

signal.signal(signal.SIGINT, signal.{handler})
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            print("reached", flush=True)
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
(script,) = entry_points(group="console_scripts", name={command!r})
sys.argv[1:] = {args!r}
sys.exit(script.load()())
"""


def run(
    command: str, *args: str, module: str, handler: str = "default_int_handler"
) -> subprocess.CompletedProcess[str]:
    """Run a console script, as its wrapper does, and interrupt it at the first import of this module."""
    code = CONSOLE_SCRIPT.format(command=command, args=list(args), module=module, handler=handler)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=clean_environment({}),
    )
    assert done.stdout.startswith("reached"), done.stderr
    return done


@pytest.mark.parametrize(
    ("command", "module"),
    [
        ("shiwu", "click"),
        ("shiwu", "redis"),
        ("shiwu", "shiwu.cli.sweep"),
        ("shiwu-hooks", "click"),
        ("shiwu-hooks", "redis"),
        ("shiwu-worker", "click"),
        ("shiwu-worker", "shiwu_worker.retag.command"),
    ],
)
def test_interrupted_import_ends_in_silence(command: str, module: str) -> None:
    """Also where a library would catch the exception."""
    done = run(command, "--version", module=module)
    assert (done.returncode, done.stderr) == (130, "")


@pytest.mark.parametrize(
    ("command", "args", "module", "line"),
    [
        ("shiwu", ["backfill", "list"], "shiwu.backfill.session", "shiwu: interrupted; what was enqueued goes on"),
        ("shiwu", ["--help"], "shiwu.watch.command", "shiwu: interrupted"),
        ("shiwu-hooks", ["--endpoints", "none.yaml"], "shiwu.hooks.endpoints", "shiwu-hooks: interrupted"),
        ("shiwu-worker", ["--check"], "shiwu_worker.commands.check", "shiwu-worker: interrupted"),
        ("shiwu-worker", ["model", "inspect"], "shiwu_worker.commands.model_inspect", "shiwu-worker: interrupted"),
    ],
)
def test_interrupted_late_import_ends_with_one_line(command: str, args: Sequence[str], module: str, line: str) -> None:
    """A command that runs already, and imports what it alone needs."""
    done = run(command, *args, module=module)
    assert (done.returncode, done.stderr) == (130, f"{line}\n")


def test_ignored_interrupt_stays_ignored() -> None:
    """As where a shell starts a command in the background."""
    done = run("shiwu", "--version", module="click", handler="SIG_IGN")
    assert (done.returncode, done.stderr) == (0, "")


def test_entry_loads_no_library() -> None:
    """Until the signal has its handler, only what the interpreter itself needs for some milliseconds."""
    code = "import sys, shiwu.entry; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}; {code}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert not {"click", "redis", "pydantic", "msgspec", "rich", "celery"} & set(done.stdout.split())
