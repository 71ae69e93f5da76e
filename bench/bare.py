"""The model alone: prepared pixels go through the service's encoder in a loop and are scored, without the service.

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
from shiwu_worker.telemetry import logs

MIN_REPEATS: Final = 2
START_S: Final = 600.0
"""Enough for a large model with many batch sizes, compiled."""
SLACK_FACTOR: Final = 20
"""It may take so many times the time asked for, because its slowest batch runs at least twice."""


@dataclass(frozen=True, slots=True)
class BatchSizeRate:
    """Figures of one batch size."""

    size: int
    batch_ms: float
    """Median time of one batch alone, from pixels in host memory to vectors in host memory."""
    per_second: float
    """Images per second of batches in a row."""
    seconds: float
    """Duration of the measurement of the rate."""


@dataclass(frozen=True, slots=True)
class Bare:
    """Figures of the model alone."""

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
    """The process with the model; it works on request and waits otherwise."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._lines: SimpleQueue[str] = SimpleQueue()
        Thread(target=self._listen, args=(process.stdout,), daemon=True).start()

    def _listen(self, lines: IO[str]) -> None:
        for line in lines:
            self._lines.put(line)
        self._lines.put("")

    def ask(self, seconds: float) -> Bare:
        """Run all batch sizes, for about `seconds` in total.

        Raises:
            RuntimeError: the process ended, or took far longer.
        """
        if self._process.stdin is None or self._process.poll() is not None:
            raise RuntimeError(f"expected the model to run, it ended with {self._process.returncode}")
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        try:
            line = self._lines.get(timeout=START_S + SLACK_FACTOR * seconds)
        except Empty:
            raise RuntimeError(f"expected the model to run for {seconds:g} s, it takes far longer") from None
        if not line:
            raise RuntimeError(f"expected the model to run, it ended with {self._process.wait(10)}")
        found = json.loads(line)
        return Bare(**(found | {"rungs": tuple(BatchSizeRate(**rate) for rate in found["rungs"])}))


@contextmanager
def opened(env: Mapping[str, str], *, largest: int) -> Iterator[Alone]:
    """Start the model of the worker that this environment describes, with all cores, and yield it.

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
    """Start the model, measure once, and end it."""
    with opened(env, largest=largest) as alone:
        return alone.ask(seconds)


def together(turns: Sequence[Bare]) -> Bare:
    """Combine all turns: rates over the sum of their seconds, medians of their medians."""
    rungs = []
    for rates in zip(*(turn.rungs for turn in turns), strict=True):
        seconds = sum(rate.seconds for rate in rates)
        pictures = sum(rate.per_second * rate.seconds for rate in rates)
        rungs.append(
            BatchSizeRate(rates[0].size, median([rate.batch_ms for rate in rates]), pictures / seconds, seconds)
        )
    first = turns[0]
    return Bare(first.dtype, first.device, first.threads, first.start_s, tuple(rungs))


def loop(encoder: Any, spec: ImageSpec, batch_size: int, *, seconds: float) -> BatchSizeRate:
    """Measure one batch size of a warm encoder: the median time of a batch alone, and the rate of many in a row."""
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
    """Call `work` for about `seconds`, a few times at least; return the seconds of each call."""
    took: list[float] = []
    until_s = time.monotonic() + seconds
    while len(took) < MIN_REPEATS or time.monotonic() < until_s:
        began_s = time.perf_counter()
        work()
        took.append(time.perf_counter() - began_s)
    return took


def main() -> None:
    """Load the model that the environment names, and measure once for each input line."""
    began_s = time.monotonic()
    import torch  # noqa: PLC0415 so that the start is measured with it

    from shiwu_worker.config.settings import Settings  # noqa: PLC0415 torch, only in the process that measures
    from shiwu_worker.service.model import load_encoder  # noqa: PLC0415 torch, only in the process that measures

    settings = Settings()
    # To standard error: standard output has the results only.
    logs.set_up(level=settings.log_level, form="json")
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
