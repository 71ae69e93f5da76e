"""`make drill`: kill workers for many rounds and count every answer. Exit code 0 only when the promise held."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.support import drill, pictures
from tests.support.servers import Valkey, WorkerProcess
from tests.support.waiting import wait_until

LEASE_S = 3


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
        with server.client() as client:
            worker = WorkerProcess(redis_url=server.url, folder=folder, name="first", **options).start().wait_ready()
            for number in range(asked.rounds):
                spare = WorkerProcess(redis_url=server.url, folder=folder, name=f"spare{number}", **options)
                with spare.start().wait_ready():
                    seen = drill.answered(client)
                    ids += drill.enqueue(client, images, count=asked.jobs, prefix=f"r{number}", random_from=chance)
                    threshold = seen + chance.randrange(1, asked.jobs // 2)
                    wait_until(lambda t=threshold: drill.answered(client) >= t, timeout_s=60, every_s=0.005)  # type: ignore[misc]
                    before = drill.tokens(client)
                    worker.kill()
                    killed_s = time.monotonic()
                    wait_until(
                        lambda b=before: len(drill.tokens(client) & b) < 2 or len(b) < 2,  # type: ignore[misc]
                        timeout_s=LEASE_S + 10,
                        every_s=0.02,
                    )
                    recoveries.append(time.monotonic() - killed_s if len(before) > 1 else 0.0)
                    drill.wait_answered(client, ids[-asked.jobs :], timeout_s=120)
                    print(f"round {number + 1}: killed after {threshold - seen}, taken over in {recoveries[-1]:.2f} s")
                    worker.stop()
                    worker = (
                        WorkerProcess(redis_url=server.url, folder=folder, name=f"next{number}", **options)
                        .start()
                        .wait_ready()
                    )
            worker.stop()
            result = drill.count(client, ids)
    print(result)
    print(f"taken over after at most {max(recoveries):.2f} s (promised: one lease + 2 s = {LEASE_S + 2} s)")
    sys.exit(0 if result.lost == result.twice == 0 and max(recoveries) <= LEASE_S + 2 else 1)


if __name__ == "__main__":
    main()
