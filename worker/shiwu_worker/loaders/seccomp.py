"""A system-call filter that this process cannot remove, installed with ctypes on x86_64 and aarch64.

It allows what a decoder needs: memory, locks, threads, the clock, and reading and writing files that are already open.
All other calls fail with EPERM: none opens a file or socket, starts a thread or process, makes memory executable, or
acts on another process.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import socket
import struct
from typing import Final

_ALLOW: Final = 0x7FFF0000
_ERRNO: Final = 0x00050000
_KILL_PROCESS: Final = 0x80000000
_LOAD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
_IF_EQUAL: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_IF_BITS: Final = 0x45  # BPF_JMP | BPF_JSET | BPF_K
_RETURN: Final = 0x06  # BPF_RET | BPF_K
_NUMBER_AT: Final = 0
_ARCH_AT: Final = 4
_ARGS_AT: Final = 16

_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_SET_NAME: Final = 15
_PR_SET_VMA: Final = 0x53564D41
_MODE_FILTER: Final = 1
_ALL_THREADS: Final = 1
"""SECCOMP_FILTER_FLAG_TSYNC."""
_CLONE_THREAD: Final = 0x10000
_CLONE_FLAGS: Final = 0x7D0F00
"""Flags with which glibc and musl start a thread: it shares all with its process, and gets no new namespace."""
_PROT_EXEC: Final = 4
_OTHERS_CLOCK: Final = 0x80000000
"""Bit of a clock id that names the CPU clock of a process or thread by its number."""
_MEMBARRIER_PRIVATE: Final = (0, 8, 16)
"""MEMBARRIER_CMD_QUERY, _PRIVATE_EXPEDITED and its registration. Other commands interrupt all processes' CPUs."""
_MADV_HWPOISON: Final = 100
"""This advice and the next take memory away from the whole machine."""

_ARCHES: Final = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
"""Machine → its audit number, and the index of its call numbers in the pairs below."""
_ALLOWED_CALLS: Final = {
    "read": (0, 63),
    "write": (1, 64),
    "readv": (19, 65),
    "writev": (20, 66),
    "close": (3, 57),
    "lseek": (8, 62),
    "fstat": (5, 80),
    "ppoll": (271, 73),
    "sendto": (44, 206),
    "recvfrom": (45, 207),
    "munmap": (11, 215),
    "brk": (12, 214),
    "mremap": (25, 216),
    "get_mempolicy": (239, 236),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "futex": (202, 98),
    "set_robust_list": (273, 99),
    "rseq": (334, 293),
    "sched_yield": (24, 124),
    "getcpu": (309, 168),
    "getpid": (39, 172),
    "gettid": (186, 178),
    "uname": (63, 160),
    "sysinfo": (99, 179),
    "getrusage": (98, 165),
    "gettimeofday": (96, 169),
    "nanosleep": (35, 101),
    "restart_syscall": (219, 128),
    "getrandom": (318, 278),
    "exit": (60, 93),
    "exit_group": (231, 94),
}
"""Calls that are allowed with any arguments: numbers on x86_64 and aarch64. They can use open sockets only."""
_POLL_X86: Final = 7
_MMAP: Final = (9, 222)
_MPROTECT: Final = (10, 226)
_MADVISE: Final = (28, 233)
_PRCTL: Final = (157, 167)
_PRLIMIT: Final = (302, 261)
_TGKILL: Final = (234, 131)
_MEMBARRIER: Final = (324, 283)
_AFFINITIES: Final = ((203, 122), (204, 123))
_CLOCKS: Final = ((228, 113), (229, 114), (230, 115))
_CLONE: Final = (56, 220)
_CLONE3: Final = 435
_SECCOMP: Final = (317, 277)


class SandboxError(RuntimeError):
    """This kernel or machine does not support the filter, or the filter has no effect."""


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def _step(code: int, k: int, *, yes: int = 0, no: int = 0) -> bytes:
    """One instruction; `yes` and `no` are the numbers of instructions to skip."""
    return struct.pack("=HBBI", code, yes, no, k)


def _end(value: int) -> bytes:
    return _step(_RETURN, value)


def _argument(index: int, *, is_high: bool = False) -> bytes:
    """Load one half of a 64-bit argument; both machines are little-endian."""
    return _step(_LOAD, _ARGS_AT + 8 * index + (4 if is_high else 0))


def _when(number: int, *body: bytes) -> list[bytes]:
    """Instructions for one call; every path through the body returns."""
    return [_step(_IF_EQUAL, number, no=len(body)), *body]


def _if_any(*values: int) -> list[bytes]:
    """Allow the call if the loaded number is one of these, and refuse it otherwise."""
    allow, refuse = _end(_ALLOW), _end(_ERRNO | errno.EPERM)
    return [*(step for value in values for step in (_step(_IF_EQUAL, value, no=1), allow)), refuse]


def filter_program(machine: str, pid: int, *, has_threads: bool = False) -> bytes:
    """The instructions of the filter for this machine; calls that name a process may name `pid` only.

    Args:
        has_threads: allow to start threads, whose number then has no bound.

    Raises:
        SandboxError: when the machine is neither x86_64 nor aarch64.
    """
    if machine not in _ARCHES:
        raise SandboxError(f"expected x86_64 or aarch64, got {machine}")
    arch, own = _ARCHES[machine]
    allow, refuse = _end(_ALLOW), _end(_ERRNO | errno.EPERM)
    steps = [_step(_LOAD, _ARCH_AT), _step(_IF_EQUAL, arch, yes=1), _end(_KILL_PROCESS), _step(_LOAD, _NUMBER_AT)]
    # All numbers of x86_64's second call table (x32) have an extra bit set, so none equals an allowed number.
    for number in [pair[own] for pair in _ALLOWED_CALLS.values()] + ([_POLL_X86] if own == 0 else []):
        steps += _when(number, allow)
    no_exec = [_argument(2), _step(_IF_BITS, _PROT_EXEC, no=1), refuse, allow]
    steps += _when(_MMAP[own], *no_exec) + _when(_MPROTECT[own], *no_exec)
    no_poison = [_argument(2), *(_step(_IF_EQUAL, _MADV_HWPOISON + n, yes=2 - n) for n in (0, 1)), allow, refuse]
    steps += _when(_MADVISE[own], *no_poison)
    steps += _when(_PRCTL[own], _argument(0), *_if_any(_PR_SET_NAME, _PR_SET_VMA))
    # Reading the own limits is allowed: the pointer to new limits is null in both halves.
    null = [
        step
        for is_high in (False, True)
        for step in (_argument(2, is_high=is_high), _step(_IF_EQUAL, 0, yes=1), refuse)
    ]
    steps += _when(_PRLIMIT[own], *null, _argument(0), *_if_any(0, pid))
    steps += _when(_TGKILL[own], _argument(0), *_if_any(pid))
    steps += _when(_MEMBARRIER[own], _argument(0), *_if_any(*_MEMBARRIER_PRIVATE))
    for pair in _AFFINITIES:
        steps += _when(pair[own], _argument(0), *_if_any(0, pid))
    for pair in _CLOCKS:
        steps += _when(pair[own], _argument(0), _step(_IF_BITS, _OTHERS_CLOCK, no=1), refuse, allow)
    if has_threads:
        foreign = [_step(_IF_BITS, 0xFFFFFFFF & ~_CLONE_FLAGS, no=1), refuse]
        steps += _when(_CLONE[own], _argument(0), *foreign, _step(_IF_BITS, _CLONE_THREAD, no=1), allow, refuse)
        # Its arguments are in memory, where no filter can read them, so the C library falls back to `clone`.
        steps += _when(_CLONE3, _end(_ERRNO | errno.ENOSYS))
    return b"".join([*steps, refuse])


def no_new_privileges() -> None:
    """Let no program that this process executes gain rights from set-user-id bits or file capabilities."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def install_filter(*, has_threads: bool = False) -> None:
    """Install the filter for all threads of this process, and check that it works.

    Args:
        has_threads: allow to start threads later.

    Raises:
        SandboxError: when the kernel does not allow it, or a forbidden call succeeds.
    """
    machine = platform.machine()
    code = filter_program(machine, os.getpid(), has_threads=has_threads)
    program = _Program(len(code) // 8, code)
    no_new_privileges()
    libc = ctypes.CDLL(None, use_errno=True)
    number = _SECCOMP[_ARCHES[machine][1]]
    if libc.syscall(number, _MODE_FILTER, _ALL_THREADS, ctypes.byref(program)):
        # With _ALL_THREADS the call may also return the id of a thread that has another filter.
        raise SandboxError(f"the kernel refused the filter ({os.strerror(ctypes.get_errno())})")
    for name in ("open", "socket", "kill"):
        if _succeeds(name):
            raise SandboxError(f"the filter has no effect: {name} succeeded")


def _succeeds(name: str) -> bool:
    try:
        if name == "open":
            os.close(os.open("/", os.O_RDONLY))
        elif name == "socket":
            socket.socket().close()
        else:
            os.kill(os.getpid(), 0)
    except PermissionError:
        return False
    return True
