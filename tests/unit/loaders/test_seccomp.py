"""The filter of system calls holds in all threads of the sandbox, and what a decoder needs goes on working under it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shiwu_worker.loaders.seccomp import SandboxError, filter_program

HAS_FILTERS = Path("/proc/sys/kernel/seccomp/actions_avail").exists()
DECODING = """
import mmap, os, socket, sys, threading
from shiwu_worker.stages.decode.image_spec import ImageSpec
from shiwu_worker.loaders.seccomp import install_filter
from shiwu_worker.policy.limits import DecodeLimits
from shiwu_worker.stages.decode.decoder import decode, warm
from tests.support import pictures

warm()
image = pictures.picture()
variants = pictures.variants()
variants |= {kind: pictures.saved(image, kind) for kind in ("TIFF", "BMP")}
if has_heif := sys.argv[1:] == ["HEIF"]:
    variants["HEIF"] = pictures.heic(image)
spec = ImageSpec(64, 64, "squash", None, 3, (0.5,) * 3, (0.5,) * 3)
formats = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "TIFF", "BMP", "HEIF")
limits = DecodeLimits(50_000_000, 16_384, formats)
is_filtered = threading.Event()
done = []

def work():
    is_filtered.wait()
    for data in variants.values():
        for exact in (True, False):
            decode(data, spec=spec, limits=limits, is_exact=exact)
    done.append(bytearray(50 << 20))
    try:
        open("/etc/passwd")
    except PermissionError:
        return
    done.clear()

threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads: thread.start()
install_filter(has_threads=has_heif)
is_filtered.set()
for thread in threads: thread.join()
assert len(done) == 4, done
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
try:
    threading.Thread(target=int).start()
    assert has_heif, "a thread was started"
except RuntimeError:
    assert not has_heif, "no thread was started"
print("held", flush=True)
os.abort()
"""
OTHERS = """
import ctypes, errno, os, platform, resource, subprocess, sys
from shiwu_worker.loaders.seccomp import install_filter

# Name: number on x86_64 and aarch64, and arguments that act on process `pid` or read it.
victim = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
pid = victim.pid
at = ctypes.addressof(ctypes.create_string_buffer(4096))
CALLS = {
    "kill": (62, 129, pid, 0),
    "tkill": (200, 130, pid, 0),
    "tgkill": (234, 131, pid, pid, 0),
    "rt_sigqueueinfo": (129, 138, pid, 0, at),
    "rt_tgsigqueueinfo": (297, 240, pid, pid, 0, at),
    "pidfd_open": (434, 434, pid, 0),
    "pidfd_send_signal": (424, 424, 0, 0, 0, 0),
    "pidfd_getfd": (438, 438, 0, 0, 0),
    "process_madvise": (440, 440, 0, at, 1, 4, 0),
    "process_mrelease": (448, 448, 0, 0),
    "process_vm_readv": (310, 270, pid, at, 1, at, 1, 0),
    "process_vm_writev": (311, 271, pid, at, 1, at, 1, 0),
    "ptrace": (101, 117, 16, pid, 0, 0),
    "kcmp": (312, 272, pid, pid, 0, 0, 0),
    "perf_event_open": (298, 241, at, pid, -1, -1, 0),
    "setpriority": (141, 140, 0, pid, 5),
    "getpriority": (140, 141, 0, pid),
    "sched_setscheduler": (144, 119, pid, 0, at),
    "sched_getscheduler": (145, 120, pid),
    "sched_setparam": (142, 118, pid, at),
    "sched_setattr": (314, 274, pid, at, 0),
    "sched_getattr": (315, 275, pid, at, 56, 0),
    "sched_setaffinity": (203, 122, pid, 8, at),
    "sched_getaffinity": (204, 123, pid, 8, at),
    "sched_rr_get_interval": (148, 127, pid, at),
    "ioprio_set": (251, 30, 1, pid, 0),
    "ioprio_get": (252, 31, 1, pid),
    "prlimit64": (302, 261, pid, 7, 0, at),
    "prlimit64, new": (302, 261, 0, 7, at, 0),
    "get_robust_list": (274, 100, pid, at, at),
    "migrate_pages": (256, 238, pid, 8, at, at),
    "move_pages": (279, 239, pid, 0, 0, 0, 0, 0),
    "setpgid": (109, 154, pid, 0),
    "getpgid": (121, 155, pid),
    "getsid": (124, 156, pid),
    "capget": (125, 90, at, at),
    "wait4": (61, 260, -1, 0, 1, 0),
    "waitid": (247, 95, 0, 0, 0, 1, 0),
    "setns": (308, 268, 0, 0),
    "unshare": (272, 97, 0),
    "bpf": (321, 280, 0, at, 0),
    "userfaultfd": (323, 282, 0),
    "io_uring_setup": (425, 425, 1, at),
    "seccomp": (317, 277, 1, 0, at),
    "keyctl": (250, 219, 0, 0),
    "mbind": (237, 235, at, 4096, 0, 0, 0, 0),
    "shmget": (29, 194, 0, 4096, 0),
    "sendmsg": (46, 211, 1, at, 0),
    "clone, a process": (56, 220, 17, 0, 0, 0, 0),
    "clone, a thread": (56, 220, 0x3d0f00, 0, 0, 0, 0),
    "clone, a thread with other names": (56, 220, 0x3d0f00 | 0x4000000, 0, 0, 0, 0),
    "membarrier, all processes": (324, 283, 1, 0, 0),
    "madvise, poison": (28, 233, at, 4096, 100),
    "madvise, offline": (28, 233, at, 4096, 101),
    "clock of a process": (228, 113, ~pid << 3 | 2, at),
    "prctl": (157, 167, 4, 1, 0, 0, 0),
}
machine = 0 if platform.machine() == "x86_64" else 1
libc = ctypes.CDLL(None, use_errno=True)
install_filter()
wrong = []
for name, call in CALLS.items():
    ctypes.set_errno(0)
    found = libc.syscall(call[machine], *map(ctypes.c_long, call[2:]))
    if found != -1 or ctypes.get_errno() != errno.EPERM:
        wrong.append((name, found, ctypes.get_errno()))
OWN = {"sched_getaffinity": os.sched_getaffinity, "prlimit64": lambda pid: resource.prlimit(pid, 7)}
for call in OWN.values():
    call(0), call(os.getpid())
print("held" if not wrong else wrong, flush=True)
os._exit(0)
"""


def inside(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own; skips where the kernel has no filters."""
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if "the kernel refused the filter" in done.stderr and not HAS_FILTERS:
        pytest.skip("this kernel does not allow filters of system calls")
    return done


@pytest.mark.parametrize("formats", [(), ("HEIF",)], ids=["usual", "with-HEIF"])
def test_filter_allows_decoding_and_opens_nothing(formats: tuple[str, ...]) -> None:
    """Large memory and every format work; files, sockets, processes, threads and executable memory do not.

    HEIF's decoder needs threads, so they are allowed with it.
    """
    done = inside(DECODING, *formats)
    assert done.stdout == "held\n", done.stderr
    assert done.returncode < 0, "abort() still ends the process by its signal"


def test_no_call_acts_on_another_process() -> None:
    """Each call that could is tried on a child, which the kernel would allow without the filter."""
    done = inside(OTHERS)
    assert done.stdout == "held\n", done.stderr


@pytest.mark.parametrize("has_threads", [False, True])
def test_each_machine_has_its_numbers_others_fail(has_threads: bool) -> None:
    """x86_64 and aarch64; the jumps of a filter reach no further than its end."""
    for machine in ("x86_64", "aarch64"):
        code = filter_program(machine, os.getpid(), has_threads=has_threads)
        steps = [code[at : at + 8] for at in range(0, len(code), 8)]
        assert len(code) % 8 == 0
        for at, step in enumerate(steps):
            assert at + 1 + max(step[2], step[3]) <= len(steps)
    with pytest.raises(SandboxError, match="expected x86_64 or aarch64, got riscv64"):
        filter_program("riscv64", 1)
