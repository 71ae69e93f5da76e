"""The processes that fetch and decode, seen from the worker.

Loaders are forked by a process that never imports torch, and write pixels into shared memory. Frames between us are
JSON. A loader that dies or hangs is replaced by a warm spare; the pictures it held are tried again, each
alone in a spare, so the guilty one convicts itself and its neighbours hardly notice.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import structlog
from numpy.typing import NDArray

from shiwu.contract import ErrorCode
from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.loaders.fork_server import ForkedProcess, ForkServer, ForkServerError
from shiwu_worker.loaders.protocol import (
    ENCODER,
    LOADED,
    READY,
    READY_OPEN,
    LoaderOptions,
    LoadResult,
    LoadTask,
    failed_twice_result,
)

log: Any = structlog.get_logger()
DEATHS_AT_START: Final = 5
RESPAWN_S: Final = 0.2


@dataclass(eq=False)
class _Loader:
    """One process and what it holds."""

    process: ForkedProcess
    connection: Connection
    ready: bool = False
    held: dict[int, tuple[LoadTask, float]] = field(default_factory=dict)
    """ticket → task and the moment at which it was sent."""
    alone: bool = False
    """It takes suspects only, one at a time."""
    suspect: int | None = None
    """The ticket of the suspect that it holds."""


class LoaderPool:
    """A fixed number of loaders, one thread that talks to them, and the pixels.

    Args:
        spares: loaders beyond these: warm, to stand in for one that died and to try suspects.
        on_fatal: called when loaders can't be kept alive.
        environment: variables that the sources need, such as S3's; loaders get no other secret.
        task_timeout_s: fetch and decode of one picture; then its loader is killed and the picture tried alone.
    """

    def __init__(
        self,
        *,
        processes: int,
        spares: int = 0,
        options: LoaderOptions,
        task_timeout_s: float,
        on_fatal: Callable[[FatalError], None],
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._environment = ENCODER.encode(dict(environment))
        self._processes = processes
        self._spares = spares
        self._options = options
        self._task_timeout_s = task_timeout_s
        self._on_loaded: Callable[[list[LoadResult]], None] = lambda _: None
        self._on_fatal = on_fatal
        shape = (options.slots, options.spec.height, options.spec.width, 3)
        self._memory_fd = os.memfd_create("shiwu-pixels", os.MFD_CLOEXEC)
        os.ftruncate(self._memory_fd, math.prod(shape))
        memory = mmap.mmap(self._memory_fd, math.prod(shape))
        self.pixels: NDArray[np.uint8] = np.frombuffer(memory, np.uint8).reshape(shape)
        self._waiting: deque[LoadTask] = deque()
        self._quarantine: deque[LoadTask] = deque()
        self._loaders: list[_Loader] = []
        self._lock = threading.Lock()
        self._wake_r, self._wake_w = socket.socketpair()
        self._wake_r.setblocking(False)
        self._wake_w.setblocking(False)
        self._closing = threading.Event()
        self._all_ready = threading.Event()
        self._deaths_at_start = 0
        self._fork_server = ForkServer()
        self._selector = selectors.DefaultSelector()
        self._thread = threading.Thread(target=self._run, name="loaders", daemon=True)
        self._told_open = False
        self.restarts = 0

    @property
    def pids(self) -> list[int]:
        """Process ids of the loaders."""
        return [loader.process.pid for loader in list(self._loaders)]

    def start(self) -> None:
        """Start the processes. They become ready beside whatever else is started."""
        self._selector.register(self._wake_r, selectors.EVENT_READ, None)
        # Not on the pool's thread: what that starts is killed before `close` can wait for it.
        self._fork_server.begin()
        self._thread.start()

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until as many as are to work at a time said that they are ready.

        Raises:
            FatalError: with ExitCode.LOADERS when they are not ready in time.
        """
        if not self._all_ready.wait(timeout_s) or self._closing.is_set():
            self.close(1.0)
            raise FatalError(ExitCode.LOADERS, f"expected {self._processes} loaders to be ready within {timeout_s:g} s")

    def subscribe(self, on_loaded: Callable[[list[LoadResult]], None]) -> None:
        """Pass results to this function, on the pool's thread; it must not block. Call it before `submit`."""
        self._on_loaded = on_loaded

    def submit(self, tasks: Sequence[LoadTask]) -> None:
        """Load these pictures. Never blocks; bounded because slots are. Thread-safe."""
        with self._lock:
            self._waiting.extend(tasks)
        self._wake()

    def close(self, timeout_s: float) -> None:
        """End the processes; what they held is not reported."""
        self._closing.set()
        self._wake()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        for loader in self._loaders:
            loader.connection.close()
            loader.process.kill()
            loader.process.wait(timeout_s)
        self._loaders.clear()
        self._fork_server.close()
        self._selector.close()
        self._wake_r.close()
        self._wake_w.close()
        if self._memory_fd >= 0:
            os.close(self._memory_fd)
            self._memory_fd = -1

    # -------------------------------------------------------------------------------- the pool's thread
    def _run(self) -> None:
        try:
            for _ in range(self._processes + self._spares):
                self._spawn()
            while not self._closing.is_set():
                self._turn()
        except Exception as error:  # border: a worker without loaders must not go on
            log.exception("thread_failed", thread="loaders")
            self._closing.set()
            self._all_ready.set()
            is_ours = not isinstance(error, ForkServerError | TimeoutError)
            code = ExitCode.INTERNAL if is_ours else ExitCode.LOADERS
            self._on_fatal(FatalError(code, f"{type(error).__name__}: {error}"))

    def _turn(self) -> None:
        done: list[LoadResult] = []
        for key, _ in self._selector.select(timeout=0.25):
            if key.data is None:
                self._drain_wake()
            else:
                self._receive(key.data, done)
        for loader in [one for one in self._loaders if one.process.has_ended]:
            if loader.connection.fileno() in self._selector.get_map():
                self._receive(loader, done)  # its last words
            self._replace(loader, ErrorCode.DECODER_CRASHED, done)
        late_s = time.monotonic() - self._task_timeout_s
        for loader in list(self._loaders):
            if any(sent_s < late_s for _, sent_s in loader.held.values()):
                self._replace(loader, ErrorCode.DECODER_TIMEOUT, done)
        if done:
            self._on_loaded(done)
        self._assign()

    def _receive(self, loader: _Loader, done: list[LoadResult]) -> None:
        try:
            while loader.connection.poll():
                frame = loader.connection.recv_bytes(1 << 20)
                if frame.startswith(READY):
                    self._welcome(loader, frame)
                    continue
                result = LOADED.decode(frame)
                task, _ = loader.held.pop(result.ticket, (None, 0.0))
                # A loader that decodes hostile bytes is not trusted with the choice of a slot.
                if task is None or task.slot != result.slot:
                    raise ValueError(f"unexpected ticket {result.ticket} or slot {result.slot}")
                if result.is_short_of_memory and loader.suspect != result.ticket:
                    self._quarantine.append(task)
                    continue
                done.append(result)
        except (EOFError, OSError):
            # The process is gone or going; `poll` of the next turn sees it. Until then it must not spin.
            self._selector.unregister(loader.connection)
            loader.process.kill()
            loader.process.wait(5.0)
        except ValueError as error:
            log.error("loader_protocol_error", error=str(error)[:200])
            loader.process.kill()
            loader.process.wait(5.0)

    def _welcome(self, loader: _Loader, frame: bytes) -> None:
        loader.ready, self._deaths_at_start = True, 0
        if frame.startswith(READY_OPEN) and not self._told_open:
            self._told_open = True
            log.warning("sandbox_unavailable", reason=frame.removeprefix(READY_OPEN).decode(errors="replace"))
        if sum(one.ready for one in self._loaders) >= self._processes:
            self._all_ready.set()

    def _assign(self) -> None:
        ready = [loader for loader in self._loaders if loader.ready]
        # With spares, suspects wait for one that is ready; without, a usual loader runs empty for them.
        free = len(ready) - self._processes if self._spares else 1
        usual = [one for one in ready if not one.alone]
        if self._quarantine and usual and sum(one.alone for one in self._loaders) < free:
            # What it still holds are no suspects; they end first.
            min(usual, key=lambda one: len(one.held)).alone = True
        at_work = [one for one in ready if not one.alone][: self._processes]
        for loader in ready:
            if loader.alone and not loader.held:
                if self._quarantine:
                    suspect = self._quarantine.popleft()
                    loader.suspect = suspect.ticket
                    self._send(loader, suspect)
                else:
                    loader.alone, loader.suspect = False, None
            while loader in at_work and len(loader.held) < self._options.threads:
                with self._lock:
                    task = self._waiting.popleft() if self._waiting else None
                if task is None or not self._send(loader, task):
                    break

    def _send(self, loader: _Loader, task: LoadTask) -> bool:
        loader.held[task.ticket] = (task, time.monotonic())
        try:
            loader.connection.send_bytes(ENCODER.encode(task))
        except OSError:
            return False  # it died; its tasks, this one too, are taken back when `poll` sees it
        return True

    def _replace(self, loader: _Loader, code: ErrorCode, done: list[LoadResult]) -> None:
        """Bury a loader, judge what it held, and start another."""
        loader.process.kill()
        status = loader.process.wait(5.0)
        if loader.connection in {key.fileobj for key in self._selector.get_map().values()}:
            self._selector.unregister(loader.connection)
        loader.connection.close()
        self._loaders.remove(loader)
        log.warning("loader_replaced", pid=loader.process.pid, status=status, held=len(loader.held), code=code.value)
        for task, sent_s in loader.held.values():
            if task.ticket == loader.suspect:
                done.append(failed_twice_result(task, code, sent_s, status))
            else:
                self._quarantine.append(task)
        if not loader.ready:
            self._deaths_at_start += 1
            if self._deaths_at_start >= DEATHS_AT_START:
                self._closing.set()
                self._all_ready.set()
                text = f"loaders died {DEATHS_AT_START} times before they were ready"
                self._on_fatal(FatalError(ExitCode.LOADERS, text))
                return
            self._closing.wait(RESPAWN_S)  # one that dies at its start must not be started in a busy loop
        self.restarts += 1
        self._spawn()

    def _spawn(self) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            process = self._fork_server.fork(theirs.fileno(), self._memory_fd)
            connection = Connection(ours.detach())
        connection.send_bytes(self._options.model_dump_json().encode())
        connection.send_bytes(self._environment)
        loader = _Loader(process, connection)
        self._loaders.append(loader)
        self._selector.register(connection, selectors.EVENT_READ, loader)

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # a full pipe: it is awake already
            self._wake_w.send(b"\0")

    def _drain_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._wake_r.recv(4096):
                pass
