"""One loader process, forked by the fork server for the loader pool.

It fetches on several threads, lets its sandbox decode, and writes pixels into the slots of its tasks. It never imports
torch, and ends with its parent. If its sandbox ends, it ends with the same status, and the pool finds out which image
was the cause.
"""

from __future__ import annotations

import math
import mmap
import os
import queue
import resource
import threading
import time
from multiprocessing.connection import Connection
from typing import Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from shiwu.contract import ErrorCode, ErrorInfo, Stage
from shiwu_worker.errors import JobError, Rejected, Unavailable
from shiwu_worker.loaders.protocol import (
    ENCODER,
    ENVIRONMENT,
    LOAD_TASK,
    READY,
    READY_UNFILTERED,
    LoaderOptions,
    LoadResult,
    LoadTask,
)
from shiwu_worker.loaders.sandbox import CpuExceeded, Decoded, DecodeSandbox, SandboxExited, start_sandbox
from shiwu_worker.stages.fetch.fetcher import Fetcher
from shiwu_worker.stages.fetch.http import LOOKUPS_PER_THREAD, HttpClient
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
        self, options: LoaderOptions, connection: Connection, pixels: NDArray[np.uint8], sandbox: DecodeSandbox
    ) -> None:
        self._connection = connection
        self._pixels = pixels
        self._sandbox = sandbox
        self._send_lock = threading.Lock()
        self._cpu_s = options.sandbox.cpu_s
        self._fetcher = Fetcher(
            s3=options.s3,
            http_client=HttpClient(
                options.access,
                threads=options.threads,
                connect_timeout_s=options.fetch.connect_timeout_s,
                read_timeout_s=options.fetch.read_timeout_s,
                user_agent=options.user_agent,
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
        reason = self._sandbox.unfiltered_reason
        self._send(READY_UNFILTERED + reason.encode() if reason else READY)
        while True:
            try:
                frame = self._connection.recv_bytes()
            except (EOFError, OSError):
                return
            self._tasks.put(LOAD_TASK.decode(frame))

    def _work(self, number: int) -> None:
        while True:
            task = self._tasks.get()
            self._send(ENCODER.encode(self._load(task, number)))

    def _load(self, task: LoadTask, number: int) -> LoadResult:
        started_s = fetched_s = time.monotonic()
        size: int | None = None
        decoded, failed = Decoded(), None
        try:
            data = self._fetcher.fetch(task.image)
            fetched_s, size = time.monotonic(), len(data)
            decoded, pixels = self._sandbox.decode(data, number)
            if decoded.info is not None:
                self._pixels[task.slot] = pixels
        except JobError as error:
            decoded, failed = Decoded(error=error.info()), error
        except SandboxExited:
            self._sandbox.kill()
            threading.Event().wait()  # until this process ends with its sandbox
        except CpuExceeded:
            self._answer_and_exit(task, started_s, fetched_s, size)
        except Exception as error:  # noqa: BLE001 border: a defect here must not affect other images
            # The text of an error during fetch may have the query of a URL.
            text = f"the loader failed ({type(error).__name__}{f': {error!s:.200}' if size is not None else ''})"
            stage = Stage.FETCH if size is None else Stage.DECODE
            unknown = ErrorInfo(code=ErrorCode.INTERNAL_ERROR, message=text, stage=stage, retryable=True)
            decoded = Decoded(error=unknown)
        ended_s = time.monotonic()
        info = decoded.info
        return LoadResult(
            ticket=task.ticket,
            slot=task.slot,
            started_s=started_s,
            # A failed fetch spent no time in decode.
            fetched_s=fetched_s if size is not None else ended_s,
            decoded_s=ended_s,
            n_bytes=size,
            format=info.format if info else None,
            width=info.width if info else None,
            height=info.height if info else None,
            sha256=info.sha256 if info else None,
            error=decoded.error,
            detail=failed.detail if failed else None,
            is_final=isinstance(failed, Rejected),
            retry_after_s=failed.retry_after_s if isinstance(failed, Unavailable) else None,
            is_untried=isinstance(failed, Unavailable) and failed.is_untried,
            is_short_of_memory=decoded.is_short_of_memory,
        )

    def _answer_and_exit(self, task: LoadTask, started_s: float, fetched_s: float, size: int | None) -> NoReturn:
        """Answer the image that used too much CPU, and end with the sandbox; the pool retries the other images."""
        text = f"expected an image that is decoded within {self._cpu_s:g} s of CPU"
        error = ErrorInfo(code=ErrorCode.DECODER_TIMEOUT, message=text, stage=Stage.DECODE)
        result = LoadResult(
            ticket=task.ticket,
            slot=task.slot,
            started_s=started_s,
            fetched_s=fetched_s,
            decoded_s=time.monotonic(),
            n_bytes=size,
            error=error,
        )
        self._send(ENCODER.encode(result))
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

    def _send(self, frame: bytes) -> None:
        try:
            with self._send_lock:
                self._connection.send_bytes(frame)
        except OSError:
            os._exit(0)  # the parent has ended, so no result is needed


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
    options = LoaderOptions.model_validate_json(connection.recv_bytes())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sandbox = start_sandbox(options)
    # Only now, because the sandbox must not see these variables.
    os.environ.update(ENVIRONMENT.decode(connection.recv_bytes()))
    for kind, limit in _resource_limits(options).items():
        resource.setrlimit(kind, (limit, limit))
    shape = (options.slots, options.spec.height, options.spec.width, 3)
    pixels = np.frombuffer(mmap.mmap(memory_fd, math.prod(shape)), np.uint8).reshape(shape)
    LoaderProcess(options, connection, pixels, sandbox).run()
