"""What the pool decides about loaders and their results, with loaders that are no processes."""

from __future__ import annotations

import selectors
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from shiwu.contract import ErrorCode, ErrorInfo, Lane, Stage
from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.loaders.pool import MAX_FAILED_STARTS, RESTART_PAUSE_S, LoaderPool, _Loader
from shiwu_worker.loaders.protocol import (
    ENCODER,
    LOAD_TASK,
    Loaded,
    LoadFailed,
    LoadResult,
    LoadTask,
    ProtocolError,
    Ready,
    SandboxFault,
)
from tests.fuzz.targets import LOADER_OPTIONS

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
    """A connection that keeps what it is sent."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.frames: list[bytes | Exception] = []
        self.is_broken = self.is_closed = False

    def send_bytes(self, data: bytes) -> None:
        """Keep it."""
        if self.is_broken:
            raise BrokenPipeError
        self.sent.append(data)

    def poll(self) -> bool:
        """Whether a frame has come."""
        return bool(self.frames)

    def recv_bytes(self, limit: int) -> bytes:
        """The next frame."""
        assert limit
        frame = self.frames.pop(0)
        if isinstance(frame, Exception):
            raise frame
        return frame

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


class Place:
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
        self.pool._selector = self.selector
        self.starts: list[tuple[int, float]] = []
        self.started: list[Any] = []
        self.starter: Any = SimpleNamespace(
            start=lambda count, delay_s=0.0: self.starts.append((count, delay_s)),
            advance=self._advance,
            missing=0,
            close=lambda: None,
        )
        self.pool._starter = self.starter

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


@pytest.fixture
def place() -> Iterator[Place]:
    """A pool of one loader without spares."""
    made = Place()
    yield made
    made.pool.close(1.0)


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


def test_new_loader_gets_options_before_its_secrets(place: Place) -> None:
    """What its sandbox may know comes first; nothing is sent to a loader that does not take it."""
    process: Any = Process(1)
    connection: Any = Connection()
    place.pool._add(process, connection)
    sandbox, options, environment = connection.sent
    assert sandbox == place.pool._options.for_sandbox.model_dump_json().encode()
    assert options == place.pool._options.model_dump_json().encode()
    assert environment == b'{"A":"b"}'
    assert not process.was_killed
    [loader] = place.pool._loaders
    assert (loader.is_ready, loader.is_isolated, loader.held, loader.isolated_ticket) == (False, False, {}, None)
    assert place.selector.registered == {connection: loader}
    broken: Any = Connection()
    broken.is_broken = True
    other: Any = Process(2)
    place.pool._add(other, broken)
    assert other.was_killed
    assert place.pool.pids == [1, 2]


def test_ready_loader_gets_as_many_tasks_as_it_has_threads(place: Place) -> None:
    """One that is not ready gets none; a spare gets none while enough others work."""
    first, second = place.loader(is_ready=False), place.loader()
    third = place.loader()
    place.wait(1, 2, 3)
    place.pool._assign()
    assert (first.connection.sent, third.connection.sent) == ([], [])
    assert second.connection.tickets() == list(second.held)
    assert 1 <= len(second.held) <= THREADS
    assert len(place.pool._waiting) == 3 - len(second.held)


def test_loader_that_takes_no_task_is_killed(place: Place) -> None:
    """The next poll takes back its tasks, and this one gives it no more."""
    loader = place.loader()
    place.wait(1, 2)
    loader.connection.is_broken = True
    place.pool._assign()
    assert loader.process.was_killed
    assert list(loader.held) == [1]
    assert len(place.pool._waiting) == 1


@pytest.mark.parametrize(
    ("spares", "ready", "expected"), [(0, 1, 1), (0, 3, 1), (1, 1, 0), (1, 2, 1), (2, 3, 2), (2, 2, 1)]
)
def test_loaders_are_isolated_up_to_the_spares(spares: int, ready: int, expected: int) -> None:
    """Without spares one working loader; with spares as many as are ready beyond those that work."""
    place = Place(processes=1, spares=spares)
    for _ in range(ready):
        place.loader()
    place.pool._isolate_one(place.pool._loaders)
    assert not any(loader.is_isolated for loader in place.pool._loaders), "nothing is quarantined"
    place.pool._quarantine.extend(make_task(ticket) for ticket in range(5))
    for _ in range(5):
        place.pool._isolate_one(place.pool._loaders)
    assert sum(loader.is_isolated for loader in place.pool._loaders) == expected
    place.pool.close(1.0)


def test_loader_with_the_fewest_tasks_is_isolated(place: Place) -> None:
    """It runs the quarantined task once its own are finished, then the next one, and then works again."""
    first, second = place.loader(), place.loader()
    hold(first, 1, 2)
    hold(second, 3)
    place.pool._quarantine.extend([make_task(8), make_task(9)])
    place.pool._assign()
    assert (first.is_isolated, second.is_isolated, second.connection.sent) == (False, True, [])
    second.held.clear()
    for ticket in (8, 9):
        place.pool._assign()
        assert (second.isolated_ticket, list(second.held)) == (ticket, [ticket])
        place.pool._assign()
        assert list(second.held) == [ticket], "alone"
        second.held.clear()
    place.pool._assign()
    assert (second.is_isolated, second.isolated_ticket) == (False, None)
    assert second.connection.tickets() == [8, 9]


@pytest.mark.parametrize("is_isolated", [False, True])
def test_image_that_lacks_memory_is_quarantined_once(place: Place, *, is_isolated: bool) -> None:
    """Alone it has all the memory there is, so then it fails."""
    loader = place.loader()
    hold(loader, 1)
    if is_isolated:
        loader.is_isolated, loader.isolated_ticket = True, 1
    else:
        place.pool._waiting._source("s").held[1] = place.pool._waiting._held[1] = 1
    result = failed(1, is_short_of_memory=True, stage=Stage.DECODE)
    reported = place.take(loader, result)
    assert reported == ([result] if is_isolated else [])
    assert [task.ticket for task in place.pool._quarantine] == ([] if is_isolated else [1])
    assert loader.held == {}
    assert place.pool._waiting._held[1] == 0


def test_result_for_no_task_of_this_loader_is_refused(place: Place) -> None:
    """And one that its task excludes; the task stays with the loader."""
    first, second = place.loader(), place.loader()
    hold(first, 1)
    with pytest.raises(ProtocolError, match="a task of this loader"):
        place.take(second, loaded(1))
    hold(first, 1, sent_s=time.monotonic() + 60.0)
    with pytest.raises(ProtocolError, match="times in their order"):
        place.take(first, loaded(1))
    assert list(first.held) == [1]


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (loaded(1), (2.0, False)),
        (failed(1), (2.0, True)),
        (failed(1, stage=Stage.DECODE), (2.0, False)),
        (failed(1, is_untried=True), (2.0, None)),
        (None, (0.0, None)),
    ],
)
def test_fetch_says_something_about_its_source(
    place: Place, result: LoadResult | None, expected: tuple[float, bool | None]
) -> None:
    """A failed decode says nothing against it; an untried fetch and a loader that ended say nothing at all."""
    notes: list[tuple[float, bool | None]] = []
    waiting: Any = SimpleNamespace(done=lambda _, seconds, has_failed: notes.append((seconds, has_failed)))
    place.pool._waiting = waiting
    loader = place.loader()
    # A fetch that took 2 s.
    seen = None if result is None else msgspec.structs.replace(result, started_s=1.0, fetched_s=3.0, decoded_s=7.0)
    place.pool._thread_is_free(loader, make_task(1), seen)
    assert notes == [pytest.approx(expected)] if expected[1] is not None else notes == [expected]
    loader.isolated_ticket = 1
    place.pool._thread_is_free(loader, make_task(1), seen)
    assert len(notes) == 1, "a quarantined task has a loader of its own"


@pytest.mark.parametrize(
    ("is_isolated", "has_server_ended", "is_failed"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_task_fails_with_its_second_loader(
    place: Place, is_isolated: bool, has_server_ended: bool, is_failed: bool
) -> None:
    """Only where it was alone, and where the loader did not end with its fork server; otherwise it is retried."""
    loader = place.loader()
    place.pool._waiting._source("s").held[1] = place.pool._waiting._held[1] = 0 if is_isolated else 1
    hold(loader, 4)
    loader.isolated_ticket = 4 if is_isolated else None
    loader.process.has_server_ended = has_server_ended
    results: list[LoadResult] = []
    with capture_logs() as logs:
        place.pool._restart(loader, ErrorCode.DECODER_CRASHED, results)
    assert [result.ticket for result in results] == [4] * is_failed
    assert [task.ticket for task in place.pool._quarantine] == [4] * (not is_failed)
    assert [(line["event"], line["held"], line["code"]) for line in logs] == [("loader_replaced", 1, "decoder_crashed")]
    assert loader.process.was_killed
    assert loader.connection.is_closed
    assert (place.pool._loaders, place.selector.registered) == ([], {})
    assert (place.pool.restarts, place.starts) == (1, [(1, 0.0)])
    assert place.pool._waiting._held[1] == 0


def test_loaders_that_never_become_ready_end_the_pool(place: Place) -> None:
    """After a few, one after the other; each starts after a pause. One that is ready begins the count again."""
    for _ in range(2):
        for _ in range(MAX_FAILED_STARTS - 1):
            place.pool._restart(place.loader(is_ready=False), ErrorCode.DECODER_CRASHED, [])
        assert place.fatal == []
        place.pool._on_ready(place.loader(), Ready())
    assert place.starts == [(1, RESTART_PAUSE_S)] * 2 * (MAX_FAILED_STARTS - 1)
    for _ in range(MAX_FAILED_STARTS):
        place.pool._restart(place.loader(is_ready=False), ErrorCode.DECODER_CRASHED, [])
    assert [error.exit_code for error in place.fatal] == [ExitCode.LOADERS]
    assert len(place.starts) == place.pool.restarts == 3 * (MAX_FAILED_STARTS - 1)
    with pytest.raises(FatalError):
        place.pool.wait_ready(0.0)


def test_pool_is_woken_by_tasks_and_by_its_end(place: Place) -> None:
    """By any number of them: neither the caller nor the pool's thread waits for the other."""
    place.pool._drain_wake()
    for number in range(5000):
        place.pool._wake()
        if number % 2500 == 0:
            place.wait(number)
    place.pool._drain_wake()
    with pytest.raises(BlockingIOError):
        place.pool._wake_reader.recv(1)
    place.wait(1)
    assert place.pool._wake_reader.recv(10)
    place.pool._closing.clear()
    place.pool._wake()
    assert place.pool._wake_reader.recv(10)


def test_missing_filter_is_logged_once(place: Place) -> None:
    """Not by each loader, and not where the filter is there."""
    with capture_logs() as logs:
        for reason in (None, "no seccomp", "no seccomp"):
            place.pool._on_ready(place.loader(is_ready=False), Ready(reason))
    assert [(line["event"], line["reason"]) for line in logs] == [("sandbox_unavailable", "no seccomp")]
    assert all(loader.is_ready for loader in place.pool._loaders)


@pytest.mark.parametrize(
    ("frame", "part"),
    [(EOFError(), None), (ConnectionResetError(), None), (b"junk", "loader"), (ENCODER.encode(loaded(9)), "loader")],
    ids=["end", "reset", "junk", "other ticket"],
)
def test_loader_that_ends_or_lies_is_killed(place: Place, frame: bytes | Exception, part: str | None) -> None:
    """Frames that came before count; those behind it are not read, and the selector forgets it."""
    loader = place.loader(is_ready=False)
    loader.connection.frames = [ENCODER.encode(Ready()), frame, ENCODER.encode(Ready("late"))]
    with capture_logs() as logs:
        place.pool._receive(loader, [])
    assert loader.is_ready
    assert loader.process.was_killed
    assert place.selector.registered == {}
    assert len(loader.connection.frames) == 1
    assert [line["part"] for line in logs] == ([part] if part else [])


def test_fault_of_a_sandbox_is_logged(place: Place) -> None:
    """The loader ends by itself; what it sends before is read."""
    loader = place.loader()
    hold(loader, 1)
    loader.connection.frames = [ENCODER.encode(SandboxFault("two replies")), ENCODER.encode(loaded(1))]
    results: list[LoadResult] = []
    place.pool._waiting._source("s").held[1] = place.pool._waiting._held[1] = 1
    with capture_logs() as logs:
        place.pool._receive(loader, results)
    assert [(line["part"], line["error"]) for line in logs] == [("sandbox", "two replies")]
    assert [result.ticket for result in results] == [1]
    assert not loader.process.was_killed


def test_poll_collects_results_and_replaces_what_ended(place: Place) -> None:
    """An ended loader's last results count; one that hangs is replaced; the others go on."""
    ended, hanging, fine = place.loader(), place.loader(), place.loader()
    place.pool._waiting._source("s").held[1] = place.pool._waiting._held[1] = 3
    hold(ended, 1)
    ended.connection.frames = [ENCODER.encode(loaded(1))]
    ended.process.has_ended = True
    hold(hanging, 2, sent_s=time.monotonic() - 60.5)
    hold(fine, 3, sent_s=time.monotonic() - 50.0)
    with capture_logs() as logs:
        place.pool._poll()
    assert [[result.ticket for result in results] for results in place.results] == [[1]]
    assert place.pool._loaders == [fine]
    assert [(line["event"], line["code"]) for line in logs] == [
        ("loader_replaced", "decoder_crashed"),
        ("loader_replaced", "decoder_timeout"),
    ]
    assert [task.ticket for task in place.pool._quarantine] == [2]
    place.pool._poll()
    assert len(place.results) == 1, "nothing to report"


@pytest.mark.parametrize(
    ("ready", "missing", "is_ready"), [(2, 0, True), (1, 0, False), (2, 1, False), (3, 0, True), (0, 0, False)]
)
def test_pool_is_ready_with_all_its_loaders(ready: int, missing: int, *, is_ready: bool) -> None:
    """As many as work at a time, and none that is still to be started."""
    place = Place(processes=2, spares=1)
    for number in range(3):
        place.loader(is_ready=number < ready)
    place.starter.missing = missing
    place.pool._poll()
    assert place.pool._all_ready.is_set() is is_ready
    place.pool.close(1.0)


def test_started_processes_become_loaders(place: Place) -> None:
    """And the pool reads what its selector reports of them."""
    connection = Connection()
    place.started = [(Process(7), connection)]
    place.pool._poll()
    [loader] = place.pool._loaders
    connection.frames = [ENCODER.encode(Ready())]
    place.selector.events = [None, loader, "another"]
    place.pool._poll()
    assert loader.is_ready


def test_refused_tasks_are_answered(place: Place) -> None:
    """A source that is slow has enough tasks here; its task gives the slot back."""
    place.pool._waiting._refuse(make_task(5))
    place.pool._poll()
    [[result]] = place.results
    assert isinstance(result, LoadFailed)
    assert (result.ticket, result.is_untried) == (5, True)


def test_closed_pool_has_ended_its_processes(place: Place) -> None:
    """With their connections and the shared memory; closing again does no harm."""
    loader = place.loader()
    place.pool.close(1.0)
    assert loader.process.was_killed
    assert loader.connection.is_closed
    assert (place.pool.pids, place.pool._memory_fd) == ([], -1)
    assert place.pool._wake_reader.fileno() == place.pool._wake_writer.fileno() == -1
