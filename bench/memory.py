"""Memory in Redis: bytes of a waiting job, and of an answer with its mark and its stream entry.

`python -m bench.memory --jobs 20000`: a real Valkey, real workers with the embedded model, the sample images by `file://`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import redis
from tests.support.processes import ROOT, WorkerProcess
from tests.support.servers import Valkey
from tests.support.waiting import wait_until

from shiwu import Client
from shiwu.broker.chunks import chunks
from shiwu.contract import MARKS, RESULT_STREAM, done_key, result_key

SAMPLES = ROOT / "tests" / "support" / "samples"
REFERENCE = "file://{folder}/{name}"


def _memory(client: redis.Redis) -> int:
    info: Any = client.info("memory")
    return int(info["used_memory"])


def _cpu_s(client: redis.Redis) -> float:
    info: Any = client.info("cpu")
    return float(info["used_cpu_user"]) + float(info["used_cpu_sys"])


def _pending_frees(client: redis.Redis) -> int:
    info: Any = client.info("memory")
    return int(info["lazyfree_pending_objects"])


def _without(client: redis.Redis, keys: list[str]) -> int:
    """Delete these keys; return the bytes that this frees."""
    before = _memory(client)
    for part in chunks(keys, 1000):
        client.delete(*part)
    # Large values are freed by a thread of the server.
    wait_until(lambda: not _pending_frees(client), timeout_s=60)
    return before - _memory(client)


def measure(*, jobs: int, report: Callable[[str], None]) -> None:
    """Enqueue all jobs, let a worker answer them, then delete one kind of key after another."""
    with (
        tempfile.TemporaryDirectory(prefix="shiwu-memory-") as name,
        Valkey(folder=Path(name) / "valkey", config={"appendonly": "yes"}) as server,
        server.client() as client,
    ):
        names = sorted(path.name for path in SAMPLES.glob("*.jpg"))
        references = [REFERENCE.format(folder=SAMPLES, name=names[number % len(names)]) for number in range(jobs)]
        empty = _memory(client)
        with Client(server.url) as producer:
            ids = list(producer.enqueue_many(references, lane="bulk"))
        report(f"waiting: {(_memory(client) - empty) / jobs:.0f} bytes a job")
        cpu_s = _cpu_s(client)
        settings = {
            "SHIWU_MODEL": "",  # the embedded one
            "SHIWU_ALLOW_FOLDERS": str(SAMPLES),
            "SHIWU_LOG_LEVEL": "warning",
            "SHIWU_TORCH_THREADS": "0",
        }
        with WorkerProcess(redis_url=server.url, folder=Path(name), env=settings) as worker:
            worker.wait_ready()
            wait_until(lambda: client.xlen(RESULT_STREAM) >= jobs, timeout_s=3600, every_s=0.5)
        report(f"server: {(_cpu_s(client) - cpu_s) / jobs * 1e6:.0f} µs of CPU a job, with an append-only file")
        report(f"answered: {(_memory(client) - empty) / jobs:.0f} bytes a job, of which")
        sample: Any = client.get(result_key(ids[0]))
        report(f"  one answer as JSON: {len(sample)} bytes")
        for what, keys in (
            ("the stream", [RESULT_STREAM]),
            ("answers under their keys", [result_key(each) for each in ids]),
            ("marks of answered ids", [*MARKS, *(done_key(each) for each in ids)]),
        ):
            report(f"  {what}: {_without(client, keys) / jobs:.0f}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=20_000)
    measure(jobs=parser.parse_args().jobs, report=lambda text: print(text, flush=True))


if __name__ == "__main__":
    main()
