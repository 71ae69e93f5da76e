"""The model alone: prepared pixels through the service's own encoder in a loop, and scored, with nothing around it.

`python -m bench.bare SECONDS` reads the worker's settings from its environment and prints JSON; `measure` runs that in
a process of its own, so that it has the whole machine and leaves no threads behind.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from tests.support.processes import clean_environment

from bench.celery_app import WORDS
from bench.machine import cores
from bench.report import median
from shiwu_worker.image_spec import ImageSpec, read_image_spec
from shiwu_worker.models import model_folder

LEAST_TIMES: Final = 2


@dataclass(frozen=True, slots=True)
class Rung:
    """One batch size."""

    size: int
    batch_ms: float
    """From pixels in the host's memory to vectors there, one batch alone."""
    per_second: float
    """Pictures a second of batches that follow each other."""


@dataclass(frozen=True, slots=True)
class Bare:
    """What the model alone does."""

    dtype: str
    device: str
    threads: int
    start_s: float
    """From the process's import of torch to a warm model."""
    rungs: tuple[Rung, ...]

    @property
    def best(self) -> Rung:
        """The rung with the most pictures a second."""
        return max(self.rungs, key=lambda rung: rung.per_second)

    @property
    def full(self) -> Rung:
        """The largest rung."""
        return self.rungs[-1]


def measure(env: Mapping[str, str], *, largest: int, seconds: float) -> Bare:
    """Measure every rung of the worker that this environment describes, with all cores; about so long in all.

    Args:
        largest: the largest batch that the worker was seen to make; the next power of two is the largest rung.
    """
    rung = 1 << (largest - 1).bit_length()
    own = {"SHIWU_TORCH_THREADS": str(cores()), **env, "SHIWU_MAX_BATCH": str(rung)}
    command = [sys.executable, "-m", "bench.bare", str(seconds)]
    done = subprocess.run(
        command, env=clean_environment(own), capture_output=True, text=True, timeout=600 + 20 * seconds, check=False
    )
    if done.returncode:
        raise RuntimeError(f"expected the model to run, it ended with {done.returncode}:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return Bare(**(found | {"rungs": tuple(Rung(**one) for one in found["rungs"])}))


def loop(encoder: Any, spec: ImageSpec, rung: int, *, seconds: float) -> Rung:
    """One batch size of a warm encoder: the median time of a batch alone, and the rate of many in a row."""
    labels = encoder.encode_texts(list(WORDS))
    batch = np.random.default_rng(0).integers(0, 256, (rung, spec.height, spec.width, 3), np.uint8)
    alone_s = median(_times(lambda: encoder.encode(batch) @ labels.T, seconds))
    flights = deque([encoder.launch(batch)])
    if not flights[0].is_under_way:  # a CPU: nothing overlaps, and the rate is that of a batch alone
        encoder.collect(flights.popleft())
        return Rung(rung, alone_s * 1000, rung / alone_s)

    def overlapped() -> None:
        # As the service does: the next batch is on its way to the device before this one's vectors are read.
        flights.append(encoder.launch(batch))
        encoder.collect(flights.popleft()) @ labels.T

    began_s = time.monotonic()
    batches = len(_times(overlapped, seconds))
    per_second = batches * rung / (time.monotonic() - began_s)
    encoder.collect(flights.popleft())
    return Rung(rung, alone_s * 1000, per_second)


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
    """Measure as the environment says."""
    began_s = time.monotonic()
    import torch  # noqa: PLC0415 so that the start is measured with it

    from shiwu_worker.config import Settings  # noqa: PLC0415
    from shiwu_worker.parts import open_encoder  # noqa: PLC0415

    settings = Settings()
    folder = model_folder(settings.model)
    spec = read_image_spec(folder)
    encoder = open_encoder(settings, folder, spec)
    start_s = time.monotonic() - began_s
    seconds = float(sys.argv[1]) / len(encoder.rungs)
    rungs = tuple(loop(encoder, spec, rung, seconds=seconds) for rung in encoder.rungs)
    found = Bare(encoder.info.dtype, encoder.info.device, torch.get_num_threads(), start_s, rungs)
    print(json.dumps(asdict(found)))


if __name__ == "__main__":
    main()
