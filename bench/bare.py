"""The model alone: prepared pixels through the service's own encoder in a loop, and scored, with nothing around it.

`python -m bench.bare` reads the worker's settings from its environment, and then lines from its input: for each, a
number of seconds, it runs every batch size for a part of them and prints what it found as JSON. So it has no threads in
the benchmark's process, and can take turns with a service.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from queue import Empty, SimpleQueue
from threading import Thread
from typing import IO, Any, Final

import numpy as np
from tests.support.processes import clean_environment

from bench.celery_app import WORDS
from bench.report import median
from shiwu_worker.checkpoints.model_files import model_folder
from shiwu_worker.runtime.cpus import usable_cores
from shiwu_worker.stages.decode.image_spec import ImageSpec, read_image_spec

LEAST_TIMES: Final = 2
START_S: Final = 600.0
"""A large model with many batch sizes, compiled."""
PATIENCE: Final = 20
"""Times as long as asked for, that it may take: its slowest batch runs twice at least."""


@dataclass(frozen=True, slots=True)
class BatchSizeRate:
    """One batch size."""

    size: int
    batch_ms: float
    """From pixels in the host's memory to vectors there, one batch alone; the median."""
    per_second: float
    """Pictures a second of batches that follow each other."""
    seconds: float
    """That the rate was measured for."""


@dataclass(frozen=True, slots=True)
class Bare:
    """What the model alone does."""

    dtype: str
    device: str
    threads: int
    start_s: float
    """From the process's import of torch to a warm model."""
    rungs: tuple[BatchSizeRate, ...]

    @property
    def best(self) -> BatchSizeRate:
        """The batch size with the most images per second."""
        return max(self.rungs, key=lambda rate: rate.per_second)

    @property
    def full(self) -> BatchSizeRate:
        """The largest batch size."""
        return self.rungs[-1]


class Alone:
    """The process with the model; it works while it is asked, and waits else."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._lines: SimpleQueue[str] = SimpleQueue()
        Thread(target=self._listen, args=(process.stdout,), daemon=True).start()

    def _listen(self, lines: IO[str]) -> None:
        for line in lines:
            self._lines.put(line)
        self._lines.put("")

    def ask(self, seconds: float) -> Bare:
        """Run all its batch sizes, for about so many seconds together.

        Raises:
            RuntimeError: it ended, or took far longer.
        """
        if self._process.stdin is None or self._process.poll() is not None:
            raise RuntimeError(f"expected the model to run, it ended with {self._process.returncode}")
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        try:
            line = self._lines.get(timeout=START_S + PATIENCE * seconds)
        except Empty:
            raise RuntimeError(f"expected the model to run for {seconds:g} s, it takes far longer") from None
        if not line:
            raise RuntimeError(f"expected the model to run, it ended with {self._process.wait(10)}")
        found = json.loads(line)
        return Bare(**(found | {"rungs": tuple(BatchSizeRate(**rate) for rate in found["rungs"])}))


@contextmanager
def opened(env: Mapping[str, str], *, largest: int) -> Iterator[Alone]:
    """The model of the worker that this environment describes, with all cores. It starts at once, and is then asked.

    Args:
        largest: the largest batch that the worker made; the next power of two is the largest batch size here.
    """
    max_batch = 1 << (largest - 1).bit_length()
    own = {
        "SHIWU_TORCH_THREADS": str(usable_cores()),
        **env,
        "SHIWU_MAX_BATCH": str(max_batch),
        "SHIWU_LOG_LEVEL": "warning",
    }
    command = [sys.executable, "-m", "bench.bare"]
    process = subprocess.Popen(
        command, env=clean_environment(own), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield Alone(process)
    finally:
        process.kill()
        process.wait(10)


def measure(env: Mapping[str, str], *, largest: int, seconds: float) -> Bare:
    """`opened`, asked once."""
    with opened(env, largest=largest) as alone:
        return alone.ask(seconds)


def together(turns: Sequence[Bare]) -> Bare:
    """All turns as one: rates over the sum of their seconds, medians of their medians."""
    rungs = []
    for its in zip(*(one.rungs for one in turns), strict=True):
        seconds = sum(one.seconds for one in its)
        pictures = sum(one.per_second * one.seconds for one in its)
        rungs.append(BatchSizeRate(its[0].size, median([one.batch_ms for one in its]), pictures / seconds, seconds))
    first = turns[0]
    return Bare(first.dtype, first.device, first.threads, first.start_s, tuple(rungs))


def loop(encoder: Any, spec: ImageSpec, batch_size: int, *, seconds: float) -> BatchSizeRate:
    """One batch size of a warm encoder: the median time of a batch alone, and the rate of many in a row."""
    labels = encoder.encode_texts(list(WORDS))
    batch = np.random.default_rng(0).integers(0, 256, (batch_size, spec.height, spec.width, 3), np.uint8)
    alone_s = median(_times(lambda: encoder.encode(batch) @ labels.T, seconds / 4))
    flights = deque([encoder.launch(batch)])

    def overlapped() -> None:
        # As the service does: the next batch is on its way to the device before this one's vectors are read.
        flights.append(encoder.launch(batch))
        encoder.collect(flights.popleft()) @ labels.T

    began_s = time.monotonic()
    batches = len(_times(overlapped, seconds))
    overlapped_s = time.monotonic() - began_s
    encoder.collect(flights.popleft())
    return BatchSizeRate(batch_size, alone_s * 1000, batches * batch_size / overlapped_s, overlapped_s)


def _times(work: Callable[[], object], seconds: float) -> list[float]:
    """Do it for so long, a few times at least; seconds of each."""
    took: list[float] = []
    until_s = time.monotonic() + seconds
    while len(took) < LEAST_TIMES or time.monotonic() < until_s:
        began_s = time.perf_counter()
        work()
        took.append(time.perf_counter() - began_s)
    return took


def main() -> None:
    """Load the model as the environment says, and measure whenever a line asks for it."""
    began_s = time.monotonic()
    import torch  # noqa: PLC0415 so that the start is measured with it

    from shiwu_worker.config.settings import Settings  # noqa: PLC0415
    from shiwu_worker.service.model import load_encoder  # noqa: PLC0415

    settings = Settings()
    folder = model_folder(settings.model)
    spec = read_image_spec(folder)
    encoder = load_encoder(settings, folder, spec)
    start_s = time.monotonic() - began_s
    for line in sys.stdin:
        seconds = float(line) / len(encoder.batch_sizes)
        rungs = tuple(loop(encoder, spec, size, seconds=seconds) for size in encoder.batch_sizes)
        found = Bare(encoder.info.dtype, encoder.info.device, torch.get_num_threads(), start_s, rungs)
        print(json.dumps(asdict(found)), flush=True)


if __name__ == "__main__":
    main()
