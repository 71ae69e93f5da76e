"""Drills in which Redis is unavailable for long: behind a black hole, refusing, loading or hanging."""

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

from drill.drill_run import DrillRun, Outcome, wrong

RESUME_AFTER_HOLE_S: Final = 10.0
"""Promised: work goes on this long after a black hole ends, because some time-outs must pass first."""
RESUME_S: Final = 3.0
"""Promised: work goes on this long after Redis is available again."""
MAX_WAITING_CPU: Final = 0.05
"""CPU seconds per second that a waiting worker and its loaders may use."""
OUTAGES: Final = ("refused", "loading", "hung")
FILLER: Final = 300
FILLER_BYTES: Final = 1100
"""Longer than the 1024 bytes of data after which a loading server answers its clients."""


def hole(run: DrillRun) -> Outcome:
    """The network swallows all packets to and from Redis; afterwards the worker goes on."""
    proxy: FaultProxy = run.enter(FaultProxy(run.url))
    worker = run.start_worker(url=proxy.url)
    for _ in range(run.rounds):
        base = len(run.sent)
        run.enqueue(run.jobs)
        run.wait_answers(base + run.rng.randrange(1, max(2, run.jobs // 3)))
        proxy.black_hole()
        _pass(run.lasts_s, worker)
        # Jobs in flight may be answered by replies from before the hole; any more answers need new connections.
        more = min(base + run.jobs, run.answered() - run.answered_before + len(run.held(worker)) + 1)
        proxy.heal()
        run.time_until(partial(lambda more: run.answered() - run.answered_before >= more, more), timeout_s=60)
        run.wait_answers(base + run.jobs)
    outcome = run.finish("hole", promised_s=RESUME_AFTER_HOLE_S, notes=f"{run.lasts_s:g} s each")
    return outcome if worker.is_running else wrong(outcome, f"the worker ended with {worker.exit_code}")


def away(run: DrillRun) -> Outcome:
    """Redis refuses, loads and hangs, each for a third of the time: the worker neither exits nor uses CPU."""
    server: RedisServer = run.server
    worker = run.start_worker()
    with run.client.pipeline(transaction=False) as pipe:
        for number in range(FILLER):
            pipe.set(f"filler-{number}", run.rng.randbytes(FILLER_BYTES))
        pipe.execute()
    shares: dict[str, float] = {}
    for _ in range(run.rounds):
        for kind in OUTAGES:
            base = len(run.sent)
            run.enqueue(run.jobs)
            run.wait_answers(base + run.rng.randrange(1, max(2, run.jobs // 2)))
            share = _interrupt_redis(server, worker, kind, run.lasts_s / len(OUTAGES))
            shares[kind] = max(share, shares.get(kind, 0.0))
            # A quick worker may have answered every job before the interruption.
            enough = min(run.answered() + 1, run.answered_before + base + run.jobs)
            run.time_until(partial(lambda enough: run.answered() >= enough, enough), timeout_s=60)
            run.wait_answers(base + run.jobs)
    cpu_text = ", ".join(f"{kind} {share:.1%}" for kind, share in shares.items())
    outcome = run.finish("away", promised_s=RESUME_S, notes=f"{run.lasts_s:g} s in all; CPU while waiting: {cpu_text}")
    if any(share > MAX_WAITING_CPU for share in shares.values()):
        outcome = wrong(outcome, f"it used CPU while Redis was unavailable: {cpu_text}")
    return outcome if worker.is_running else wrong(outcome, f"the worker ended with {worker.exit_code}")


def _interrupt_redis(server: RedisServer, worker: WorkerProcess, kind: str, seconds: float) -> float:
    """Make Redis unavailable for a time; return the worker's CPU per second once its jobs in flight are done."""
    if kind == "hung":
        server.pause()
    elif kind == "refused":
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
    if kind == "loading":
        wait_until(lambda: _is_loaded(server), timeout_s=10 * seconds, every_s=0.2, what="the data to be loaded")
    else:
        _pass(seconds * 2 / 3, worker)
    share = (cpu_s(pids) - before_s) / (time.monotonic() - began_s)
    if kind == "hung":
        server.resume()
    elif kind == "refused":
        server.start()
    return share


def _pass(seconds: float, worker: WorkerProcess) -> None:
    """Wait for so many seconds, or until the worker exits."""
    until_s = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() >= until_s or not worker.is_running, timeout_s=seconds + 10, every_s=0.05)


def _compacted(server: RedisServer) -> int:
    """Rewrite the append-only file, so that it holds only the keys; return how many."""
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
