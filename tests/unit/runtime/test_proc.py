"""Reading processes, threads and CPUs from /proc."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shiwu_worker.runtime.proc import cpu_flags, highest_descriptor, is_running, read_text, thread_cpu_s
from tests.support.waiting import wait_until

NO_PID = 2**22 + 1


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits, with brackets and spaces in its name."""
    code = "import ctypes; ctypes.CDLL(None).prctl(15, b'a) S (b c'); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def test_missing_file_reads_as_empty_text(tmp_path: Path) -> None:
    """Bytes that are no UTF-8 are replaced."""
    assert read_text(tmp_path / "none") == ""
    (tmp_path / "file").write_bytes(b"a\xff")
    assert read_text(tmp_path / "file") == "a\ufffd"


def test_stopped_and_exited_processes_are_not_running(child: subprocess.Popen[bytes]) -> None:
    """A zombie has exited; a process that continues runs again."""
    assert is_running(child.pid)
    child.send_signal(signal.SIGSTOP)
    wait_until(lambda: not is_running(child.pid), timeout_s=5)
    child.send_signal(signal.SIGCONT)
    wait_until(lambda: is_running(child.pid), timeout_s=5)
    child.kill()
    wait_until(lambda: not is_running(child.pid), timeout_s=5)
    assert not is_running(NO_PID)


def test_cpu_time_is_that_of_the_thread() -> None:
    """Not of the process; a thread that has ended has none."""
    started, ids = threading.Event(), list[int]()
    other = threading.Thread(target=lambda: (ids.append(threading.get_native_id()), started.wait(30)), daemon=True)
    other.start()
    wait_until(lambda: ids, timeout_s=5)
    before_s, until_s = thread_cpu_s(os.getpid(), threading.get_native_id()), time.thread_time() + 0.1
    while time.thread_time() < until_s:
        pass
    assert 0.05 <= thread_cpu_s(os.getpid(), threading.get_native_id()) - before_s <= 1.0
    assert thread_cpu_s(os.getpid(), ids[0]) < 0.05
    started.set()
    other.join(5)
    assert thread_cpu_s(os.getpid(), NO_PID) == 0.0


def test_cpu_flags_are_words_of_the_first_cpu() -> None:
    """Each flag is one word, so that a part of a name is not taken for a flag."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    flags = cpu_flags()
    assert flags
    assert flags <= set(text.split())


def test_highest_descriptor_counts_the_newest() -> None:
    """It is at least as high as a file that was just opened at a high number."""
    read, write = os.pipe()
    high = os.dup2(read, 200)
    try:
        assert highest_descriptor() >= high
    finally:
        for descriptor in (read, write, high):
            os.close(descriptor)
