"""Real workers under a load of JPEGs from files, and the count of their answers."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import redis
from tests.support import drill
from tests.support.pictogram import PICTOGRAM_ZH
from tests.support.processes import WorkerProcess
from tests.support.servers import Valkey
from tests.support.waiting import wait_until

from bench.card.plan import LOADERS
from bench.checkpoints import checkpoint
from bench.photos import jpeg_files
from shiwu.contract import CLAIMS

READY_S: Final = 60.0
ANSWERS_S: Final = 40.0
FAULTY: Final = "tests.support.faulty_worker"


@dataclass(frozen=True)
class Load:
    """A Valkey, images, and the settings of workers.

    Args:
        jobs: sent at a time.
        some: answers after which a worker counts as working.
    """

    url: str
    client: redis.Redis
    folder: Path
    images: tuple[str, ...]
    settings: dict[str, Any]
    jobs: int
    some: int

    def worker(self, name: str, *, fault: str = "", **settings: Any) -> WorkerProcess:
        """A worker that is not started; with a fault, one that `fault` changes later."""
        path = self.folder / f"{name}.fault"
        if fault:
            path.write_text(fault, encoding="utf-8")
        return WorkerProcess(
            redis_url=self.url,
            folder=self.folder,
            name=name,
            module=FAULTY,
            env={"FAULT_FILE": str(path)},
            **(self.settings | settings),
        )

    def fault(self, name: str, kind: str) -> None:
        """Let the device of a running worker have a fault."""
        (self.folder / f"{name}.fault").write_text(kind, encoding="utf-8")

    def send(self, prefix: str) -> list[str]:
        """Send the jobs and return their ids."""
        return drill.enqueue(self.client, self.images, count=self.jobs, prefix=prefix, random_from=random.Random(0))

    def wait_some(self) -> None:
        """Wait until a worker is in the middle of its work."""
        wait_until(lambda: drill.answered(self.client) >= self.some, timeout_s=ANSWERS_S, what="some answers")

    def claims(self) -> int:
        """Jobs that a worker holds, or held when it ended."""
        return int(self.client.hlen(CLAIMS))

    def count(self, ids: list[str]) -> dict[str, Any]:
        """Wait for all answers and count them.

        Raises:
            AssertionError: a job has no answer, two, or another one than tags.
        """
        drill.wait_answered(self.client, ids, timeout_s=ANSWERS_S)
        wait_until(lambda: not self.claims(), timeout_s=ANSWERS_S, what="no claims")
        found = asdict(drill.count(self.client, ids))
        if found["twice"] or found["lost"] or set(found["statuses"]) != {"tagged"}:
            raise AssertionError(f"expected one answer with tags for each job, got {found}")
        return found


@contextmanager
def opened(*, tiny: bool) -> Iterator[Load]:
    """Start a Valkey and make the images; ViT-B/16 on the GPU, or the pictogram model in a rehearsal."""
    files = jpeg_files("512", count=4 if tiny else 64)
    settings: dict[str, Any] = {
        "model": str(PICTOGRAM_ZH if tiny else checkpoint("vit-b-16").folder),
        "allow_folders": str(files[0].parent),
        "loaders": 1 if tiny else LOADERS,
        "max_batch": 8 if tiny else 64,
    }
    with (
        tempfile.TemporaryDirectory(prefix="card-load-") as name,
        Valkey(folder=Path(name) / "valkey") as server,
        server.client(socket_timeout=30) as client,
    ):
        yield Load(
            url=server.url,
            client=client,
            folder=Path(name),
            images=tuple(path.resolve().as_uri() for path in files),
            settings=settings,
            jobs=60 if tiny else 20_000,
            some=5 if tiny else 2_000,
        )
