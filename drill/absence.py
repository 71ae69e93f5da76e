"""Drills in which Redis is away for long: behind a black hole, or for minutes in every way in which it can be away."""

from __future__ import annotations

import time
from functools import partial
from typing import Final

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from tests.support.family import cpu_s, family
from tests.support.fault_proxy import FaultProxy
from tests.support.processes import WorkerProcess
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until

from drill.field import Field, Outcome, wrong

HEALED_S: Final = 10.0
"""Promised: work goes on this long after a black hole has healed, for some time-outs have to end first."""
BACK_S: Final = 3.0
"""The same after Redis is back."""
SPINS: Final = 0.05
"""CPU of a worker and its loaders, per second of the clock, that is too much for waiting."""
MOODS: Final = ("refused", "loading", "hung")
BALLAST: Final = 300
BALLAST_BYTES: Final = 1100
"""Longer than the 1024 bytes of data after which a loading server answers its clients."""


def hole(field: Field) -> Outcome:
    """The way to Redis swallows everything, both ways and without a reset; when it heals the worker goes on."""
    proxy: FaultProxy = field.enter(FaultProxy(field.url))
    worker = field.worker(url=proxy.url)
    for _ in range(field.rounds):
        base = len(field.sent)
        field.enqueue(field.jobs)
        field.wait_answers(base + field.chance.randrange(1, max(2, field.jobs // 3)))
        proxy.black_hole()
        _pass(field.lasts_s, worker)
        # What it had in hand may be answered by what the hole had swallowed; more than that needs new connections.
        more = min(base + field.jobs, field.answered() - field.answered_before + len(field.held(worker)) + 1)
        proxy.heal()
        field.time_until(partial(lambda more: field.answered() - field.answered_before >= more, more), timeout_s=60)
        field.wait_answers(base + field.jobs)
    outcome = field.finish("hole", promised_s=HEALED_S, notes=f"{field.lasts_s:g} s each")
    return outcome if worker.is_running else wrong(outcome, f"the worker ended with {worker.exit_code}")


def away(field: Field) -> Outcome:
    """Redis refuses, loads its data, and hangs, each for a third of the time: the worker neither ends nor spins."""
    server: RedisServer = field.server
    worker = field.worker()
    with field.client.pipeline(transaction=False) as pipe:
        for number in range(BALLAST):
            pipe.set(f"ballast-{number}", field.chance.randbytes(BALLAST_BYTES))
        pipe.execute()
    shares: dict[str, float] = {}
    for _ in range(field.rounds):
        for mood in MOODS:
            base = len(field.sent)
            field.enqueue(field.jobs)
            field.wait_answers(base + field.chance.randrange(1, max(2, field.jobs // 2)))
            share = _be_away(server, worker, mood, field.lasts_s / len(MOODS))
            shares[mood] = max(share, shares.get(mood, 0.0))
            before = field.answered()
            field.time_until(partial(lambda before: field.answered() > before, before), timeout_s=60)
            field.wait_answers(base + field.jobs)
    told = ", ".join(f"{mood} {share:.1%}" for mood, share in shares.items())
    outcome = field.finish("away", promised_s=BACK_S, notes=f"{field.lasts_s:g} s in all; CPU meanwhile: {told}")
    if any(share > SPINS for share in shares.values()):
        outcome = wrong(outcome, f"it spins: CPU while Redis was away: {told}")
    return outcome if worker.is_running else wrong(outcome, f"the worker ended with {worker.exit_code}")


def _be_away(server: RedisServer, worker: WorkerProcess, mood: str, seconds: float) -> float:
    """Let Redis be away and come back; the worker's CPU meanwhile, per second, once it has done what it had in hand."""
    if mood == "hung":
        server.pause()
    elif mood == "refused":
        server.kill()
    else:
        delay_us = int(seconds * 1e6 / _compacted(server))
        server.kill()
        server.config["key-load-delay"] = str(delay_us)
        server.start(is_loading_enough=True)
        server.config["key-load-delay"] = "0"
    _pass(seconds / 3, worker)
    pids, began_s = family(worker.pid), time.monotonic()
    before_s = cpu_s(pids)
    if mood == "loading":
        wait_until(lambda: _is_loaded(server), timeout_s=10 * seconds, every_s=0.2, what="the data to be loaded")
    else:
        _pass(seconds * 2 / 3, worker)
    share = (cpu_s(pids) - before_s) / (time.monotonic() - began_s)
    if mood == "hung":
        server.resume()
    elif mood == "refused":
        server.start()
    return share


def _pass(seconds: float, worker: WorkerProcess) -> None:
    """Let time pass while the worker lives."""
    until_s = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() >= until_s or not worker.is_running, timeout_s=seconds + 10, every_s=0.05)


def _compacted(server: RedisServer) -> int:
    """Write the append-only file anew, so that it holds keys and no history; how many keys."""
    with server.client() as client:
        client.bgrewriteaof()
        wait_until(lambda: not client.info("persistence")["aof_rewrite_in_progress"], timeout_s=30)
        return int(client.dbsize())


def _is_loaded(server: RedisServer) -> bool:
    try:
        with server.client(retry=Retry(NoBackoff(), 0), socket_timeout=2.0) as client:
            return bool(client.ping())
    except (redis.ConnectionError, redis.TimeoutError):
        return False
