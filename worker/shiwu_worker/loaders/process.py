"""One loader process, forked by the nursery for `loaders`.

Fetches in several threads, has its cell decode, and writes pixels into the slots that it is given. It never imports
torch, and ends with its parent. When its cell ends it ends in the same way: who was guilty, `loaders` finds out.
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
    READY_OPEN,
    LoaderOptions,
    LoadResult,
    LoadTask,
)
from shiwu_worker.loaders.sandbox import CpuExceeded, Decoded, DecodeSandbox, SandboxExited, start_sandbox
from shiwu_worker.stages.fetch.fetcher import Fetcher, FetchLimits
from shiwu_worker.stages.fetch.http import LOOKUPS_PER_THREAD, HttpClient
from shiwu_worker.stages.fetch.s3.base import MAX_BUCKET_CLIENTS, S3Options

FETCH_BYTES: Final = 1 << 30
"""Address space of a loader without its threads: its libraries, and room."""
THREAD_BYTES: Final = 96 << 20
"""Address space that a thread takes before it does anything: its stack and its heap."""
OPEN_FILES: Final = 64
FILES_A_THREAD: Final = 16


class LoaderProcess:
    """Turns tasks into results, on several threads."""

    def __init__(
        self, options: LoaderOptions, connection: Connection, pixels: NDArray[np.uint8], cell: DecodeSandbox
    ) -> None:
        self._connection = connection
        self._pixels = pixels
        self._sandbox = cell
        self._sending = threading.Lock()
        self._cpu_s = options.cpu_s
        self._fetcher = Fetcher(
            s3=S3Options(
                options.s3_endpoint_url,
                options.s3_region,
                options.s3_client,
                is_anonymous=options.s3_anonymous,
                requester_pays=options.s3_requester_pays,
                user_agent=options.user_agent,
            ),
            http_client=HttpClient(
                options.access,
                threads=options.threads,
                connect_timeout_s=options.connect_timeout_s,
                read_timeout_s=options.read_timeout_s,
                user_agent=options.user_agent,
            ),
            access=options.access,
            limits=FetchLimits(
                max_bytes=options.max_bytes,
                total_timeout_s=options.total_timeout_s,
                connect_timeout_s=options.connect_timeout_s,
                read_timeout_s=options.read_timeout_s,
                longest_pause_s=options.longest_pause_s,
                max_redirects=options.max_redirects,
            ),
            threads=options.threads,
        )
        threading.Thread(target=self._follow, name="sandbox", daemon=True).start()
        self._tasks: queue.SimpleQueue[LoadTask] = queue.SimpleQueue()
        for number in range(options.threads):
            threading.Thread(target=self._work, args=(number,), name=f"load-{number}", daemon=True).start()

    def run(self) -> None:
        """Take tasks until the parent closes the connection."""
        self._send(READY_OPEN + self._sandbox.open_because.encode() if self._sandbox.open_because else READY)
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
            threading.Event().wait()  # for the end of this process, which follows its cell
        except CpuExceeded:
            self._give_up(task, started_s, fetched_s, size)
        except Exception as error:  # noqa: BLE001 border: a defect here must not take the neighbours with it
            # A text from the way to the source may hold the query of a URL.
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
            # What failed in fetch has spent no time in decode.
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

    def _give_up(self, task: LoadTask, started_s: float, fetched_s: float, size: int | None) -> NoReturn:
        """Answer the picture that burns CPU, and end with the cell; what the neighbours lose they get again."""
        text = f"expected a picture that is decoded within {self._cpu_s:g} s of CPU"
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
        self._sending.acquire()
        self._sandbox.kill()
        os._exit(0)

    def _follow(self) -> None:
        """End as the cell does."""
        status = self._sandbox.wait()
        self._sending.acquire()  # no frame of another thread is to be cut in its middle
        if status < 0:
            os.kill(os.getpid(), -status)
            time.sleep(1.0)  # a signal that is ignored here ends nothing
        os._exit(status if status > 0 else 1)

    def _send(self, frame: bytes) -> None:
        try:
            with self._sending:
                self._connection.send_bytes(frame)
        except OSError:
            os._exit(0)  # the parent is gone, and nobody waits for the other threads


def _limits(options: LoaderOptions) -> dict[int, int]:
    # Beside each thread two that look a name up, one of them for a fetch that is over.
    threads, files = (1 + LOOKUPS_PER_THREAD) * options.threads, FILES_A_THREAD * options.threads
    if options.s3_client == "obstore":
        # One that moves bytes, and for each of ours one more that looks a name up; connections of each bucket's store.
        threads, files = threads + options.threads + 1, files + MAX_BUCKET_CLIENTS * options.threads
    return {
        resource.RLIMIT_AS: FETCH_BYTES + threads * THREAD_BYTES + options.threads * 4 * options.max_bytes,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: OPEN_FILES + files,
    }


def serve(connection_fd: int, memory_fd: int) -> None:
    """Run until the worker is gone."""
    connection = Connection(connection_fd)
    options = LoaderOptions.model_validate_json(connection.recv_bytes())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    cell = start_sandbox(options)
    # Only now: the cell is to know none of it.
    os.environ.update(ENVIRONMENT.decode(connection.recv_bytes()))
    for kind, limit in _limits(options).items():
        resource.setrlimit(kind, (limit, limit))
    shape = (options.slots, options.spec.height, options.spec.width, 3)
    pixels = np.frombuffer(mmap.mmap(memory_fd, math.prod(shape)), np.uint8).reshape(shape)
    LoaderProcess(options, connection, pixels, cell).run()
