"""`make drill`: kill workers for many rounds and count every answer. Exit code 0 only when the promise held."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import redis

from shiwu.contract import CLAIMS
from tests.support import drill, pictures
from tests.support.servers import Valkey, WorkerProcess
from tests.support.waiting import wait_until

LEASE_S = 3


def _answered(client: redis.Redis, count: int) -> bool:
    return drill.answered(client) >= count


def _held(client: redis.Redis, worker: WorkerProcess) -> int:
    records: Any = client.hvals(CLAIMS)
    return sum(record.startswith(f"{worker.name}.".encode()) for record in records)


def _nothing_held(client: redis.Redis, worker: WorkerProcess) -> bool:
    return not _held(client, worker)


def main() -> None:
    """Run the rounds and print what was sent, answered, answered twice, lost, and how fast a death was noticed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=2000, help="enqueued in each round")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    asked = parser.parse_args()
    chance = random.Random(asked.seed)
    print(f"seed {asked.seed}, lease {LEASE_S} s, {asked.rounds} rounds of {asked.jobs} jobs")
    with tempfile.TemporaryDirectory() as name, Valkey(folder=Path(name) / "valkey") as server:
        folder = Path(name)
        images = []
        for sample in pictures.samples()[:10]:
            path = folder / f"{sample.path.stem}.png"
            path.write_bytes(pictures.png(pictures.picture(sample.label).resize((64, 64))))
            images.append(path.as_uri())
        options = {"allow_folders": folder, "lease_s": LEASE_S, "slots": asked.jobs, "log_level": "warning"}
        ids: list[str] = []
        recoveries: list[float] = []

        def start(number: int) -> WorkerProcess:
            worker = WorkerProcess(redis_url=server.url, folder=folder, name=f"w{number}", **options)
            return stack.enter_context(worker).wait_ready()

        with ExitStack() as stack, server.client() as client:
            victim = start(0)
            for number in range(1, asked.rounds + 1):
                survivor = start(number)
                seen = drill.answered(client)
                sent = drill.enqueue(client, images, count=asked.jobs, prefix=f"r{number}", random_from=chance)
                ids += sent
                after = chance.randrange(1, asked.jobs // 2)
                wait_until(partial(_answered, client, seen + after), timeout_s=60, every_s=0.005)
                victim.kill()
                killed_s, held = time.monotonic(), _held(client, victim)
                wait_until(partial(_nothing_held, client, victim), timeout_s=LEASE_S + 10)
                recoveries.append(time.monotonic() - killed_s)
                drill.wait_answered(client, sent, timeout_s=120)
                print(f"round {number}: killed after {after}, {held} claimed, taken back {recoveries[-1]:.2f} s later")
                victim = survivor
            result = drill.count(client, ids)
    print(result)
    print(f"taken over after at most {max(recoveries):.2f} s (promised: one lease + 2 s = {LEASE_S + 2} s)")
    sys.exit(0 if result.lost == result.twice == 0 and max(recoveries) <= LEASE_S + 2 else 1)


if __name__ == "__main__":
    main()
