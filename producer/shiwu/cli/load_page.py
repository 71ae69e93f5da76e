"""How much work there is, as JSON over HTTP: for an autoscaler that must see all shards of a cluster as one number."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pydantic_core import to_json

from shiwu.contract import Lane

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    from shiwu.broker.queue_stats import QueueState
    from shiwu.client.shard_states import ShardState

MAX_AGE_S: Final = 60.0
"""A shard that has been unavailable for longer is not counted; without any shard there is no number."""


@dataclass(frozen=True, slots=True)
class _Counted:
    state: QueueState
    at_s: float


class LoadPage:
    """A WSGI application: `/load`, and `/metrics` where there is an application for it. Thread-safe.

    While a shard is unavailable its last sizes count for a minute, so that a short failure removes no worker. When no
    shard has sizes the reply is 503, and KEDA follows its `fallback`.

    Args:
        metrics: answers `/metrics`.
        clock: gives monotonic seconds.
    """

    def __init__(self, *, metrics: WSGIApplication | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._metrics = metrics
        self._clock = clock
        self._counted: dict[int, _Counted] = {}
        self._away = 0

    def update(self, shards: Sequence[ShardState]) -> None:
        """Take the sizes of all shards; those of an unavailable one stay as they were."""
        now_s = self._clock()
        found = {shard.index: _Counted(shard.state, now_s) for shard in shards if shard.state is not None}
        kept = {index: each for index, each in self._counted.items() if now_s - each.at_s < MAX_AGE_S}
        self._counted, self._away = kept | found, len(shards) - len(found)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer one request."""
        path = environ.get("PATH_INFO", "")
        if path == "/metrics" and self._metrics is not None:
            return self._metrics(environ, start_response)
        if path != "/load":
            return _reply(start_response, "404 Not Found", {"error": "expected /load or /metrics"})
        now_s = self._clock()
        states = [each.state for each in self._counted.values() if now_s - each.at_s < MAX_AGE_S]
        if not states:
            return _reply(start_response, "503 Service Unavailable", {"error": "Redis is unavailable"})
        return _reply(start_response, "200 OK", _load(states) | {"shards_away": self._away})


def _load(states: Sequence[QueueState]) -> dict[str, int]:
    waiting = {lane: sum(state.waiting[lane] for state in states) for lane in Lane}
    held = sum(sum(state.claimed.values()) + state.quarantined for state in states)
    return {
        "jobs": sum(waiting.values()) + held,
        "interactive": waiting[Lane.INTERACTIVE],
        "bulk": waiting[Lane.BULK],
        "held": held,
        "delayed": sum(state.delayed for state in states),
        "workers": len({name for state in states for name in state.workers}),
    }


def _reply(start_response: StartResponse, status: str, body: object) -> Iterable[bytes]:
    data = to_json(body)
    start_response(status, [("Content-Type", "application/json"), ("Content-Length", str(len(data)))])
    return [data]
