"""How a client cancels jobs, without a server."""

from __future__ import annotations

from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import msgspec

from shiwu.broker.cancel import CANCEL_CHUNK_SIZE, cancel_steps
from shiwu.broker.retention import Retention
from shiwu.broker.server_clock import server_time_steps
from shiwu.broker.steps import run
from shiwu.contract import Answer, Status
from tests.support.redis_parts import known

LIMITS = Retention(result_ttl_s=200, done_ttl_s=120, dead_length=7)


def test_cancelled_jobs_are_answered_in_portions() -> None:
    """By the clock of each, and with a token of its own; ids that had an answer are left out."""
    calls: list[list[Any]] = []

    def script(*, keys: Any, args: list[Any]) -> list[bytes]:
        assert keys
        calls.append(args)
        return [b"j3"]

    clock = iter([(1, 0), (2, 0), (3, 0)])
    client: Any = SimpleNamespace(register_script=lambda _: script, time=lambda: next(clock))

    def cancel(ids: list[str], reason: str) -> list[str]:
        return run(client, cancel_steps(ids, reason=reason, clock=server_time_steps, limits=lambda: known(LIMITS)))

    ids = [f"j{number}" for number in range(CANCEL_CHUNK_SIZE + 1)]
    assert cancel(ids, "r" * 500) == [job_id for job_id in ids if job_id != "j3"]
    first, second = calls
    assert ((len(first) - 6) // 7, (len(second) - 6) // 7) == (CANCEL_CHUNK_SIZE, 1)
    assert first[:3] == [200, 200, 7], "the mark of an id is kept as long as its answer"
    assert first[11].startswith("cancel.")
    assert first[11] != second[11]
    answer = msgspec.json.decode(second[8], type=Answer)
    assert (answer.status, answer.attempts) == (Status.CANCELLED, 0)
    assert answer.answered_at == datetime.fromtimestamp(2.0, UTC)
    assert answer.error is not None
    assert answer.error.message == f"cancelled by its producer: {'r' * 200}"
    assert second[7].endswith("A"), "the worker that holds the job is notified"
    cancel(["x"], "")
    assert b'cancelled by its producer"' in calls[2][8]
