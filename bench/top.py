"""CPU time of `shiwu top` beside a busy queue: `python -m bench.top [--jobs N] [--seconds S]`.

A stand-in worker answers a full lane while `shiwu top` runs in a terminal of 80x24 and of 200x50. Prints a JSON line
for each: CPU seconds of the process over the time, as a share of one core, and the answers each second meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import redis
from tests.support.servers import Valkey
from tests.support.terminals import Terminal
from tests.support.waiting import wait_until

from bench import machine, usage
from bench.workers import Answerer
from shiwu import Client
from shiwu.contract import COUNTERS, Lane

SIZES = ((80, 24), (200, 50))


def main() -> None:
    """Measure in each size."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=300_000, help="waiting at the beginning of each measurement")
    parser.add_argument("--seconds", type=float, default=20.0)
    asked = parser.parse_args()
    about = machine.describe()
    print(json.dumps({"cpu": about.cpu, "cores": about.cores, "load_before": about.load_before}))
    for columns, rows in SIZES:
        with tempfile.TemporaryDirectory() as folder, Valkey(folder=Path(folder)) as server:
            print(json.dumps(measure(server, Path(folder), asked, columns=columns, rows=rows)))


def measure(server: Valkey, folder: Path, asked: argparse.Namespace, *, columns: int, rows: int) -> dict[str, Any]:
    """Fill the lane, start the worker and the view, and count."""
    with Client(server.url, max_waiting=2 * asked.jobs) as producer:
        for _ in producer.enqueue_many((f"s3://pictures/{n}.jpg" for n in range(asked.jobs)), lane="bulk"):
            pass
    command = [sys.executable, "-m", "bench.standin", "--redis-url", server.url]
    shiwu = [sys.executable, "-m", "shiwu.cli", "--redis-url", server.url, "top"]
    with (
        Answerer(command, name="standin", folder=folder, env={}) as worker,
        server.client() as client,
        Terminal(shiwu, columns=columns, rows=rows) as view,
    ):
        worker.wait_ready()
        view.wait_for("1 lane")
        wait_until(lambda: answered(client) > 0, timeout_s=30, what="the first answer")
        before, cpu_before_s, began_s = answered(client), usage.cpu_s([view.pid]), time.monotonic()
        while time.monotonic() - began_s < asked.seconds:
            view.read()
            time.sleep(0.05)  # reads as a terminal does
        seconds = time.monotonic() - began_s
        cpu_s, jobs = usage.cpu_s([view.pid]) - cpu_before_s, answered(client) - before
        left = sum(client.llen(key) for key in Lane.BULK.keys)
    return {
        "terminal": f"{columns}x{rows}",
        "seconds": round(seconds, 1),
        "cpu_s": round(cpu_s, 3),
        "share_of_a_core": round(cpu_s / seconds, 4),
        "answers_per_s": round(jobs / seconds),
        "waiting_at_the_end": left,
        "load_average": os.getloadavg()[0],
    }


def answered(client: redis.Redis) -> int:
    """Answers so far."""
    return int(client.hget(COUNTERS, "answered") or 0)


if __name__ == "__main__":
    main()
