"""A drill with a faulty device: a worker whose encoder fails now and then."""

from __future__ import annotations

import random
import sys
from typing import Any

from tests.support.processes import WorkerProcess

from drill.drill_run import DrillRun, Outcome

DEVICE_LOST = 67
SHARE = {"memory": 0.04, "nan": 0.08, "count": 0.04, "kernel": 0.02, "lost": 0.01}
"""Kind of failure → share of the encoder's calls."""


def encode(run: DrillRun) -> Outcome:
    """Injects out of memory, NaN, a wrong count, a failing kernel and a lost device; all jobs are still tagged."""
    worker = _faulty(run)
    run.enqueue(run.jobs)
    lost = 0
    while run.answered() - run.answered_before < run.jobs:
        if not worker.is_running:
            lost += 1
            if worker.exit_code != DEVICE_LOST:
                return run.finish("encode", promised_s=0, wrong=[f"the worker ended with {worker.exit_code}"])
            worker = _faulty(run)  # what an orchestrator does
        try:
            run.wait_answers(run.jobs, timeout_s=0.5)
        except TimeoutError:
            continue
    return run.finish("encode", promised_s=0, notes=f"{lost} times the device was lost and the process replaced")


def _faulty(run: DrillRun) -> WorkerProcess:
    seed = str(run.rng.randrange(10**9))
    return run.start_worker(module="drill.device", env={"DRILL_SEED": seed})


def _spoiled(vectors: Any, rng: random.Random) -> Any:
    """The vectors of a batch, or a failure of a kind that is chosen by SHARE."""
    import numpy as np  # noqa: PLC0415 in the worker's process only
    import torch  # noqa: PLC0415 in the worker's process only

    from shiwu_worker.stages.encode import size_check  # noqa: PLC0415 torch, only in the process that needs it

    kind = rng.choices([*SHARE, "none"], [*SHARE.values(), 1 - sum(SHARE.values())])[0]
    if kind == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory (a drill)")
    if kind == "kernel" and len(vectors) > 1:
        raise RuntimeError("a kernel failed (a drill)")
    # An image that is alone on a device that is lost repeatedly counts as the cause.
    if kind == "lost" and len(vectors) > 1:
        raise RuntimeError("CUDA error: an illegal memory access was encountered (a drill)")
    if kind == "count":
        return vectors[:-1]
    if kind == "nan":
        row = rng.randrange(len(vectors))
        vectors = np.array(vectors)
        vectors[row] = np.nan
        return size_check.finite(vectors)
    return vectors


def _main() -> None:
    """`python -m drill.device`: a worker with a faulty encoder."""
    import os  # noqa: PLC0415 in the worker's process only

    from shiwu_worker import __main__ as worker  # noqa: PLC0415 torch, only in the process that needs it
    from shiwu_worker.health.canary import Canary  # noqa: PLC0415 torch, only in the process that needs it
    from shiwu_worker.stages.encode import encoder as stage  # noqa: PLC0415 torch, only in the process that needs it

    rng = random.Random(os.environ["DRILL_SEED"])
    real, real_warm, real_check = stage.Encoder.collect, stage.Encoder.warm, Canary.check_if_due
    ready: list[bool] = []
    checking: list[bool] = []

    def warm(self: Any, **options: Any) -> None:
        real_warm(self, **options)
        ready.append(True)

    def check(self: Any) -> None:
        checking.append(True)
        try:
            real_check(self)
        finally:
            checking.pop()

    def faulty(self: Any, batch: Any) -> Any:
        vectors = real(self, batch)
        # A failure of the health-check image ends the worker, as intended; this drill is about images of jobs.
        if not ready or checking:
            return vectors
        return _spoiled(vectors, rng)

    Canary.check_if_due = check  # type: ignore[method-assign]  # as below
    stage.Encoder.collect = faulty  # type: ignore[method-assign]  # the fault is injected here
    stage.Encoder.warm = warm  # type: ignore[method-assign]  # the same
    sys.argv = ["shiwu-worker"]
    worker.main()


if __name__ == "__main__":
    _main()
