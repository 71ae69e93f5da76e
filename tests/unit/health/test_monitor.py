"""The reasons of the probes, for each part that can fail."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from shiwu_worker.health import monitor as monitor_module
from shiwu_worker.health.monitor import HealthMonitor, LivenessSources
from shiwu_worker.runtime.proc import is_running
from shiwu_worker.runtime.progress import Progress
from shiwu_worker.runtime.threads import ServiceThread
from tests.support.clock import Clock
from tests.support.waiting import wait_until

STUCK_S = 90.0


@pytest.fixture
def clock() -> Clock:
    """The clock of the monitor and of the progress that it reads."""
    return Clock()


class Worker:
    """The sources that the monitor reads; healthy at first."""

    def __init__(self, clock: Clock) -> None:
        self.progress = Progress(clock=clock.monotonic)
        self.monitor = HealthMonitor(self.progress, redis_timeout_s=5.0, clock=clock.monotonic)
        self.held = 0
        self.encode_age_s = 0.0
        self.loaders = [os.getpid()]

    def start(self, *, threads: tuple[ServiceThread, ...] = ()) -> HealthMonitor:
        """Report that it runs and claims."""
        self.monitor.started(
            LivenessSources(
                threads=threads,
                held=lambda: self.held,
                encode_age_s=lambda: self.encode_age_s,
                loaders=lambda: self.loaders,
                stuck_s=lambda: STUCK_S,
            )
        )
        self.monitor.claiming(active=True)
        return self.monitor


def test_starting_worker_is_neither_live_nor_ready(clock: Clock) -> None:
    """The reason has the time since the start began."""
    worker = Worker(clock)
    clock.now_s += 12
    assert worker.monitor.not_live() == worker.monitor.not_ready() == ["starting for 12 s"]
    monitor = worker.start()
    assert (monitor.not_live(), monitor.not_ready()) == ([], [])


def test_worker_without_progress_is_not_live_only_with_work(clock: Clock) -> None:
    """Work is a job in flight or a message in a lane."""
    worker = Worker(clock)
    monitor = worker.start()
    clock.now_s += STUCK_S + 1
    monitor.redis(available=True)
    assert (monitor.not_live(), monitor.stalled_s()) == ([], 0.0)
    worker.held = 3
    assert monitor.not_live() == ["nothing was claimed, encoded or answered for 91 s with 3 jobs held and 0 waiting"]
    assert monitor.stalled_s() == STUCK_S + 1
    worker.held = 0
    monitor.waiting(7)
    assert monitor.not_live() == ["nothing was claimed, encoded or answered for 91 s with 0 jobs held and 7 waiting"]
    assert monitor.not_ready() == monitor.not_live()
    worker.progress.mark()
    assert (monitor.not_live(), monitor.stalled_s()) == ([], 0.0)


def test_redis_outage_is_not_live_only_with_a_backlog(clock: Clock) -> None:
    """The pipeline counts waiting for Redis as progress; the probes do not if work waits."""
    worker = Worker(clock)
    monitor = worker.start()
    monitor.redis(available=False)
    assert monitor.not_ready() == ["Redis has not answered for 0 s"]
    clock.now_s += STUCK_S + 1
    worker.progress.mark()
    assert monitor.not_live() == []
    monitor.waiting(2)
    assert monitor.not_live() == ["Redis has not answered for 91 s with 0 jobs held and 2 waiting"]
    assert monitor.stalled_s() == STUCK_S + 1
    monitor.redis(available=True)
    assert (monitor.not_live(), monitor.not_ready()) == ([], [])


def test_silent_heartbeat_counts_as_redis_outage(clock: Clock) -> None:
    """Only after the time-out of one command."""
    monitor = Worker(clock).start()
    clock.now_s += 7
    assert monitor.not_ready() == []
    clock.now_s += 2
    assert monitor.not_ready() == ["Redis has not answered for 9 s"]


def test_hanging_encode_thread_is_not_live_without_work(clock: Clock) -> None:
    """A device that hangs on the health-check image holds no job."""
    worker = Worker(clock)
    monitor = worker.start()
    worker.encode_age_s = 100.0
    assert monitor.not_live() == ["the encode thread has been busy with one batch for 100 s"]


def test_ended_thread_is_named(clock: Clock) -> None:
    """In the reason of /livez."""
    end = threading.Event()
    thread = ServiceThread("encode", lambda: end.wait(10) and None, on_fatal=None, stop=end.set)
    thread.start()
    monitor = Worker(clock).start(threads=(thread,))
    assert monitor.not_live() == []
    assert thread.close(5)
    assert monitor.not_live() == ["threads have ended: encode"]


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as made:
        yield made
        made.kill()


@pytest.mark.parametrize("end", [lambda child: child.send_signal(signal.SIGSTOP), lambda child: child.kill()])
def test_stopped_or_exited_loaders_are_not_live(
    clock: Clock, child: subprocess.Popen[bytes], end: Callable[[subprocess.Popen[bytes]], None]
) -> None:
    """Only if it is true of all, for longer than a restart takes. A zombie has exited."""
    worker = Worker(clock)
    worker.loaders = [child.pid, 2**22 + 1]
    monitor = worker.start()
    assert monitor.not_live() == []
    end(child)
    wait_until(lambda: not is_running(child.pid), timeout_s=5, what="the end of the child")
    clock.now_s += monitor_module.MAX_WITHOUT_LOADERS_S
    monitor.redis(available=True)
    assert monitor.not_live() == []
    clock.now_s += 1
    assert monitor.not_live() == ["no loader process has run for 6 s"]
    worker.loaders.append(os.getpid())
    assert monitor.not_live() == []


def test_failing_claims_and_wrong_canary_stay_live(clock: Clock) -> None:
    """They are not ready; a restart may not help."""
    monitor = Worker(clock).start()
    monitor.claiming(active=False)
    assert monitor.not_ready() == ["no claim has succeeded yet, or the last one failed"]
    monitor.claiming(active=True)
    monitor.canary("expected a vector of length 1, got nan")
    assert monitor.not_ready() == ["the health-check image got a wrong result: expected a vector of length 1, got nan"]
    assert monitor.not_live() == []


def test_draining_worker_is_live_and_not_ready(clock: Clock) -> None:
    """For however long it holds its last job: the grace time limits that."""
    worker = Worker(clock)
    monitor = worker.start()
    worker.held = 1
    monitor.stopping()
    clock.now_s += 1000
    assert (monitor.not_live(), monitor.not_ready(), monitor.stalled_s()) == ([], ["draining"], 0.0)
