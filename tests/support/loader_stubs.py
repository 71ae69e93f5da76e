"""A loader pool with loaders that are no processes, so that a test decides what they send and when they end."""

from __future__ import annotations

import selectors
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from shiwu.contract import ErrorCode, ErrorInfo, Lane, Stage
from shiwu_worker.errors import FatalError
from shiwu_worker.loaders.pool import LoaderPool, _Loader
from shiwu_worker.loaders.protocol import ENCODER, LOAD_TASK, Loaded, LoadFailed, LoadResult, LoadTask
from tests.support.loader_options import LOADER_OPTIONS

THREADS = 2


class Process:
    """A process that ends when it is killed."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.has_ended = self.has_server_ended = self.was_killed = False

    def kill(self) -> None:
        """Note it."""
        self.has_ended = self.was_killed = True

    def wait(self, timeout_s: float) -> int:
        """The status of SIGSEGV."""
        assert timeout_s > 0
        return -11


class Connection:
    """A connection and its channel of frames, which keep what they are sent."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.frames: list[bytes | Exception] = []
        """What comes: all of it in one call, up to an error, which ends it."""
        self.is_broken = self.is_closed = False

    def send_bytes(self, data: bytes) -> None:
        """Keep it."""
        if self.is_broken:
            raise BrokenPipeError
        self.sent.append(data)

    def send(self, frames: Sequence[LoadTask]) -> None:
        """Keep them."""
        for frame in frames:
            self.send_bytes(ENCODER.encode(frame))

    def receive(self) -> list[bytes]:
        """The frames before the next error, or the error; without one, the end of the loader."""
        come: list[bytes] = []
        while self.frames and isinstance(frame := self.frames[0], bytes):
            come.append(frame)
            self.frames.pop(0)
        if come:
            return come
        ending = self.frames.pop(0) if self.frames else EOFError()
        assert isinstance(ending, Exception)
        raise ending

    def fileno(self) -> int:
        """For the selector, which is not asked."""
        return id(self)

    def close(self) -> None:
        """Note it."""
        self.is_closed = True

    def tickets(self) -> list[int]:
        """Of the tasks that were sent."""
        return [LOAD_TASK.decode(data).ticket for data in self.sent]


class Selector:
    """Keeps what is registered, and reports what it is told to."""

    def __init__(self) -> None:
        self.registered: dict[Any, Any] = {}
        self.events: list[Any] = []

    def register(self, fileobj: Any, events: int, data: Any = None) -> None:
        """Keep it."""
        assert events == selectors.EVENT_READ
        self.registered[fileobj] = data

    def unregister(self, fileobj: Any) -> None:
        """Forget it; an error where it is unknown."""
        del self.registered[fileobj]

    def get_map(self) -> dict[int, Any]:
        """By file descriptor."""
        return {each.fileno(): SimpleNamespace(fileobj=each) for each in self.registered}

    def select(self, timeout: float) -> list[Any]:
        """What was put there."""
        assert timeout > 0
        found, self.events = self.events, []
        return [(SimpleNamespace(data=data), 1) for data in found]

    def close(self) -> None:
        """Nothing to close."""


class PoolParts:
    """A pool that was not started, with loaders that are no processes."""

    def __init__(self, *, processes: int = 1, spares: int = 0) -> None:
        self.fatal: list[FatalError] = []
        self.results: list[list[LoadResult]] = []
        self.pool = LoaderPool(
            processes=processes,
            spares=spares,
            options=LOADER_OPTIONS.model_copy(update={"threads": THREADS, "slots": 8}),
            task_timeout_s=60.0,
            on_fatal=self.fatal.append,
            environment={"A": "b"},
        )
        self.pool.subscribe(self.results.append)
        self.pool._selector.close()
        self.selector: Any = Selector()
        self.pool._selector = self.selector  # type: ignore[assignment]  # a stub
        self.starts: list[tuple[int, float]] = []
        self.started: list[Any] = []
        self.starter: Any = SimpleNamespace(
            start=lambda count, delay_s=0.0: self.starts.append((count, delay_s)),
            advance=self._advance,
            missing=0,
            close=lambda: None,
        )
        self.pool._starter = self.starter  # type: ignore[assignment]  # a stub

    def _advance(self) -> list[Any]:
        found, self.started = self.started, []
        return found

    def loader(self, *, is_ready: bool = True) -> Any:
        """Add a loader."""
        process: Any = Process(len(self.pool._loaders) + 100)
        connection: Any = Connection()
        self.pool._add(process, connection)
        connection.sent.clear()
        loader = self.pool._loaders[-1]
        loader.frames = connection
        loader.is_ready = is_ready
        return loader

    def wait(self, *tickets: int, source: str = "s") -> None:
        """Let tasks wait."""
        self.pool.submit([make_task(ticket, source=source) for ticket in tickets])

    def take(self, loader: _Loader, result: LoadResult) -> list[LoadResult]:
        """Take a result; return what the pool reports."""
        results: list[LoadResult] = []
        self.pool._take_result(loader, result, results)
        return results


def make_task(ticket: int, *, source: str = "s") -> LoadTask:
    """A task whose slot is its ticket."""
    return LoadTask(ticket, ticket, "https://h/p", Lane.BULK, source)


def hold(loader: _Loader, *tickets: int, sent_s: float | None = None) -> None:
    """Let a loader hold tasks, in the books of the loader only."""
    for ticket in tickets:
        loader.held[ticket] = (make_task(ticket), time.monotonic() if sent_s is None else sent_s)


def loaded(ticket: int) -> Loaded:
    """An image."""
    now_s = time.monotonic()
    return Loaded(ticket, ticket, now_s, now_s, now_s, n_bytes=9, format="PNG", width=3, height=4, sha256="0" * 64)


def failed(ticket: int, **fields: Any) -> LoadFailed:
    """An image that was not loaded."""
    now_s = time.monotonic()
    error = ErrorInfo(code=ErrorCode.SOURCE_NOT_FOUND, message="none", stage=fields.pop("stage", Stage.FETCH))
    return LoadFailed(ticket, ticket, now_s, now_s, now_s, error=error, **fields)
