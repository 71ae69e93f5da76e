"""How a worker starts without Redis, and how signals end it at any time."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import StartWorker
from tests.support.servers import Valkey, WorkerProcess


def events(worker: WorkerProcess) -> list[str]:
    """The events of its log, in their order; each line is JSON, Celery's own text is none."""
    lines = worker.log_text().splitlines()
    assert [line for line in lines if not line.startswith("{")] == []
    return [str(json.loads(line)["event"]) for line in lines]


def test_a_worker_is_ready_when_redis_is_there(
    start_worker: StartWorker, valkey: Valkey, wait_until: Callable[..., Any]
) -> None:
    """Before, its log says that Redis is away, and nothing of callbacks; Ctrl-C once then ends it with exit code 0."""
    url = valkey.url
    valkey.stop()
    worker = start_worker(redis_url=url, ready=False)
    wait_until(lambda: '"where": "claim"' in worker.log_text(), timeout_s=90)
    before = [event for event in events(worker) if event not in {"running_as_root", "embedded_model"}]
    assert before[0] == "redis_unavailable"
    assert not {"ready", "callbacks_postponed"} & set(before)
    valkey.start()
    worker.wait_ready()
    wait_until(lambda: "ready" in events(worker), timeout_s=5)
    assert events(worker).index("redis_available") < events(worker).index("ready")
    worker.signal(signal.SIGINT)
    assert worker.wait(timeout_s=30) == 0
    assert [event for event in events(worker) if event.startswith("stop")] == ["stopping", "stopped"]
    assert "callbacks_postponed" not in events(worker)


@pytest.mark.parametrize(("number", "by_celery"), [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_signal_ends_the_start(
    start_worker: StartWorker, redis_url: str, wait_until: Callable[..., Any], number: signal.Signals, by_celery: bool
) -> None:
    """With exit code 0, and not only when the model has been loaded."""
    # Without this a process that has imported torch before starts the worker, and it may be ready before the signal.
    own_interpreter = {"NOT_PRELOADED": "1"}
    worker = start_worker(redis_url=redis_url, ready=False, by_celery=by_celery, env=own_interpreter)
    wait_until(lambda: _has_loaders(worker.pid), timeout_s=60, what="its loaders start")
    worker.signal(number)
    assert worker.wait(timeout_s=30) == 0
    log = worker.log_text()
    assert '"during": "start"' in log
    assert '"event": "ready"' not in log
    assert "Traceback" not in log


def _has_loaders(pid: int) -> bool:
    """The loaders are started before torch is imported, which takes longer than the signal."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    return any(b"fork_server_main" in Path(f"/proc/{child}/cmdline").read_bytes() for child in children)
