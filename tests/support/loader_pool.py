"""Real loader processes with their results, for pictures in a folder."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

from shiwu.contract import ErrorInfo
from shiwu_worker.errors import FatalError
from shiwu_worker.loaders.pool import LoaderPool
from shiwu_worker.loaders.protocol import LoaderOptions, LoadResult, LoadTask
from shiwu_worker.policy.access_rules import AccessRules
from shiwu_worker.policy.limits import DecodeLimits, FetchLimits, S3Options, SandboxLimits
from shiwu_worker.stages.decode.image_spec import ImageSpec
from tests.support.family import children
from tests.support.waiting import wait_until

SPEC: Final = ImageSpec(64, 64, "squash", None, 3, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
SLOTS: Final = 32


@dataclass(frozen=True)
class Seen:
    """A result of either type, with None for what it does not have."""

    started_s: float
    fetched_s: float
    decoded_s: float
    n_bytes: int | None = None
    format: str | None = None
    width: int | None = None
    height: int | None = None
    sha256: str | None = None
    error: ErrorInfo | None = None
    detail: str | None = None
    is_final: bool = False
    retry_after_s: float | None = None
    is_untried: bool = False

    @classmethod
    def of(cls, result: LoadResult) -> Self:
        """What a loader reported."""
        known: dict[str, Any] = {field.name: getattr(result, field.name, field.default) for field in fields(cls)}
        return cls(**known)


class Pool:
    """A pool with its results by ticket."""

    def __init__(
        self,
        folder: Path,
        *,
        processes: int,
        spares: int = 0,
        task_timeout_s: float = 20.0,
        memory_bytes: int = 4 * 1024**3,
        environment: dict[str, str] | None = None,
        **options: Any,
    ) -> None:
        self.results: dict[int, Seen] = {}
        self.fatal: list[FatalError] = []
        self._lock = threading.Lock()
        fetch: dict[str, Any] = {
            "max_bytes": 10_000_000,
            "connect_timeout_s": 1.0,
            "read_timeout_s": 20.0,
            "total_timeout_s": 20.0,
        }
        decode: dict[str, Any] = {"max_pixels": 400_000_000, "max_side": 20_000, "formats": ("PNG", "JPEG")}
        sandbox: dict[str, Any] = {"memory_bytes": memory_bytes}
        for limits, kind in ((fetch, FetchLimits), (decode, DecodeLimits), (sandbox, SandboxLimits)):
            names = {field.name for field in fields(kind)}
            limits |= {name: options.pop(name) for name in names & options.keys()}
        loader_options = LoaderOptions(
            **{
                "spec": SPEC,
                "slots": SLOTS,
                "threads": 4,
                "access": AccessRules(allow_hosts=("127.0.0.1",), allow_folders=(folder,)),
                "fetch": FetchLimits(**fetch),
                "s3": S3Options(None, None),
                "decode": DecodeLimits(**decode),
                "is_exact": True,
                "sandbox": SandboxLimits(**sandbox),
            }
            | options
        )
        self.pool = LoaderPool(
            processes=processes,
            spares=spares,
            options=loader_options,
            environment=environment or {},
            task_timeout_s=task_timeout_s,
            on_fatal=self.fatal.append,
        )
        self.pool.subscribe(self._take)

    def _take(self, results: list[LoadResult]) -> None:
        with self._lock:
            for result in results:
                assert result.ticket not in self.results, "reported twice"
                self.results[result.ticket] = Seen.of(result)

    def submit(self, *images: str, first_ticket: int = 0, has_to_be_decoded: bool = False) -> None:
        """One ticket for each image, in slots of the same number."""
        self.pool.submit(
            [
                LoadTask(ticket=first_ticket + n, slot=first_ticket + n, image=i, has_to_be_decoded=has_to_be_decoded)
                for n, i in enumerate(images)
            ]
        )

    def wait(self, count: int) -> None:
        """Wait for this many results."""
        wait_until(lambda: len(self.results) >= count, timeout_s=30)

    def __enter__(self) -> Self:
        self.pool.start()
        self.pool.wait_ready(30.0)
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.close(5.0)

    def peak_bytes(self) -> int:
        """Most memory that one of the running sandboxes has had in RAM so far."""
        peaks = [0]
        for pid in self.pool.pids:
            for sandbox in children(pid):
                found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{sandbox}/status").read_text())
                peaks += [int(found[1]) * 1024] if found else []
        return max(peaks)


@dataclass(frozen=True)
class Found:
    """What became of many files."""

    answers: dict[str, str]
    """Name → the format, or the code of the error."""
    slowest: tuple[float, str]
    """Seconds from its start, and its name."""
    restarts: int
    peak_bytes: int
    took_s: float

    @property
    def counts(self) -> Counter[str]:
        """How many got which answer."""
        return Counter(self.answers.values())


def load_all(paths: Sequence[Path], pool: Pool, *, timeout_s: float) -> Found:
    """Run files through a pool whose folder they lie in, as many at a time as there are slots."""
    began_s = time.monotonic()
    for begin in range(0, len(paths), SLOTS):
        portion = paths[begin : begin + SLOTS]
        tasks = [LoadTask(ticket=begin + n, slot=n, image=path.as_uri()) for n, path in enumerate(portion)]
        pool.pool.submit(tasks)
        left_s = began_s + timeout_s - time.monotonic()
        wanted = begin + len(portion)
        wait_until(partial(lambda wanted: len(pool.results) >= wanted or pool.fatal, wanted), timeout_s=left_s)
    found = {paths[ticket].name: one for ticket, one in pool.results.items()}
    slowest = max(((one.decoded_s - one.fetched_s, name) for name, one in found.items()), default=(0.0, ""))
    answers = {name: str(one.error.code) if one.error else str(one.format) for name, one in found.items()}
    took_s = time.monotonic() - began_s
    return Found(answers, slowest, pool.pool.restarts, pool.peak_bytes(), took_s)
