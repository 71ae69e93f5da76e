"""The state that a worker tells of itself, in Redis."""

from __future__ import annotations

import redis

from shiwu.broker.worker_state import TTL_MS, WorkerState, read_worker_states, write_worker_state
from shiwu.contract import WORKER_STATE
from tests.conftest import StartWorker
from tests.support.waiting import wait_until


def test_state_expires_and_replaces_any_value(redis_client: redis.Redis) -> None:
    """Also one of a wrong type, which another program wrote."""
    redis_client.lpush(f"{WORKER_STATE}w", "x")
    write_worker_state(redis_client, "w", WorkerState(version="1", images_per_s=2.5))
    assert 0 < redis_client.pttl(f"{WORKER_STATE}w") <= TTL_MS
    assert read_worker_states(redis_client, ["w"]) == {"w": WorkerState(version="1", images_per_s=2.5)}


def test_unreadable_states_are_left_out(redis_client: redis.Redis) -> None:
    """Of a wrong type, of another form, or gone; fields that are unknown are ignored."""
    redis_client.lpush(f"{WORKER_STATE}list", "x")
    redis_client.set(f"{WORKER_STATE}text", "x")
    redis_client.set(f"{WORKER_STATE}newer", '{"version": "2", "colour": "red"}')
    names = ["list", "text", "newer", "gone"]
    assert read_worker_states(redis_client, names) == {"newer": WorkerState(version="2")}
    assert read_worker_states(redis_client, []) == {}


def test_running_worker_tells_what_it_is(start_worker: StartWorker, redis_url: str, redis_client: redis.Redis) -> None:
    """A real one."""
    start_worker(redis_url=redis_url, loaders=1, loader_spares=0, max_batch=4, name="host-1")
    wait_until(lambda: read_worker_states(redis_client, ["host-1"]), timeout_s=10, what="the state of the worker")
    state = read_worker_states(redis_client, ["host-1"])["host-1"]
    assert (state.model, state.device, state.loaders, state.in_flight) == ("pictogram_zh", "cpu", 1, 0)
    assert state.labels == "six-zh"
    assert len(state.labels_digest) > 8
    assert 0 < state.max_batch <= 4 <= state.slots
    assert state.memory_bytes > 50 << 20
