"""One loader process, forked by the nursery for `loaders`.

Fetches and decodes in several threads and writes pixels into the slots that it is given. It never imports torch, and
ends with its parent.
"""

from __future__ import annotations

import math
import mmap
import os
import queue
import resource
import threading
import time
import warnings
from multiprocessing.connection import Connection

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shiwu.contract import ErrorCode, ErrorInfo, Stage
from shiwu_worker.addresses import guarded_pool
from shiwu_worker.errors import JobError
from shiwu_worker.loader_frames import READY, Loaded, LoaderOptions, LoadTask
from shiwu_worker.stages.decode import DecodedInfo, DecodeLimits, decode
from shiwu_worker.stages.fetch import Fetcher, FetchLimits, S3Options


class Loader:
    """Turns tasks into results, on several threads."""

    def __init__(self, options: LoaderOptions, connection: Connection, pixels: NDArray[np.uint8]) -> None:
        self._connection = connection
        self._pixels = pixels
        self._sending = threading.Lock()
        self._spec = options.spec
        self._limits = DecodeLimits(max_pixels=options.max_pixels, max_side=options.max_side, formats=options.formats)
        self._exact = options.exact
        self._memory_bytes = options.memory_bytes
        self._fetcher = Fetcher(
            s3=S3Options(options.s3_endpoint_url, options.s3_region),
            pool=guarded_pool(allow_hosts=options.allow_hosts, threads=options.threads),
            folders=options.folders,
            limits=FetchLimits(
                max_bytes=options.max_bytes,
                total_timeout_s=options.total_timeout_s,
                connect_timeout_s=options.connect_timeout_s,
                read_timeout_s=options.read_timeout_s,
            ),
            threads=options.threads,
        )
        self._tasks: queue.SimpleQueue[LoadTask] = queue.SimpleQueue()
        for number in range(options.threads):
            threading.Thread(target=self._work, name=f"load-{number}", daemon=True).start()

    def run(self) -> None:
        """Take tasks until the parent closes the connection."""
        self._send(READY)
        while True:
            try:
                frame = self._connection.recv_bytes()
            except (EOFError, OSError):
                return
            self._tasks.put(LoadTask.model_validate_json(frame))

    def _work(self) -> None:
        while True:
            task = self._tasks.get()
            self._send(self._load(task).model_dump_json().encode())

    def _load(self, task: LoadTask) -> Loaded:
        started_s = fetched_s = time.monotonic()
        size: int | None = None
        found: DecodedInfo | None = None
        failed: ErrorInfo | None = None
        is_short_of_memory = False
        try:
            data = self._fetcher.fetch(task.image)
            fetched_s, size = time.monotonic(), len(data)
            pixels, found = decode(data, spec=self._spec, limits=self._limits, exact=self._exact)
            self._pixels[task.slot] = pixels
        except JobError as error:
            failed = error.info()
        except MemoryError:
            is_short_of_memory = True
            text = f"expected a picture that can be decoded within {self._memory_bytes} bytes of memory"
            failed = ErrorInfo(code=ErrorCode.PICTURE_TOO_LARGE, message=text, stage=Stage.DECODE)
        except Exception as error:  # noqa: BLE001 border: a defect here must not take the neighbours with it
            text = f"the loader failed ({type(error).__name__}: {error!s:.200})"
            failed = ErrorInfo(code=ErrorCode.PICTURE_BROKEN, message=text, stage=Stage.DECODE)
        ended_s = time.monotonic()
        return Loaded(
            ticket=task.ticket,
            slot=task.slot,
            started_s=started_s,
            # What failed in fetch has spent no time in decode.
            fetched_s=fetched_s if size is not None else ended_s,
            decoded_s=ended_s,
            n_bytes=size,
            format=found.format if found else None,
            width=found.width if found else None,
            height=found.height if found else None,
            sha256=found.sha256 if found else None,
            error=failed,
            is_short_of_memory=is_short_of_memory,
        )

    def _send(self, frame: bytes) -> None:
        try:
            with self._sending:
                self._connection.send_bytes(frame)
        except OSError:
            os._exit(0)  # the parent is gone, and nobody waits for the other threads


def serve(connection_fd: int, memory_fd: int) -> None:
    """Run until the worker is gone."""
    # Odd EXIF and sizes near the limit: judged by our own rules, for all threads of this process.
    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS = None
    connection = Connection(connection_fd)
    options = LoaderOptions.model_validate_json(connection.recv_bytes())
    resource.setrlimit(resource.RLIMIT_AS, (options.memory_bytes, options.memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    shape = (options.slots, options.spec.height, options.spec.width, 3)
    pixels = np.frombuffer(mmap.mmap(memory_fd, math.prod(shape)), np.uint8).reshape(shape)
    Loader(options, connection, pixels).run()
