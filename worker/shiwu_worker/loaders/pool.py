"""The pool of processes that fetch and decode, as the worker sees it.

A fork server, which never imports torch, forks the loaders. They write pixels into shared memory and exchange JSON
frames with the worker. A loader that crashes or hangs is replaced by a spare, which is ready. The images it held are
retried one at a time in a spare, so the image that ends its loader is identified and the others are hardly delayed.
"""

from __future__ import annotations

import contextlib
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
from typing import Final

import structlog
from structlog.typing import FilteringBoundLogger

from shiwu.contract import ErrorCode, Stage
from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.loaders.channel import FrameChannel
from shiwu_worker.loaders.fork_server import ForkedProcess, ForkServerError
from shiwu_worker.loaders.hand_out import HandOut
from shiwu_worker.loaders.protocol import (
    ENCODER,
    MAX_FRAME_BYTES,
    LoaderOptions,
    LoadFailed,
    LoadResult,
    LoadTask,
    ProtocolError,
    Ready,
    SandboxFault,
    check_result,
    failed_twice_result,
    read_loader_frame,
    refused_result,
)
from shiwu_worker.loaders.shared_memory import create_memory, map_memory
from shiwu_worker.loaders.starter import LoaderStarter
from shiwu_worker.policy.limits import LoadShares
from shiwu_worker.runtime.threads import ServiceThread

log: FilteringBoundLogger = structlog.get_logger()
MAX_FAILED_STARTS: Final = 5
"""Loaders that may end one after the other before they are ready; then the worker ends."""
RESTART_PAUSE_S: Final = 0.2
POLL_INTERVAL_S: Final = 0.25
CHECK_INTERVAL_S: Final = 0.05
"""Longest pause between checks of the loaders while frames come; one that ends is checked immediately."""
EXIT_TIMEOUT_S: Final = 5.0


@dataclass(eq=False)
class _Loader:
    """One loader process and the tasks it holds."""

    process: ForkedProcess
    connection: Connection
    """For the options, and to close."""
    frames: FrameChannel
    is_ready: bool = False
    held: dict[int, tuple[LoadTask, float]] = field(default_factory=dict)
    """Ticket → task, and when it was sent."""
    is_isolated: bool = False
    """Whether it runs quarantined tasks only, one at a time."""
    isolated_ticket: int | None = None
    """The ticket of the quarantined task that it runs."""


class LoaderPool:
    """A fixed number of loaders, one thread that exchanges frames with them, and the memory that they share.

    `pixels` is uint8 (slots, h, w, 3). `known_images` are those that loaders need not decode.

    `submit` is thread-safe; the pool's thread does the rest.

    Args:
        processes: loaders that work at a time.
        spares: further loaders, which are ready to replace one that ended and to run quarantined tasks.
        on_fatal: called when loaders cannot be kept running.
        environment: variables that the sources need, such as S3's; loaders get no other secret.
        shares: how the threads of the loaders are divided between lanes and sources.
        task_timeout_s: limit of fetch and decode of one image; then its loader is killed and the image isolated.
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
        shares: LoadShares = LoadShares(),  # noqa: B008 frozen
    ) -> None:
        self._environment = ENCODER.encode(dict(environment))
        self._processes = processes
        self._spares = spares
        self._options = options
        self._task_timeout_s = task_timeout_s
        self._on_loaded: Callable[[list[LoadResult]], None] = lambda _: None
        self._on_fatal = on_fatal
        self._memory_fd = create_memory(options)
        self.pixels, self.known_images = map_memory(self._memory_fd, options)
        self._waiting = HandOut(shares, threads=processes * options.threads)
        """Tasks without a loader, guarded by the lock."""
        self._quarantine: deque[LoadTask] = deque()
        """Tasks that each run alone in a loader: their loader ended, or memory was short."""
        self._loaders: list[_Loader] = []
        self._lock = threading.Lock()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._closing = threading.Event()
        self._all_ready = threading.Event()
        self._failed_starts = 0
        self._check_at_s = 0.0
        """When the loaders are checked next, on the monotonic clock."""
        self._selector = selectors.DefaultSelector()
        self._starter = LoaderStarter(self._selector, self._memory_fd)
        self._thread = ServiceThread("loaders", self._run, on_fatal=self._fail)
        self._has_warned_unfiltered = False
        self.restarts = 0

    @property
    def pids(self) -> list[int]:
        """Process ids of the loaders."""
        return [loader.process.pid for loader in list(self._loaders)]

    def start(self) -> None:
        """Start the processes without waiting for them; other parts of the worker start in parallel."""
        self._selector.register(self._wake_reader, selectors.EVENT_READ, None)
        # Not on the pool's thread: the fork server ends with the thread that starts it, before `close` could wait.
        self._starter.begin()
        self._thread.start()

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until as many loaders are ready as work at a time.

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
        """Load these images. Never blocks; the number of slots limits the queue. Thread-safe."""
        with self._lock:
            self._waiting.add(tasks)
        self._wake()

    def close(self, timeout_s: float) -> None:
        """End the processes; tasks that they hold get no result."""
        self._closing.set()
        self._wake()
        self._thread.join(timeout_s)
        for loader in self._loaders:
            loader.connection.close()
            loader.process.kill()
            loader.process.wait(timeout_s)
        self._loaders.clear()
        self._starter.close()
        self._selector.close()
        self._wake_reader.close()
        self._wake_writer.close()
        if self._memory_fd >= 0:
            os.close(self._memory_fd)
            self._memory_fd = -1

    # -------------------------------------------------------------------------------- the pool's thread
    def _run(self) -> None:
        try:
            self._starter.start(self._processes + self._spares)
            while not self._closing.is_set():
                self._poll()
        except (ForkServerError, TimeoutError) as error:
            log.exception("thread_failed", thread="loaders")
            raise FatalError(ExitCode.LOADERS, f"{type(error).__name__}: {error}") from error

    def _fail(self, error: FatalError) -> None:
        """End the pool, also where `wait_ready` waits, and pass the error on."""
        self._closing.set()
        self._all_ready.set()
        self._on_fatal(error)

    def _poll(self) -> None:
        """Wait for frames or exits once; collect results, restart loaders that ended or hang, and hand out tasks."""
        results: list[LoadResult] = []
        for key, _ in self._selector.select(timeout=POLL_INTERVAL_S):
            if key.data is None:
                self._drain_wake()
            elif isinstance(key.data, _Loader):
                self._receive(key.data, results)
            else:
                self._check_soon()  # the fork server has a loader, or the exit status of one
        now_s = time.monotonic()
        if now_s >= self._check_at_s:
            self._check_at_s = now_s + CHECK_INTERVAL_S
            self._check_loaders(now_s, results)
        with self._lock:
            refused = self._waiting.take_refused()
        results += [refused_result(each.task, each.pause_s) for each in refused]
        if results:
            self._on_loaded(results)
        self._assign()

    def _check_soon(self) -> None:
        """Let this poll, or the next one, check the loaders."""
        self._check_at_s = 0.0

    def _check_loaders(self, now_s: float, results: list[LoadResult]) -> None:
        """Take new loaders, and replace those that ended or hang."""
        for process, connection in self._starter.advance():
            self._add(process, connection)
        for loader in [loader for loader in self._loaders if loader.process.has_ended]:
            while loader.connection.fileno() in self._selector.get_map():
                self._receive(loader, results)  # the results it sent before its end
            self._restart(loader, ErrorCode.DECODER_CRASHED, results)
        overdue_s = now_s - self._task_timeout_s
        for loader in list(self._loaders):
            if any(sent_s < overdue_s for _, sent_s in loader.held.values()):
                self._restart(loader, ErrorCode.DECODER_TIMEOUT, results)
        if not self._starter.missing and sum(loader.is_ready for loader in self._loaders) >= self._processes:
            self._all_ready.set()

    def _receive(self, loader: _Loader, results: list[LoadResult]) -> None:
        """Take what a loader has sent. At the end of its frames, the selector forgets it."""
        try:
            for frame in map(read_loader_frame, loader.frames.receive()):
                match frame:
                    case Ready():
                        self._on_ready(loader, frame)
                    case SandboxFault():
                        log.error("loader_protocol_error", part="sandbox", error=frame.reason[:200])
                    case _:
                        self._take_result(loader, frame, results)
        except (EOFError, OSError):
            self._forget_frames(loader)
        except ProtocolError as error:
            log.error("loader_protocol_error", part="loader", error=str(error)[:200])
            self._forget_frames(loader)  # it may have sent more that must not be believed

    def _forget_frames(self, loader: _Loader) -> None:
        """End a loader that has ended, is ending or lied; the next check handles it."""
        self._selector.unregister(loader.connection)
        loader.process.kill()
        loader.process.wait(EXIT_TIMEOUT_S)
        self._check_soon()

    def _thread_is_free(self, loader: _Loader, task: LoadTask, result: LoadResult | None = None) -> None:
        """A quarantined task has a loader of its own, so it is not counted."""
        if task.ticket == loader.isolated_ticket:
            return
        has_failed: bool | None = None
        seconds = 0.0
        if result is not None:
            seconds = result.fetched_s - result.started_s
            if not isinstance(result, LoadFailed):
                has_failed = False
            elif not result.is_untried:
                has_failed = result.error.stage is Stage.FETCH
        with self._lock:
            self._waiting.done(task, seconds=seconds, has_failed=has_failed)

    def _take_result(self, loader: _Loader, result: LoadResult, results: list[LoadResult]) -> None:
        """Take a result for a task that this loader holds.

        Raises:
            ProtocolError
        """
        if result.ticket not in loader.held:
            raise ProtocolError("expected a result for a task of this loader")
        task, sent_s = loader.held[result.ticket]
        check_result(result, task, sent_s=sent_s, now_s=time.monotonic(), options=self._options)
        del loader.held[result.ticket]
        self._thread_is_free(loader, task, result)
        is_short_of_memory = isinstance(result, LoadFailed) and result.is_short_of_memory
        if is_short_of_memory and loader.isolated_ticket != result.ticket:
            self._quarantine.append(task)
        else:
            results.append(result)

    def _on_ready(self, loader: _Loader, frame: Ready) -> None:
        loader.is_ready, self._failed_starts = True, 0
        self._check_soon()
        if frame.unfiltered_reason is not None and not self._has_warned_unfiltered:
            self._has_warned_unfiltered = True
            log.warning("sandbox_unavailable", reason=frame.unfiltered_reason[:200])

    def _assign(self) -> None:
        """Hand out waiting tasks, and quarantined tasks to isolated loaders."""
        ready = [loader for loader in self._loaders if loader.is_ready]
        self._isolate_one(ready)
        working = [loader for loader in ready if not loader.is_isolated][: self._processes]
        for loader in ready:
            if loader.is_isolated and not loader.held:
                self._assign_quarantined(loader)
        threads = self._options.threads
        for loader in working:
            if (free := threads - len(loader.held)) > 0:
                with self._lock:
                    tasks = self._waiting.take_several(free, threads=len(working) * threads)
                if not tasks:
                    break
                self._send(loader, tasks)

    def _isolate_one(self, ready: Sequence[_Loader]) -> None:
        """Isolate the loader with the fewest tasks if tasks are quarantined; it finishes the tasks it holds first."""
        # With spares a quarantined task waits for a ready spare; without spares a working loader is isolated.
        max_isolated = len(ready) - self._processes if self._spares else 1
        candidates = [loader for loader in ready if not loader.is_isolated]
        if self._quarantine and candidates and sum(loader.is_isolated for loader in self._loaders) < max_isolated:
            min(candidates, key=lambda loader: len(loader.held)).is_isolated = True

    def _assign_quarantined(self, loader: _Loader) -> None:
        if self._quarantine:
            task = self._quarantine.popleft()
            loader.isolated_ticket = task.ticket
            self._send(loader, [task])
        else:
            loader.is_isolated, loader.isolated_ticket = False, None

    def _send(self, loader: _Loader, tasks: Sequence[LoadTask]) -> None:
        now_s = time.monotonic()
        loader.held.update((task.ticket, (task, now_s)) for task in tasks)
        try:
            loader.frames.send(tasks)
        except OSError:
            # It has ended, or does not read what may be half a frame; the next check takes back all its tasks.
            loader.process.kill()
            self._check_soon()

    def _restart(self, loader: _Loader, code: ErrorCode, results: list[LoadResult]) -> None:
        """Kill and reap a loader, fail or quarantine its tasks, and start a replacement."""
        loader.process.kill()
        status = loader.process.wait(EXIT_TIMEOUT_S)
        if loader.connection.fileno() in self._selector.get_map():
            self._selector.unregister(loader.connection)
        loader.connection.close()
        self._loaders.remove(loader)
        log.warning("loader_replaced", pid=loader.process.pid, status=status, held=len(loader.held), code=code.value)
        for task, sent_s in loader.held.values():
            self._thread_is_free(loader, task)
            # A loader that ends with its fork server says nothing about its images.
            if task.ticket == loader.isolated_ticket and not loader.process.has_server_ended:
                results.append(failed_twice_result(task, code, sent_s, status))
            else:
                self._quarantine.append(task)
        if not loader.is_ready:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                text = f"loaders ended {MAX_FAILED_STARTS} times before they were ready"
                self._fail(FatalError(ExitCode.LOADERS, text))
                return
        self.restarts += 1
        # A loader that fails at its start must not be restarted in a busy loop.
        self._starter.start(1, delay_s=0.0 if loader.is_ready else RESTART_PAUSE_S)

    def _add(self, process: ForkedProcess, connection: Connection) -> None:
        """Send a new loader its options. One that does not take them is replaced by the next poll."""
        try:
            connection.send_bytes(self._options.for_sandbox.model_dump_json().encode())
            connection.send_bytes(self._options.model_dump_json().encode())
            connection.send_bytes(self._environment)
        except OSError:
            process.kill()
        loader = _Loader(process, connection, FrameChannel(connection.fileno(), max_bytes=MAX_FRAME_BYTES))
        self._loaders.append(loader)
        self._selector.register(connection, selectors.EVENT_READ, loader)

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # if the pipe is full, the thread is running already
            self._wake_writer.send(b"\0")

    def _drain_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._wake_reader.recv(4096):
                pass
