"""The filter of system calls holds in the cells, and what a decoder needs goes on working under it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shiwu_worker.loaders.seccomp import SandboxError, filter_program

HAS_FILTERS = Path("/proc/sys/kernel/seccomp/actions_avail").exists()
INSIDE = """
import mmap, os, socket, threading
from shiwu_worker.stages.decode.image_spec import ImageSpec
from shiwu_worker.loaders.seccomp import install_filter
from shiwu_worker.policy.limits import DecodeLimits
from shiwu_worker.stages.decode.decoder import (decode, warm)
from tests.support import pictures

warm()
variants = pictures.variants()
install_filter()
spec = ImageSpec(64, 64, "squash", None, 3, (0.5,) * 3, (0.5,) * 3)
limits = DecodeLimits(50_000_000, 16_384, ("JPEG", "PNG", "WEBP", "GIF", "AVIF"))
done = []

def work():
    for data in variants.values():
        decode(data, spec=spec, limits=limits)
    done.append(bytearray(50 << 20))

threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(done) == 4
FORBIDDEN = {
    "fork": os.fork,
    "open": lambda: open("/etc/passwd"),
    "create": lambda: open("/tmp/created", "w"),
    "list": lambda: os.listdir("/"),
    "exec": lambda: os.execv("/bin/true", ["true"]),
    "socket": socket.socket,
    "pair": socket.socketpair,
    "kill": lambda: os.kill(os.getppid(), 0),
    "memfd": lambda: os.memfd_create("x"),
    "executable": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC),
    "limits": lambda: __import__("resource").setrlimit(4, (1, 1)),
    "pidfd": lambda: os.pidfd_open(os.getpid()),
}
for name, call in FORBIDDEN.items():
    try:
        call()
    except PermissionError:
        continue
    except ValueError as error:
        assert name == "limits", error
        continue
    raise SystemExit(f"{name} succeeded")
print("held", flush=True)
os.abort()
"""


def test_filter_allows_decoding_and_opens_nothing() -> None:
    """Threads, large memory and every format work; files, sockets, processes and executable memory do not."""
    done = subprocess.run([sys.executable, "-c", INSIDE], capture_output=True, text=True, timeout=120, check=False)
    if "the kernel refused the filter" in done.stderr and not HAS_FILTERS:
        pytest.skip("this kernel does not allow filters of system calls")
    assert done.stdout == "held\n", done.stderr
    assert done.returncode < 0, "abort() still ends the process by its signal"


def test_each_machine_has_its_numbers_others_fail() -> None:
    """x86_64 and aarch64; the jumps of a filter reach no further than its end."""
    for machine in ("x86_64", "aarch64"):
        code = filter_program(machine, os.getpid())
        steps = [code[at : at + 8] for at in range(0, len(code), 8)]
        assert len(code) % 8 == 0
        for at, step in enumerate(steps):
            assert at + 1 + max(step[2], step[3]) <= len(steps)
    with pytest.raises(SandboxError, match="expected x86_64 or aarch64, got riscv64"):
        filter_program("riscv64", 1)
