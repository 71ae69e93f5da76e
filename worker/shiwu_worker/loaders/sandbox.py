"""The sandbox: the process in which images are decoded, and its counterpart in the loader.

If an image takes over a decoder, it finds nothing there: no secret, no file, no socket except the one to its loader,
and no image except those being decoded. Bytes and pixels travel in memory that only these two processes share; a short
message over a socket announces them. Shared memory costs about 0.1 ms per image, less than a pipe.
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
from typing import Final, NoReturn

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shiwu.contract import ErrorCode, ErrorInfo, Stage
from shiwu_worker.errors import JobError
from shiwu_worker.loaders.protocol import ENCODER, LoaderOptions
from shiwu_worker.loaders.seccomp import SandboxError, install_filter, no_new_privileges
from shiwu_worker.runtime.proc import highest_descriptor, thread_cpu_s
from shiwu_worker.runtime.process import die_with_parent
from shiwu_worker.stages.decode.decoder import DecodedInfo, decode

MAX_FRAME_BYTES: Final = 16 * 1024
LENGTH_BYTES: Final = 8
START_TIMEOUT_S: Final = 30.0
POLL_INTERVAL_S: Final = 0.25
"""How often the CPU of an image that takes long is measured."""
LARGE_BYTES: Final = 1 << 20
"""Shared memory of a larger file is returned to the system immediately."""
SPARE_FILES: Final = 16
"""Limit of open files above those of the sandbox; the filter lets it open none anyway."""


class Hello(msgspec.Struct, frozen=True):
    """The first frame of a thread of the sandbox."""

    thread: int
    """The kernel's id of the thread, for its CPU clock."""
    unfiltered_reason: str | None = None
    """Why there is no system-call filter although there should be one."""


class Decoded(msgspec.Struct, frozen=True):
    """The result of one image; its pixels are in the shared memory."""

    info: DecodedInfo | None = None
    error: ErrorInfo | None = None
    is_short_of_memory: bool = False


_DECODED: Final = msgspec.json.Decoder(Decoded)


class SandboxExited(Exception):
    """The sandbox has ended or sent a frame that cannot be read."""


class CpuExceeded(Exception):
    """An image took more CPU than allowed. The sandbox must be killed, because nothing else stops its thread."""


@dataclass(frozen=True, slots=True)
class _Shared:
    """Memory that both processes share: for each thread, the bytes of a file and the pixels of an image."""

    files: mmap.mmap
    pixels: NDArray[np.uint8]
    file_bytes: int


class DecodeSandbox:
    """The loader's side of the sandbox. Each thread of the loader uses its own channel."""

    def __init__(self, pid: int, sockets: Sequence[socket.socket], shared: _Shared, options: LoaderOptions) -> None:
        self._pid = pid
        self._pidfd = os.pidfd_open(pid)
        self._sockets = sockets
        self._shared = shared
        self._cpu_s = options.sandbox.cpu_s
        self._threads = [self._receive_hello(channel).thread for channel in sockets]

    def _receive_hello(self, channel: socket.socket) -> Hello:
        channel.settimeout(START_TIMEOUT_S)
        hello = msgspec.json.decode(_received(channel), type=Hello)
        channel.settimeout(POLL_INTERVAL_S)
        self.unfiltered_reason = hello.unfiltered_reason
        return hello

    def decode(self, data: bytes, number: int) -> tuple[Decoded, NDArray[np.uint8]]:
        """Decode one image on the thread of the sandbox with this number; its pixels are valid until the next call.

        Raises:
            SandboxExited: when the sandbox has ended, for whatever reason.
            CpuExceeded: when this image took more CPU than allowed.
        """
        begin = number * self._shared.file_bytes
        channel = self._sockets[number]
        self._shared.files[begin : begin + len(data)] = data
        try:
            channel.send(len(data).to_bytes(LENGTH_BYTES, "little"))
            decoded = _DECODED.decode(self._receive_result(channel, number))
        except (OSError, ValueError) as error:
            raise SandboxExited(type(error).__name__) from error
        if len(data) > LARGE_BYTES:
            first_page = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
            self._shared.files.madvise(mmap.MADV_REMOVE, first_page, begin + self._shared.file_bytes - first_page)
        return decoded, self._shared.pixels[number]

    def _receive_result(self, channel: socket.socket, number: int) -> bytes:
        first_s: float | None = None
        while True:
            try:
                return _received(channel)
            except TimeoutError:
                used_s = thread_cpu_s(self._pid, self._threads[number])
                first_s = used_s if first_s is None else first_s
                # Before the first measurement it cannot have used more CPU than the time until then.
                if used_s - first_s + POLL_INTERVAL_S > self._cpu_s:
                    raise CpuExceeded from None

    def kill(self) -> None:
        """Kill the sandbox; has no effect if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def wait(self) -> int:
        """Wait without limit for the end; returns the exit status, negative for a signal. Call it once."""
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])


def start_sandbox(options: LoaderOptions) -> DecodeSandbox:
    """Fork a sandbox. Call it before this process has threads or secrets, because the sandbox inherits them.

    Raises:
        TimeoutError, SandboxExited: when the sandbox does not become ready.
    """
    count, spec = options.threads, options.spec
    file_bytes = -(-(options.fetch.max_bytes + 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    shape = (count, spec.height, spec.width, 3)
    pixels = np.frombuffer(mmap.mmap(-1, math.prod(shape)), np.uint8).reshape(shape)
    shared = _Shared(mmap.mmap(-1, count * file_bytes), pixels, file_bytes)
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(count)]
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        _run_sandbox([inner for _, inner in pairs], shared, options, parent)
    for _, inner in pairs:
        inner.close()
    return DecodeSandbox(pid, [outer for outer, _ in pairs], shared, options)


def _received(channel: socket.socket) -> bytes:
    frame = channel.recv(MAX_FRAME_BYTES)
    if not frame:
        raise SandboxExited("it closed its socket")
    return frame


# ------------------------------------------------------------------------------------ inside the sandbox
def _run_sandbox(channels: Sequence[socket.socket], shared: _Shared, options: LoaderOptions, parent: int) -> NoReturn:
    """Confine this process, decode until the loader ends, and exit."""
    try:
        die_with_parent(parent)
        _close_all_but({channel.fileno() for channel in channels})
        no_new_privileges()
        _set_limits(options)
        # The decode stage checks EXIF itself, so warnings are ignored; a size over Pillow's limit is an error.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        Image.MAX_IMAGE_PIXELS = options.decode.max_pixels
        unfiltered_reason: str | None = None
        if options.sandbox.has_filter:
            try:
                install_filter()
            except SandboxError as error:
                unfiltered_reason = str(error)
        threads = [
            threading.Thread(target=_work, args=(channel, number, shared, options, unfiltered_reason), daemon=True)
            for number, channel in enumerate(channels)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        os._exit(1)


def _close_all_but(kept: set[int]) -> None:
    """Close all files except these, and connect the standard streams to /dev/null."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    begin = 3
    for fd in sorted(kept):
        os.closerange(begin, fd)
        begin = fd + 1
    os.closerange(begin, max(begin, resource.getrlimit(resource.RLIMIT_NOFILE)[0]))


def _set_limits(options: LoaderOptions) -> None:
    open_files = highest_descriptor() + SPARE_FILES
    resource.setrlimit(resource.RLIMIT_AS, (options.sandbox.memory_bytes, options.sandbox.memory_bytes))
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))
    for kind in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(kind, (0, 0))


def _work(
    channel: socket.socket, number: int, shared: _Shared, options: LoaderOptions, unfiltered_reason: str | None
) -> None:
    """Loop of one thread: decodes files from its part of the shared memory, and writes pixels to its other part."""
    begin = number * shared.file_bytes
    channel.send(ENCODER.encode(Hello(thread=threading.get_native_id(), unfiltered_reason=unfiltered_reason)))
    while message := channel.recv(LENGTH_BYTES):
        data = shared.files[begin : begin + int.from_bytes(message, "little")]
        decoded = _decode(data, shared.pixels[number], options)
        del data
        channel.send(ENCODER.encode(decoded))


def _decode(data: bytes, target: NDArray[np.uint8], options: LoaderOptions) -> Decoded:
    try:
        pixels, info = decode(data, spec=options.spec, limits=options.decode, exact=options.is_exact)
        target[...] = pixels
        return Decoded(info=info)
    except JobError as error:
        return Decoded(error=error.info())
    except MemoryError:
        text = f"expected an image that can be decoded within {options.sandbox.memory_bytes} bytes of memory"
        error_info = ErrorInfo(code=ErrorCode.PICTURE_TOO_LARGE, message=text, stage=Stage.DECODE)
        return Decoded(error=error_info, is_short_of_memory=True)
    except Exception as error:  # noqa: BLE001 border: a defect here must not affect other images
        # `decode` turns errors that hostile bytes cause into picture_broken, so this is a defect of the worker.
        text = f"the decoder failed ({type(error).__name__}: {error!s:.200})"
        unknown = ErrorInfo(code=ErrorCode.INTERNAL_ERROR, message=text, stage=Stage.DECODE, retryable=True)
        return Decoded(error=unknown)
