"""One loader process, forked by the fork server for the loader pool.

It fetches on several threads, lets its sandbox decode, and writes pixels into the slots of its tasks. It never imports
torch, and ends with its parent. If its sandbox ends, it ends with the same status, and the pool finds out which image
was the cause.
"""

from __future__ import annotations

import hashlib
import os
import queue
import resource
import threading
import time
from contextlib import nullcontext
from multiprocessing.connection import Connection
from typing import Final, NoReturn

import msgspec
import numpy as np
from numpy.typing import NDArray

from shiwu.contract import ErrorCode, ErrorInfo, Stage
from shiwu.network.http_client import LOOKUPS_PER_THREAD, HttpClient
from shiwu_worker.errors import JobError, Rejected, Unavailable
from shiwu_worker.loaders.channel import FrameChannel
from shiwu_worker.loaders.protocol import (
    ENVIRONMENT,
    LOAD_TASK,
    MAX_FRAME_BYTES,
    MAX_OPTIONS_BYTES,
    Loaded,
    LoaderFrame,
    LoaderOptions,
    LoadFailed,
    LoadTask,
    Ready,
    Recognised,
    SandboxFault,
    SandboxOptions,
    cut_text,
)
from shiwu_worker.loaders.sandbox import (
    CpuExceeded,
    DecoderDefect,
    DecodeSandbox,
    OutOfSandboxMemory,
    SandboxExited,
    start_sandbox,
)
from shiwu_worker.loaders.shared_memory import DecodeTurns, KnownImages, map_memory
from shiwu_worker.stages.decode.decoder import accepted_format
from shiwu_worker.stages.fetch.fetcher import Fetcher
from shiwu_worker.stages.fetch.s3.base import MAX_BUCKET_CLIENTS

BASE_BYTES: Final = 1 << 30
"""Address space of a loader without its threads: its libraries, and a reserve."""
THREAD_BYTES: Final = 96 << 20
"""Address space of one thread before it does anything: its stack and its heap."""
BASE_FILES: Final = 64
FILES_PER_THREAD: Final = 16


class LoaderProcess:
    """Turns tasks into results, on several threads."""

    def __init__(
        self,
        options: LoaderOptions,
        frames: FrameChannel,
        sandbox: DecodeSandbox,
        *,
        pixels: NDArray[np.uint8],
        known_images: KnownImages,
    ) -> None:
        self._frames = frames
        self._pixels = pixels
        self._known_images = known_images
        self._shares_images = options.known_images > 0
        self._turns = DecodeTurns()
        self._sandbox = sandbox
        self._send_lock = threading.Lock()
        self._cpu_s = options.sandbox.cpu_s
        self._decode_limits = options.decode
        self._fetcher = Fetcher(
            s3=options.s3,
            http_client=HttpClient(
                options.access,
                threads=options.threads,
                connect_timeout_s=options.fetch.connect_timeout_s,
                read_timeout_s=options.fetch.read_timeout_s,
                user_agent=options.user_agent,
                accept="image/*",
            ),
            access=options.access,
            limits=options.fetch,
            threads=options.threads,
        )
        threading.Thread(target=self._exit_with_sandbox, name="sandbox", daemon=True).start()
        self._tasks: queue.SimpleQueue[LoadTask] = queue.SimpleQueue()
        for number in range(options.threads):
            threading.Thread(target=self._work, args=(number,), name=f"load-{number}", daemon=True).start()

    def run(self) -> None:
        """Take tasks until the parent closes the connection."""
        self._send(Ready(self._sandbox.unfiltered_reason))
        while True:
            try:
                frames = self._frames.receive()
            except (EOFError, OSError):
                return
            for frame in frames:
                self._tasks.put(LOAD_TASK.decode(frame))

    def _work(self, number: int) -> None:
        while True:
            self._load(self._tasks.get(), number)

    def _load(self, task: LoadTask, number: int) -> None:
        """Fetch and decode one image, and send its result."""
        started_s = fetched_s = time.monotonic()
        size: int | None = None
        try:
            file = self._fetcher.fetch_if_changed(task.image, task.validator)
            fetched_s = time.monotonic()
            if file is None:
                self._send(Recognised(task.ticket, task.slot, started_s, fetched_s, fetched_s, task.sha256))
                return
            data, size = file.data, len(file.data)
            validator = file.validator if self._shares_images else None
            format_name = accepted_format(data, self._decode_limits)
            digest = hashlib.sha256(data).hexdigest()
            may_recognise = self._shares_images and not task.has_to_be_decoded
            with self._turns.turn(digest) if may_recognise else nullcontext():
                if may_recognise and digest in self._known_images:
                    ended_s = time.monotonic()
                    about = (task.ticket, task.slot, started_s, fetched_s, ended_s)
                    self._send(Recognised(*about, digest, size, validator))
                    return
                image = self._sandbox.decode(data, number)
                self._pixels[task.slot] = image.pixels
                self._send(
                    Loaded(
                        task.ticket,
                        task.slot,
                        started_s,
                        fetched_s,
                        decoded_s=time.monotonic(),
                        n_bytes=size,
                        format=format_name,
                        width=image.width,
                        height=image.height,
                        sha256=digest,
                        validator=validator,
                    )
                )
                # After the frame, so that the worker learns of the image before another loader recognises it.
                self._known_images.note(digest)
        except SandboxExited as error:
            self._exit_after_fault(str(error))
        except CpuExceeded:
            self._answer_and_exit(task, started_s, fetched_s, size)
        except Exception as error:  # noqa: BLE001 border: a defect here must not affect other images
            self._send(self._failed(task, error, started_s=started_s, fetched_s=fetched_s, size=size))

    def _failed(
        self, task: LoadTask, error: Exception, *, started_s: float, fetched_s: float, size: int | None
    ) -> LoadFailed:
        """The result of an image whose fetch or decode raised this."""
        ended_s = time.monotonic()
        return LoadFailed(
            task.ticket,
            task.slot,
            started_s,
            # A failed fetch spent no time in decode.
            fetched_s=fetched_s if size is not None else ended_s,
            decoded_s=ended_s,
            error=_error_info(error, Stage.FETCH if size is None else Stage.DECODE),
            n_bytes=size,
            detail=cut_text(error.detail) if isinstance(error, JobError) and error.detail is not None else None,
            is_final=isinstance(error, Rejected),
            retry_after_s=error.retry_after_s if isinstance(error, Unavailable) else None,
            is_untried=isinstance(error, Unavailable) and error.is_untried,
            is_short_of_memory=isinstance(error, OutOfSandboxMemory),
        )

    def _exit_after_fault(self, violation: str) -> NoReturn:
        """End with the sandbox, which has ended or broke the protocol; the pool retries the images."""
        if violation:
            self._send(SandboxFault(violation))
        self._sandbox.kill()
        while True:
            time.sleep(1.0)  # this process ends with its sandbox

    def _answer_and_exit(self, task: LoadTask, started_s: float, fetched_s: float, size: int | None) -> NoReturn:
        """Answer the image that used too much CPU, and end with the sandbox; the pool retries the other images."""
        text = f"expected an image that is decoded within {self._cpu_s:g} s of CPU"
        error = ErrorInfo(code=ErrorCode.DECODER_TIMEOUT, message=text, stage=Stage.DECODE)
        result = LoadFailed(
            ticket=task.ticket,
            slot=task.slot,
            started_s=started_s,
            fetched_s=fetched_s,
            decoded_s=time.monotonic(),
            n_bytes=size,
            error=error,
        )
        self._send(result)
        self._send_lock.acquire()
        self._sandbox.kill()
        os._exit(0)

    def _exit_with_sandbox(self) -> None:
        """Wait for the end of the sandbox and end with the same status."""
        status = self._sandbox.wait()
        self._send_lock.acquire()  # a frame that another thread sends must not be cut
        if status < 0:
            os.kill(os.getpid(), -status)
            time.sleep(1.0)  # an ignored signal does not end this process
        os._exit(status if status > 0 else 1)

    def _send(self, frame: LoaderFrame) -> None:
        try:
            with self._send_lock:
                self._frames.send([frame])
        except OSError:
            os._exit(0)  # the parent has ended, so no result is needed


def _error_info(error: Exception, stage: Stage) -> ErrorInfo:
    """What an answer says about an error of this stage."""
    if isinstance(error, JobError):
        info = error.info()
        return msgspec.structs.replace(info, message=cut_text(info.message), stage=info.stage or stage)
    if isinstance(error, OutOfSandboxMemory):
        return ErrorInfo(code=ErrorCode.PICTURE_TOO_LARGE, message=str(error), stage=stage)
    if isinstance(error, DecoderDefect):
        text = str(error)
    else:
        # The text of an error during fetch may have the query of a URL.
        cause = f": {error!s:.200}" if stage is Stage.DECODE else ""
        text = f"the loader failed ({type(error).__name__}{cause})"
    return ErrorInfo(code=ErrorCode.INTERNAL_ERROR, message=text, stage=stage, retryable=True)


def _resource_limits(options: LoaderOptions) -> dict[int, int]:
    # For each thread, two more that look names up; one of them may belong to a fetch that is over.
    threads, files = (1 + LOOKUPS_PER_THREAD) * options.threads, FILES_PER_THREAD * options.threads
    if options.s3.client == "obstore":
        # One thread that moves bytes, one more look-up thread for each loader thread, and connections of each bucket.
        threads, files = threads + options.threads + 1, files + MAX_BUCKET_CLIENTS * options.threads
    return {
        resource.RLIMIT_AS: BASE_BYTES + threads * THREAD_BYTES + options.threads * 4 * options.fetch.max_bytes,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: BASE_FILES + files,
    }


def serve(connection_fd: int, memory_fd: int) -> None:
    """Run until the worker has ended."""
    connection = Connection(connection_fd)
    sandbox_options = SandboxOptions.model_validate_json(connection.recv_bytes(MAX_OPTIONS_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sandbox = start_sandbox(sandbox_options)
    # Only now, because the sandbox must see neither these options nor these variables.
    options = LoaderOptions.model_validate_json(connection.recv_bytes(MAX_OPTIONS_BYTES))
    os.environ.update(ENVIRONMENT.decode(connection.recv_bytes(MAX_OPTIONS_BYTES)))
    for kind, limit in _resource_limits(options).items():
        resource.setrlimit(kind, (limit, limit))
    pixels, known_images = map_memory(memory_fd, options)
    # Only now: what it reads ahead must not be in the memory of the sandbox.
    frames = FrameChannel(connection_fd, max_bytes=MAX_FRAME_BYTES)
    LoaderProcess(options, frames, sandbox, pixels=pixels, known_images=known_images).run()
