"""Workers that start from a process which has imported the libraries: as `python -m` starts them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.support.preloaded import Child, Preloaded
from tests.support.processes import ROOT, clean_environment

LIBRARY: Final = "wave"
"""A module that nothing else imports."""
PROGRAM: Final = (
    "import os, sys; print(os.environ.get('SHIWU_X'), os.getsid(0) == os.getpid(), os.getcwd(), os.read(0, 9), "
    f"{LIBRARY!r} in sys.modules, flush=True); print('to stderr', file=sys.stderr, flush=True); "
)


@pytest.fixture(scope="module")
def preloaded() -> Iterator[Preloaded]:
    """One that has imported little."""
    made = Preloaded(root=ROOT, env=clean_environment({}), libraries=[LIBRARY])
    yield made
    made.stop()


def command(end: str) -> list[str]:
    """`python -m timeit`, which runs this code once."""
    return [sys.executable, "-m", "timeit", "-n", "1", "-r", "1", PROGRAM + end]


def start(preloaded: Preloaded, folder: Path, end: str) -> Child:
    """Run it with its output in the files `out` and `err`."""
    env = clean_environment({"SHIWU_X": "given"})
    with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
        return preloaded.start(command(end), env=env, stdout=out.fileno(), stderr=err.fileno())


@pytest.mark.parametrize(
    ("end", "status"), [("os._exit(3)", 3), ("os.kill(os.getpid(), 9)", -signal.SIGKILL), ("raise ValueError", 1)]
)
def test_process_differs_in_nothing_but_its_imports(
    preloaded: Preloaded, tmp_path: Path, end: str, status: int
) -> None:
    """Its environment, session, folder, input, output and exit status are those that were asked for."""
    child = start(preloaded, tmp_path, end)
    assert child.wait(60) == status
    assert child.poll() == status
    assert (tmp_path / "out").read_text() == f"given True {ROOT} b'' True\n"
    assert (tmp_path / "err").read_text().startswith("to stderr\n")
    assert os.environ.get("SHIWU_X") is None


def test_exit_functions_run_before_the_end(preloaded: Preloaded, tmp_path: Path) -> None:
    """Those of the process, after its threads, of which one outlives the main one; what it has printed is there."""
    late = "threading.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start()"
    end = f"import atexit, threading, time; atexit.register(print, 'exit function'); {late}"
    assert start(preloaded, tmp_path, end).wait(60) == 0
    assert (tmp_path / "out").read_text().splitlines()[-2:] == ["thread", "exit function"]


@pytest.mark.parametrize(
    ("words", "status"),
    [(["timeit", "--help"], 0), (["timeit", "--wrong"], 2), (["json.tool", "missing"], 2), (["no_such_module"], 1)],
)
def test_exit_status_is_that_of_the_module(preloaded: Preloaded, tmp_path: Path, words: list[str], status: int) -> None:
    """Whether it returns, exits or fails."""
    with (tmp_path / "out").open("wb") as out:
        env = clean_environment({})
        child = preloaded.start([sys.executable, "-m", *words], env=env, stdout=out.fileno(), stderr=out.fileno())
    assert child.wait(60) == status


def test_processes_end_one_by_one(preloaded: Preloaded, tmp_path: Path) -> None:
    """A signal reaches one of them; those that have ended get none."""
    children = [start(preloaded, tmp_path, "import time; time.sleep(60)") for _ in range(3)]
    assert len({child.pid for child in children}) == 3
    children[1].send_signal(signal.SIGTERM)
    assert children[1].wait(60) == -signal.SIGTERM
    assert [child.poll() for child in children] == [None, -signal.SIGTERM, None]
    with pytest.raises(subprocess.TimeoutExpired):
        children[0].wait(0)
    for child in children:
        child.send_signal(signal.SIGKILL)
    assert [child.wait(60) for child in children] == [-signal.SIGKILL, -signal.SIGTERM, -signal.SIGKILL]


def test_other_commands_and_environments_have_their_interpreter() -> None:
    """Libraries read some variables while they are imported."""
    preloaded = Preloaded(root=ROOT, env={"HOME": "/home"})
    assert preloaded.can_start(command(""), {"HOME": "/home", "SHIWU_X": "1", "AWS_REGION": "a"})
    assert not preloaded.can_start(command(""), {"HOME": "/home", "HF_HUB_OFFLINE": "0"})
    assert not preloaded.can_start(command(""), {})
    assert not preloaded.can_start([sys.executable, "-c", ""], {"HOME": "/home"})
    assert not preloaded.can_start(["/usr/bin/python", "-m", "timeit"], {"HOME": "/home"})
