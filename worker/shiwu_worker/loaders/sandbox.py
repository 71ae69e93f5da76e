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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shiwu.contract import ErrorCode, Stage
from shiwu_worker.errors import Rejected
from shiwu_worker.loaders import sandbox_protocol as protocol
from shiwu_worker.loaders.protocol import SandboxOptions
from shiwu_worker.loaders.sandbox_protocol import (
    Decoded,
    DecoderFailed,
    Hello,
    ProtocolError,
    Refused,
    Reply,
    SandboxClosed,
    ShortOfMemory,
)
from shiwu_worker.loaders.seccomp import SandboxError, install_filter, no_new_privileges
from shiwu_worker.runtime.proc import highest_descriptor, thread_cpu_s
from shiwu_worker.runtime.process import die_with_parent
from shiwu_worker.stages.decode.decoder import decode

START_TIMEOUT_S: Final = 30.0
POLL_INTERVAL_S: Final = 0.25
"""How often the CPU of an image that takes long is measured."""
LARGE_BYTES: Final = 1 << 20
"""Shared memory of a larger file is returned to the system immediately."""
SPARE_FILES: Final = 16
"""Limit of open files above those of the sandbox; the filter lets it open none anyway."""
STAMP_BYTES: Final = 16
FORMATS_WITH_THREADS: Final = {"HEIF"}
"""Formats whose decoder starts a thread for each image; libde265 does."""


class SandboxExited(Exception):
    """The sandbox has ended, or it broke the protocol and must be killed. The text names the violation, if any."""


class OutOfSandboxMemory(Exception):
    """Memory of the sandbox was short, perhaps because of other images."""


class DecoderDefect(Exception):
    """The decoder has a defect, which says nothing about the image."""


class CpuExceeded(Exception):
    """An image took more CPU than allowed. The sandbox must be killed, because nothing else stops its thread."""


@dataclass(frozen=True, slots=True)
class _Shared:
    """Memory that both processes share: for each thread, the bytes of a file and the pixels of an image."""

    files: mmap.mmap
    pixels: NDArray[np.uint8]
    file_bytes: int


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """Width and height of the upright image in full size, and the model's pixels, valid until the next request."""

    width: int
    height: int
    pixels: NDArray[np.uint8]


class DecodeSandbox:
    """The loader's side of the sandbox. Each thread of the loader uses its own channel.

    Raises:
        SandboxExited, OSError: the sandbox does not become ready.
    """

    def __init__(self, pid: int, sockets: Sequence[socket.socket], shared: _Shared, options: SandboxOptions) -> None:
        self._pid = pid
        self._pidfd = os.pidfd_open(pid)
        self._sockets = sockets
        self._shared = shared
        self._limits = options.decode
        self._memory_bytes = options.sandbox.memory_bytes
        self._cpu_s = options.sandbox.cpu_s
        self._requests = [0] * len(sockets)
        self.unfiltered_reason: str | None = None
        try:
            self._threads = [self._receive_hello(channel) for channel in sockets]
        except (SandboxClosed, ProtocolError) as error:
            raise SandboxExited(str(error)) from error

    def _receive_hello(self, channel: socket.socket) -> int:
        channel.settimeout(START_TIMEOUT_S)
        hello = protocol.read_hello(protocol.receive(channel))
        channel.settimeout(POLL_INTERVAL_S)
        if not Path(f"/proc/{self._pid}/task/{hello.thread}").exists():
            raise ProtocolError("expected the id of a thread of the sandbox, got another number")
        self.unfiltered_reason = hello.unfiltered_reason
        return hello.thread

    def decode(self, data: bytes, number: int) -> DecodedImage:
        """Decode one image on the thread of the sandbox with this number.

        Raises:
            Rejected: the image cannot be decoded.
            OutOfSandboxMemory, DecoderDefect
            SandboxExited: the sandbox has ended, for whatever reason, or must be killed.
            CpuExceeded: this image took more CPU than allowed.
        """
        begin = number * self._shared.file_bytes
        stamps = self._stamp_pixels(number)
        self._shared.files[begin : begin + len(data)] = data
        self._requests[number] += 1
        try:
            self._sockets[number].send(protocol.REQUEST.pack(self._requests[number], len(data)))
            reply = self._receive_reply(number)
        except (OSError, SandboxClosed) as error:
            raise SandboxExited from error
        except ProtocolError as error:
            raise SandboxExited(str(error)) from error
        if len(data) > LARGE_BYTES:
            first_page = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
            self._shared.files.madvise(mmap.MADV_REMOVE, first_page, begin + self._shared.file_bytes - first_page)
        match reply:
            case Decoded(width=width, height=height):
                if stamps & self._stamps(number):
                    raise SandboxExited("expected pixels of the decoded image, got none")
                return DecodedImage(width, height, self._shared.pixels[number])
            case Refused(code=code, message=message):
                raise Rejected(ErrorCode(code), message, stage=Stage.DECODE)
            case ShortOfMemory():
                raise OutOfSandboxMemory(
                    f"expected an image that can be decoded within {self._memory_bytes} bytes of memory"
                )
            case DecoderFailed(message=message):
                raise DecoderDefect(message)

    def _stamp_pixels(self, number: int) -> set[bytes]:
        """Clear the last image's pixels. Random bytes at both ends show whether pixels are written over them."""
        pixels = self._shared.pixels[number]
        pixels.fill(0)
        pixels.reshape(-1)[:STAMP_BYTES] = np.frombuffer(os.urandom(STAMP_BYTES), np.uint8)[: pixels.size]
        pixels.reshape(-1)[-STAMP_BYTES:] = np.frombuffer(os.urandom(STAMP_BYTES), np.uint8)[: pixels.size]
        return self._stamps(number)

    def _stamps(self, number: int) -> set[bytes]:
        pixels = self._shared.pixels[number].reshape(-1)
        return {pixels[:STAMP_BYTES].tobytes(), pixels[-STAMP_BYTES:].tobytes()}

    def _receive_reply(self, number: int) -> Reply:
        first_s: float | None = None
        while True:
            try:
                frame = protocol.receive(self._sockets[number])
            except TimeoutError:
                used_s = thread_cpu_s(self._pid, self._threads[number])
                first_s = used_s if first_s is None else first_s
                # Before the first measurement it cannot have used more CPU than the time until then.
                if used_s - first_s + POLL_INTERVAL_S > self._cpu_s:
                    raise CpuExceeded from None
                continue
            return protocol.read_reply(frame, request=self._requests[number], limits=self._limits)

    def kill(self) -> None:
        """Kill the sandbox; has no effect if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def wait(self) -> int:
        """Wait without limit for the end; returns the exit status, negative for a signal. Call it once."""
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])


def start_sandbox(options: SandboxOptions) -> DecodeSandbox:
    """Fork a sandbox. Call it before this process has threads or secrets, because the sandbox inherits them.

    Raises:
        SandboxExited, OSError: when the sandbox does not become ready.
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
        _run_sandbox([inner for _, inner in pairs], shared, options, parent)
    for _, inner in pairs:
        inner.close()
    return DecodeSandbox(pid, [outer for outer, _ in pairs], shared, options)


# ------------------------------------------------------------------------------------ inside the sandbox
def _run_sandbox(channels: Sequence[socket.socket], shared: _Shared, options: SandboxOptions, parent: int) -> NoReturn:
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
        readiness = _Readiness()
        threads = [
            threading.Thread(target=_work, args=(channel, number, shared, options, readiness), daemon=True)
            for number, channel in enumerate(channels)
        ]
        for thread in threads:
            thread.start()
        # Only now, because no thread can be started under the filter. It holds for all threads.
        if options.sandbox.has_filter:
            try:
                install_filter(has_threads=bool(FORMATS_WITH_THREADS.intersection(options.decode.formats)))
            except SandboxError as error:
                readiness.unfiltered_reason = protocol.sent_text(str(error))
        readiness.is_set.set()
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


def _set_limits(options: SandboxOptions) -> None:
    open_files = highest_descriptor() + SPARE_FILES
    resource.setrlimit(resource.RLIMIT_AS, (options.sandbox.memory_bytes, options.sandbox.memory_bytes))
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))
    for kind in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(kind, (0, 0))


@dataclass
class _Readiness:
    """Set when the filter is installed or cannot be; until then no thread reads a request."""

    is_set: threading.Event = field(default_factory=threading.Event)
    unfiltered_reason: str | None = None


def _work(channel: socket.socket, number: int, shared: _Shared, options: SandboxOptions, readiness: _Readiness) -> None:
    """Loop of one thread: decodes files from its part of the shared memory, and writes pixels to its other part."""
    begin = number * shared.file_bytes
    readiness.is_set.wait()
    hello = Hello(thread=threading.get_native_id(), unfiltered_reason=readiness.unfiltered_reason)
    channel.send(protocol.encoded(hello))
    while message := channel.recv(protocol.REQUEST.size):
        request, length = protocol.REQUEST.unpack(message)
        data = shared.files[begin : begin + length]
        reply = _decode(data, request, shared.pixels[number], options)
        del data
        channel.send(protocol.encoded(reply))


def _decode(data: bytes, request: int, target: NDArray[np.uint8], options: SandboxOptions) -> Reply:
    try:
        pixels, info = decode(data, spec=options.spec, limits=options.decode, is_exact=options.is_exact)
        target[...] = pixels
        return Decoded(request, info.width, info.height)
    except Rejected as error:
        return protocol.refused(request, error)
    except MemoryError:
        return ShortOfMemory(request)
    except Exception as error:  # noqa: BLE001 border: a defect here must not affect other images
        # `decode` turns errors that hostile bytes cause into picture_broken, so this is a defect of the worker.
        text = f"the decoder failed ({type(error).__name__}: {error!s:.200})"
        return DecoderFailed(request, protocol.sent_text(text))
