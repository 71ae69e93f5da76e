"""The process in which pictures are decoded, and its end in the loader.

A decoder that a picture has taken over finds nothing there: no secret, no file, no socket but the one to its loader, no
other picture than those in hand. Bytes and pixels travel in memory that only these two share; a word over a socket says
that they are there. Shared memory costs a picture some 0.1 ms, which is why it is no pipe.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import resource
import signal
import socket
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shiwu.contract import ErrorCode, ErrorInfo, Stage
from shiwu_worker.errors import JobError
from shiwu_worker.loaders.protocol import ENCODER, LoaderOptions
from shiwu_worker.loaders.seccomp import SandboxError, install_filter, no_new_privileges
from shiwu_worker.runtime.process import die_with_parent
from shiwu_worker.stages.decode.decoder import DecodedInfo, DecodeLimits, decode

FRAME_BYTES: Final = 16 * 1024
LENGTH_BYTES: Final = 8
BORN_S: Final = 30.0
POLL_INTERVAL_S: Final = 0.25
"""How often the CPU of a picture that takes long is looked at."""
LARGE_BYTES: Final = 1 << 20
"""Shared memory of files beyond this is given back at once."""
OPEN_FILES: Final = 16
"""Over what each thread of a cell has open; nothing can be opened there anyway."""
_TICKS_A_SECOND: Final = os.sysconf("SC_CLK_TCK")


class Hello(msgspec.Struct, frozen=True):
    """What a thread of a cell says first."""

    thread: int
    """The kernel's id of the thread, for its CPU clock."""
    open_because: str | None = None
    """Why there is no filter of system calls although there should be one."""


class Decoded(msgspec.Struct, frozen=True):
    """What became of one picture; its pixels lie in the shared memory."""

    info: DecodedInfo | None = None
    error: ErrorInfo | None = None
    is_short_of_memory: bool = False


_DECODED: Final = msgspec.json.Decoder(Decoded)


class SandboxExited(Exception):
    """The cell has ended or can't be understood."""


class CpuExceeded(Exception):
    """A picture took more CPU than it may. The cell must be ended: nothing else stops its thread."""


@dataclass(frozen=True, slots=True)
class _Shared:
    """Memory that both processes see: a file's bytes and a picture's pixels for each thread."""

    files: mmap.mmap
    pixels: NDArray[np.uint8]
    file_bytes: int


class DecodeSandbox:
    """The loader's end. One of its threads uses each channel."""

    def __init__(self, pid: int, sockets: Sequence[socket.socket], shared: _Shared, options: LoaderOptions) -> None:
        self._pid = pid
        self._pidfd = os.pidfd_open(pid)
        self._sockets = sockets
        self._shared = shared
        self._cpu_s = options.cpu_s
        self._stats = [Path(f"/proc/{pid}/task/{hello.thread}/stat") for hello in map(self._hello, sockets)]

    def _hello(self, channel: socket.socket) -> Hello:
        channel.settimeout(BORN_S)
        hello = msgspec.json.decode(_received(channel), type=Hello)
        channel.settimeout(POLL_INTERVAL_S)
        self.open_because = hello.open_because
        return hello

    def decode(self, data: bytes, number: int) -> tuple[Decoded, NDArray[np.uint8]]:
        """Decode one picture on the cell's thread of this number; the pixels are good until the next call.

        Raises:
            CellGone: it ended, whoever's fault that is.
            CpuExceeded: this picture took more CPU than it may.
        """
        begin = number * self._shared.file_bytes
        channel = self._sockets[number]
        self._shared.files[begin : begin + len(data)] = data
        try:
            channel.send(len(data).to_bytes(LENGTH_BYTES, "little"))
            decoded = _DECODED.decode(self._answer(channel, number))
        except (OSError, ValueError) as error:
            raise SandboxExited(type(error).__name__) from error
        if len(data) > LARGE_BYTES:
            first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
            self._shared.files.madvise(mmap.MADV_REMOVE, first, begin + self._shared.file_bytes - first)
        return decoded, self._shared.pixels[number]

    def _answer(self, channel: socket.socket, number: int) -> bytes:
        first_s: float | None = None
        while True:
            try:
                return _received(channel)
            except TimeoutError:
                used_s = self._used_s(number)
                first_s = used_s if first_s is None else first_s
                # Before the first look it can have used no more than the time until then.
                if used_s - first_s + POLL_INTERVAL_S > self._cpu_s:
                    raise CpuExceeded from None

    def _used_s(self, number: int) -> float:
        """CPU of one thread of the cell in its life; 0 when it is gone."""
        try:
            fields = self._stats[number].read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / _TICKS_A_SECOND

    def kill(self) -> None:
        """End it; nothing happens where it is gone."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def wait(self) -> int:
        """Wait for its end, however long; the exit status, negative for a signal. One thread may do so."""
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])


def start_sandbox(options: LoaderOptions) -> DecodeSandbox:
    """Fork a cell. Call it before this process has threads or secrets: the cell inherits what is there.

    Raises:
        TimeoutError, CellGone: it does not say that it is ready.
    """
    count, spec = options.threads, options.spec
    file_bytes = -(-(options.max_bytes + 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    shape = (count, spec.height, spec.width, 3)
    pixels = np.frombuffer(mmap.mmap(-1, math.prod(shape)), np.uint8).reshape(shape)
    shared = _Shared(mmap.mmap(-1, count * file_bytes), pixels, file_bytes)
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(count)]
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        _live([theirs for _, theirs in pairs], shared, options, parent)
    for _, theirs in pairs:
        theirs.close()
    return DecodeSandbox(pid, [ours for ours, _ in pairs], shared, options)


def _received(channel: socket.socket) -> bytes:
    frame = channel.recv(FRAME_BYTES)
    if not frame:
        raise SandboxExited("it closed its socket")
    return frame


# ------------------------------------------------------------------------------------ inside the cell
def _live(channels: Sequence[socket.socket], shared: _Shared, options: LoaderOptions, parent: int) -> NoReturn:
    """The life of the cell's process."""
    try:
        die_with_parent(parent)
        _close_all_but({channel.fileno() for channel in channels})
        no_new_privileges()
        _limit(options)
        # Odd EXIF is our own rules' to judge; a size over Pillow's limit is an error and no warning.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        Image.MAX_IMAGE_PIXELS = options.max_pixels
        because: str | None = None
        if options.sandbox:
            try:
                install_filter()
            except SandboxError as error:
                because = str(error)
        threads = [
            threading.Thread(target=_work, args=(channel, number, shared, options, because), daemon=True)
            for number, channel in enumerate(channels)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        os._exit(1)


def _close_all_but(kept: set[int]) -> None:
    """Leave the standard streams, which lead nowhere, and these."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nowhere, fd)
    begin = 3
    for fd in sorted(kept):
        os.closerange(begin, fd)
        begin = fd + 1
    os.closerange(begin, max(begin, resource.getrlimit(resource.RLIMIT_NOFILE)[0]))


def _limit(options: LoaderOptions) -> None:
    open_files = max(fd for fd in map(int, os.listdir("/proc/self/fd"))) + OPEN_FILES
    resource.setrlimit(resource.RLIMIT_AS, (options.memory_bytes, options.memory_bytes))
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))
    for kind in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(kind, (0, 0))


def _work(
    channel: socket.socket, number: int, shared: _Shared, options: LoaderOptions, open_because: str | None
) -> None:
    """One thread: takes files from its part of the memory and leaves pixels in its other part."""
    limits = DecodeLimits(
        max_pixels=options.max_pixels,
        max_side=options.max_side,
        formats=options.formats,
        max_frames=options.max_frames,
        max_scans=options.max_scans,
    )
    begin = number * shared.file_bytes
    channel.send(ENCODER.encode(Hello(thread=threading.get_native_id(), open_because=open_because)))
    while word := channel.recv(LENGTH_BYTES):
        data = shared.files[begin : begin + int.from_bytes(word, "little")]
        decoded = _decoded(data, shared.pixels[number], options, limits)
        del data
        channel.send(ENCODER.encode(decoded))


def _decoded(data: bytes, placement: NDArray[np.uint8], options: LoaderOptions, limits: DecodeLimits) -> Decoded:
    try:
        pixels, info = decode(data, spec=options.spec, limits=limits, exact=options.exact)
        placement[...] = pixels
        return Decoded(info=info)
    except JobError as error:
        return Decoded(error=error.info())
    except MemoryError:
        text = f"expected a picture that can be decoded within {options.memory_bytes} bytes of memory"
        error_info = ErrorInfo(code=ErrorCode.PICTURE_TOO_LARGE, message=text, stage=Stage.DECODE)
        return Decoded(error=error_info, is_short_of_memory=True)
    except Exception as error:  # noqa: BLE001 border: a defect here must not take the neighbours with it
        # What hostile bytes make a decoder raise, `decode` has told as picture_broken; this is a defect of the worker.
        text = f"the decoder failed ({type(error).__name__}: {error!s:.200})"
        unknown = ErrorInfo(code=ErrorCode.INTERNAL_ERROR, message=text, stage=Stage.DECODE, retryable=True)
        return Decoded(error=unknown)
