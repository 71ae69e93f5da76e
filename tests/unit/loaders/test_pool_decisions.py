"""What the pool decides about loaders and their results, with loaders that are no processes."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from shiwu.contract import ErrorCode, Stage
from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.loaders.channel import FrameChannel
from shiwu_worker.loaders.pool import CHECK_INTERVAL_S, MAX_FAILED_STARTS, RESTART_PAUSE_S
from shiwu_worker.loaders.protocol import (
    ENCODER,
    MAX_FRAME_BYTES,
    LoadFailed,
    LoadResult,
    ProtocolError,
    Ready,
    SandboxFault,
)
from tests.support.loader_stubs import THREADS, Connection, PoolParts, Process, failed, hold, loaded, make_task


@pytest.fixture
def parts() -> Iterator[PoolParts]:
    """A pool of one loader without spares."""
    made = PoolParts()
    yield made
    made.pool.close(1.0)


def test_new_loader_gets_options_before_its_secrets(parts: PoolParts) -> None:
    """What its sandbox may know comes first; nothing is sent to a loader that does not take it."""
    process: Any = Process(1)
    connection: Any = Connection()
    parts.pool._add(process, connection)
    sandbox, options, environment = connection.sent
    assert sandbox == parts.pool._options.for_sandbox.model_dump_json().encode()
    assert options == parts.pool._options.model_dump_json().encode()
    assert environment == b'{"A":"b"}'
    assert not process.was_killed
    [loader] = parts.pool._loaders
    assert (loader.is_ready, loader.is_isolated, loader.held, loader.isolated_ticket) == (False, False, {}, None)
    assert parts.selector.registered == {connection: loader}
    broken: Any = Connection()
    broken.is_broken = True
    other: Any = Process(2)
    parts.pool._add(other, broken)
    assert other.was_killed
    assert parts.pool.pids == [1, 2]


def test_ready_loader_gets_as_many_tasks_as_it_has_threads(parts: PoolParts) -> None:
    """One that is not ready gets none; a spare gets none while enough others work."""
    first, second = parts.loader(is_ready=False), parts.loader()
    third = parts.loader()
    parts.wait(1, 2, 3)
    parts.pool._assign()
    assert (first.connection.sent, third.connection.sent) == ([], [])
    assert second.connection.tickets() == list(second.held)
    assert 1 <= len(second.held) <= THREADS
    assert len(parts.pool._waiting) == 3 - len(second.held)


def test_loader_that_takes_no_task_is_killed(parts: PoolParts) -> None:
    """The next poll takes back its tasks, and this one gives it no more."""
    loader = parts.loader()
    parts.wait(1, 2)
    loader.connection.is_broken = True
    parts.pool._assign()
    assert loader.process.was_killed
    assert len(loader.held) + len(parts.pool._waiting) == 2
    assert loader.held


@pytest.mark.parametrize(
    ("spares", "ready", "expected"), [(0, 1, 1), (0, 3, 1), (1, 1, 0), (1, 2, 1), (2, 3, 2), (2, 2, 1)]
)
def test_loaders_are_isolated_up_to_the_spares(spares: int, ready: int, expected: int) -> None:
    """Without spares one working loader; with spares as many as are ready beyond those that work."""
    parts = PoolParts(processes=1, spares=spares)
    for _ in range(ready):
        parts.loader()
    parts.pool._isolate_one(parts.pool._loaders)
    assert not any(loader.is_isolated for loader in parts.pool._loaders), "nothing is quarantined"
    parts.pool._quarantine.extend(make_task(ticket) for ticket in range(5))
    for _ in range(5):
        parts.pool._isolate_one(parts.pool._loaders)
    assert sum(loader.is_isolated for loader in parts.pool._loaders) == expected
    parts.pool.close(1.0)


def test_loader_with_the_fewest_tasks_is_isolated(parts: PoolParts) -> None:
    """It runs the quarantined task once its own are finished, then the next one, and then works again."""
    first, second = parts.loader(), parts.loader()
    hold(first, 1, 2)
    hold(second, 3)
    parts.pool._quarantine.extend([make_task(8), make_task(9)])
    parts.pool._assign()
    assert (first.is_isolated, second.is_isolated, second.connection.sent) == (False, True, [])
    second.held.clear()
    for ticket in (8, 9):
        parts.pool._assign()
        assert (second.isolated_ticket, list(second.held)) == (ticket, [ticket])
        parts.pool._assign()
        assert list(second.held) == [ticket], "alone"
        second.held.clear()
    parts.pool._assign()
    assert (second.is_isolated, second.isolated_ticket) == (False, None)
    assert second.connection.tickets() == [8, 9]


@pytest.mark.parametrize("is_isolated", [False, True])
def test_image_that_lacks_memory_is_quarantined_once(parts: PoolParts, *, is_isolated: bool) -> None:
    """Alone it has all the memory there is, so then it fails."""
    loader = parts.loader()
    hold(loader, 1)
    if is_isolated:
        loader.is_isolated, loader.isolated_ticket = True, 1
    else:
        parts.pool._waiting._source("s").held[1] = parts.pool._waiting._held[1] = 1
    result = failed(1, is_short_of_memory=True, stage=Stage.DECODE)
    reported = parts.take(loader, result)
    assert reported == ([result] if is_isolated else [])
    assert [task.ticket for task in parts.pool._quarantine] == ([] if is_isolated else [1])
    assert loader.held == {}
    assert parts.pool._waiting._held[1] == 0


def test_result_for_no_task_of_this_loader_is_refused(parts: PoolParts) -> None:
    """And one that its task excludes; the task stays with the loader."""
    first, second = parts.loader(), parts.loader()
    hold(first, 1)
    with pytest.raises(ProtocolError, match="a task of this loader"):
        parts.take(second, loaded(1))
    hold(first, 1, sent_s=time.monotonic() + 60.0)
    with pytest.raises(ProtocolError, match="times in their order"):
        parts.take(first, loaded(1))
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
    parts: PoolParts, result: LoadResult | None, expected: tuple[float, bool | None]
) -> None:
    """A failed decode says nothing against it; an untried fetch and a loader that ended say nothing at all."""
    notes: list[tuple[float, bool | None]] = []
    waiting: Any = SimpleNamespace(done=lambda _, seconds, has_failed: notes.append((seconds, has_failed)))
    parts.pool._waiting = waiting
    loader = parts.loader()
    # A fetch that took 2 s.
    seen = None if result is None else msgspec.structs.replace(result, started_s=1.0, fetched_s=3.0, decoded_s=7.0)
    parts.pool._thread_is_free(loader, make_task(1), seen)
    assert notes == [pytest.approx(expected)] if expected[1] is not None else notes == [expected]
    loader.isolated_ticket = 1
    parts.pool._thread_is_free(loader, make_task(1), seen)
    assert len(notes) == 1, "a quarantined task has a loader of its own"


@pytest.mark.parametrize(
    ("is_isolated", "has_server_ended", "is_failed"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_task_fails_with_its_second_loader(
    parts: PoolParts, is_isolated: bool, has_server_ended: bool, is_failed: bool
) -> None:
    """Only where it was alone, and where the loader did not end with its fork server; otherwise it is retried."""
    loader = parts.loader()
    parts.pool._waiting._source("s").held[1] = parts.pool._waiting._held[1] = 0 if is_isolated else 1
    hold(loader, 4)
    loader.isolated_ticket = 4 if is_isolated else None
    loader.process.has_server_ended = has_server_ended
    results: list[LoadResult] = []
    with capture_logs() as logs:
        parts.pool._restart(loader, ErrorCode.DECODER_CRASHED, results)
    assert [result.ticket for result in results] == [4] * is_failed
    assert [task.ticket for task in parts.pool._quarantine] == [4] * (not is_failed)
    assert [(line["event"], line["held"], line["code"]) for line in logs] == [("loader_replaced", 1, "decoder_crashed")]
    assert loader.process.was_killed
    assert loader.connection.is_closed
    assert (parts.pool._loaders, parts.selector.registered) == ([], {})
    assert (parts.pool.restarts, parts.starts) == (1, [(1, 0.0)])
    assert parts.pool._waiting._held[1] == 0


def test_loaders_that_never_become_ready_end_the_pool(parts: PoolParts) -> None:
    """After a few, one after the other; each starts after a pause. One that is ready begins the count again."""
    for _ in range(2):
        for _ in range(MAX_FAILED_STARTS - 1):
            parts.pool._restart(parts.loader(is_ready=False), ErrorCode.DECODER_CRASHED, [])
        assert parts.fatal == []
        parts.pool._on_ready(parts.loader(), Ready())
    assert parts.starts == [(1, RESTART_PAUSE_S)] * 2 * (MAX_FAILED_STARTS - 1)
    for _ in range(MAX_FAILED_STARTS):
        parts.pool._restart(parts.loader(is_ready=False), ErrorCode.DECODER_CRASHED, [])
    assert [error.exit_code for error in parts.fatal] == [ExitCode.LOADERS]
    assert len(parts.starts) == parts.pool.restarts == 3 * (MAX_FAILED_STARTS - 1)
    with pytest.raises(FatalError):
        parts.pool.wait_ready(0.0)


def test_pool_is_woken_by_tasks_and_by_its_end(parts: PoolParts) -> None:
    """By any number of them: neither the caller nor the pool's thread waits for the other."""
    parts.pool._drain_wake()
    for number in range(5000):
        parts.pool._wake()
        if number % 2500 == 0:
            parts.wait(number)
    parts.pool._drain_wake()
    with pytest.raises(BlockingIOError):
        parts.pool._wake_reader.recv(1)
    parts.wait(1)
    assert parts.pool._wake_reader.recv(10)
    parts.pool._closing.clear()
    parts.pool._wake()
    assert parts.pool._wake_reader.recv(10)


def test_missing_filter_is_logged_once(parts: PoolParts) -> None:
    """Not by each loader, and not where the filter is there."""
    with capture_logs() as logs:
        for reason in (None, "no seccomp", "no seccomp"):
            parts.pool._on_ready(parts.loader(is_ready=False), Ready(reason))
    assert [(line["event"], line["reason"]) for line in logs] == [("sandbox_unavailable", "no seccomp")]
    assert all(loader.is_ready for loader in parts.pool._loaders)


@pytest.mark.parametrize(
    ("frame", "part"),
    [(EOFError(), None), (ConnectionResetError(), None), (b"junk", "loader"), (ENCODER.encode(loaded(9)), "loader")],
    ids=["end", "reset", "junk", "other ticket"],
)
def test_loader_that_ends_or_lies_is_killed(parts: PoolParts, frame: bytes | Exception, part: str | None) -> None:
    """Frames that came before count; those behind it do not, and the selector forgets it."""
    loader = parts.loader(is_ready=False)
    loader.connection.frames = [ENCODER.encode(Ready()), frame, ENCODER.encode(SandboxFault("late"))]
    with capture_logs() as logs:
        while parts.selector.registered:
            parts.pool._receive(loader, [])
    assert loader.is_ready
    assert loader.process.was_killed
    assert [line["part"] for line in logs] == ([part] if part else [])


def test_begun_frame_delays_no_other_loader(parts: PoolParts) -> None:
    """The pool does not wait for its end; the loader is replaced when its task is overdue."""
    slow, fine = parts.loader(), parts.loader()
    own_end, loader_end = socket.socketpair()
    with own_end, loader_end:
        slow.frames = FrameChannel(own_end.fileno(), max_bytes=MAX_FRAME_BYTES)
        loader_end.sendall(ENCODER.encode(loaded(1))[:-1])
        hold(slow, 1, sent_s=time.monotonic() - 59.0)
        hold(fine, 2)
        parts.pool._waiting._source("s").held[1] = parts.pool._waiting._held[1] = 2
        fine.connection.frames = [ENCODER.encode(loaded(2))]
        parts.selector.events = [slow, fine]
        parts.pool._poll()
        assert [[result.ticket for result in results] for results in parts.results] == [[2]]
        assert not slow.process.was_killed
        slow.held[1] = (slow.held[1][0], time.monotonic() - 61.0)
        parts.pool._check_soon()
        parts.pool._poll()
    assert slow.process.was_killed
    assert not fine.process.was_killed


def test_fault_of_a_sandbox_is_logged(parts: PoolParts) -> None:
    """The loader ends by itself; what it sends before is read."""
    loader = parts.loader()
    hold(loader, 1)
    loader.connection.frames = [ENCODER.encode(SandboxFault("two replies")), ENCODER.encode(loaded(1))]
    results: list[LoadResult] = []
    parts.pool._waiting._source("s").held[1] = parts.pool._waiting._held[1] = 1
    with capture_logs() as logs:
        parts.pool._receive(loader, results)
    assert [(line["part"], line["error"]) for line in logs] == [("sandbox", "two replies")]
    assert [result.ticket for result in results] == [1]
    assert not loader.process.was_killed


def test_poll_collects_results_and_replaces_what_ended(parts: PoolParts) -> None:
    """An ended loader's last results count; one that hangs is replaced; the others go on."""
    ended, hanging, fine = parts.loader(), parts.loader(), parts.loader()
    parts.pool._waiting._source("s").held[1] = parts.pool._waiting._held[1] = 3
    hold(ended, 1)
    ended.connection.frames = [ENCODER.encode(loaded(1))]
    ended.process.has_ended = True
    hold(hanging, 2, sent_s=time.monotonic() - 60.5)
    hold(fine, 3, sent_s=time.monotonic() - 50.0)
    with capture_logs() as logs:
        parts.pool._poll()
    assert [[result.ticket for result in results] for results in parts.results] == [[1]]
    assert parts.pool._loaders == [fine]
    assert [(line["event"], line["code"]) for line in logs] == [
        ("loader_replaced", "decoder_crashed"),
        ("loader_replaced", "decoder_timeout"),
    ]
    assert [task.ticket for task in parts.pool._quarantine] == [2]
    parts.pool._poll()
    assert len(parts.results) == 1, "nothing to report"


@pytest.mark.parametrize(
    ("ready", "missing", "is_ready"), [(2, 0, True), (1, 0, False), (2, 1, False), (3, 0, True), (0, 0, False)]
)
def test_pool_is_ready_with_all_its_loaders(ready: int, missing: int, *, is_ready: bool) -> None:
    """As many as work at a time, and none that is still to be started."""
    parts = PoolParts(processes=2, spares=1)
    for number in range(3):
        parts.loader(is_ready=number < ready)
    parts.starter.missing = missing
    parts.pool._poll()
    assert parts.pool._all_ready.is_set() is is_ready
    parts.pool.close(1.0)


def test_ready_loader_is_seen_by_the_same_poll(parts: PoolParts) -> None:
    """The start of the worker waits for it, so it does not wait for the next check."""
    loader = parts.loader(is_ready=False)
    loader.connection.frames = [ENCODER.encode(Ready())]
    parts.pool._check_at_s = time.monotonic() + 60.0
    parts.selector.events = [loader]
    parts.pool._poll()
    assert parts.pool._all_ready.is_set()


def test_started_processes_become_loaders(parts: PoolParts) -> None:
    """And the pool reads what its selector reports of them."""
    connection: Any = Connection()
    parts.started = [(Process(7), connection)]
    parts.pool._poll()
    [loader] = parts.pool._loaders
    loader.frames = connection
    connection.frames = [ENCODER.encode(Ready())]
    parts.selector.events = [None, loader, "another"]
    parts.pool._poll()
    assert loader.is_ready


def test_loaders_are_checked_at_intervals_and_when_one_ends(parts: PoolParts) -> None:
    """Not at each poll: there are thousands a second, and the check visits all loaders."""
    loader = parts.loader()
    parts.pool._poll()
    parts.started = [(Process(7), Connection())]
    for _ in range(3):
        parts.pool._check_at_s = time.monotonic() + 60.0
        parts.selector.events = [None]
        parts.pool._poll()
    assert parts.pool._loaders == [loader]
    loader.connection.frames = [EOFError()]
    parts.selector.events = [loader]
    parts.pool._poll()
    assert [each.process.pid for each in parts.pool._loaders] == [7]
    assert parts.pool._check_at_s <= time.monotonic() + CHECK_INTERVAL_S
    parts.started = [(Process(8), Connection())]
    parts.selector.events = ["the fork server"]
    parts.pool._poll()
    assert [each.process.pid for each in parts.pool._loaders] == [7, 8]


def test_refused_tasks_are_answered(parts: PoolParts) -> None:
    """A source that is slow has enough tasks here; its task gives the slot back."""
    parts.pool._waiting._refuse(make_task(5))
    parts.pool._poll()
    [[result]] = parts.results
    assert isinstance(result, LoadFailed)
    assert (result.ticket, result.is_untried) == (5, True)


def test_closed_pool_has_ended_its_processes(parts: PoolParts) -> None:
    """With their connections and the shared memory; closing again does no harm."""
    loader = parts.loader()
    parts.pool.close(1.0)
    assert loader.process.was_killed
    assert loader.connection.is_closed
    assert (parts.pool.pids, parts.pool._memory_fd) == ([], -1)
    assert parts.pool._wake_reader.fileno() == parts.pool._wake_writer.fileno() == -1
