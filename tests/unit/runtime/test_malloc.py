"""Page faults of forward passes and commands that reuse the memory of the last."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PASSES = """
import resource, statistics, threading, torch
from shiwu_worker.runtime.malloc import keep_freed_memory, use_one_arena
use_one_arena()
keep_freed_memory()
torch.set_num_threads(1)
wide, narrow = torch.ones(5 << 20), torch.ones(1 << 20)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work(counted):
    for _ in range(40):
        before = faults()
        for _ in range(4):
            hidden = wide * 1.0
            hidden = hidden * torch.sigmoid(1.702 * hidden)
            narrow + narrow
        counted.append(faults() - before)
counted = []
threads = [threading.Thread(target=work, args=(counted,)) for _ in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(statistics.median(counted[len(counted) // 2 :]))
"""
"""The memory of one layer of ViT-B/16, in two threads. The first passes find the places of their blocks."""


ENCODER = """
import resource
import numpy as np
from shiwu_worker.runtime.malloc import use_one_arena
use_one_arena()
from tests.support.pictogram import PICTOGRAM_ZH
from shiwu_worker.stages.encode.encoder import Encoder, EncoderOptions
encoder = Encoder(EncoderOptions(
    folder=PICTOGRAM_ZH, model_id="m", revision="r", mean=(0.5,) * 3, std=(0.5,) * 3, batch_sizes=(64,),
    device="cpu", dtype="float32",
))
pixels = np.zeros((64, 64, 64, 3), np.uint8)
for number in range(8):
    if number == 4:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    encoder.encode(pixels)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 4)
"""

COMMITS = """
import resource, threading
import hiredis
from shiwu_worker.celery_worker import process
process.begin()
answers = tuple(b"a" * 900 for _ in range(1000))
def work():
    for number in range(8):
        if number == 4:
            counted.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        hiredis.pack_command(("EVALSHA", *answers))
    counted.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
counted = []
thread = threading.Thread(target=work)
thread.start()
thread.join()
print((counted[1] - counted[0]) / 4)
"""

ARENAS = """
import ctypes, threading
{begin}
threads = [threading.Thread(target=lambda: bytearray(100_000)) for _ in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
out = libc.fopen(b"/dev/stdout", b"w")
libc.malloc_info(0, ctypes.c_void_p(out))
libc.fflush(ctypes.c_void_p(out))
"""

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no glibc")


def printed(program: str) -> float:
    """The number that a new process prints. A process of its own, because mallopt cannot be undone."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    return float(done.stdout)


def test_threads_reuse_the_memory_that_they_free() -> None:
    """With an arena per thread, passes return their memory to the kernel and have 3,000 to 6,000 page faults."""
    assert printed(PASSES) < 1000


def test_forward_pass_reuses_the_memory_of_the_last() -> None:
    """Otherwise each pass of the embedded model with 64 images has tens of thousands of page faults."""
    assert printed(ENCODER) < 2000


def test_commands_reuse_the_memory_of_the_last() -> None:
    """Otherwise a command with 1,000 answers has 430 page faults, also on a worker with a GPU."""
    assert printed(COMMITS) < 40


@pytest.mark.parametrize(
    ("begin", "is_one"), [("from shiwu_worker.celery_worker import process; process.begin()", True), ("", False)]
)
def test_worker_starts_with_one_arena(begin: str, *, is_one: bool) -> None:
    """It is set before the first thread starts, so that no thread gets an arena of its own."""
    command = [sys.executable, "-c", ARENAS.format(begin=begin)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout.count("<heap nr=") == 1) == is_one
