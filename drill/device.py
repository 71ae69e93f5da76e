"""Drills that break the model's device: a worker whose encoder fails now and then."""

from __future__ import annotations

import random
import sys
from typing import Any

from tests.support.processes import WorkerProcess

from drill.field import Field, Outcome

DEVICE_LOST = 67
SHARE = {"memory": 0.04, "nan": 0.08, "count": 0.04, "kernel": 0.02, "lost": 0.01}
"""How many of the encoder's calls fail, and how."""


def encode(field: Field) -> Outcome:
    """Injected: out of memory, NaN, a wrong count, a failing kernel, a lost device; still all is tagged."""
    worker = _faulty(field)
    field.enqueue(field.jobs)
    lost = 0
    while field.answered() - field.answered_before < field.jobs:
        if not worker.is_running:
            lost += 1
            if worker.exit_code != DEVICE_LOST:
                return field.finish("encode", promised_s=0, wrong=[f"the worker ended with {worker.exit_code}"])
            worker = _faulty(field)  # what an orchestrator does
        try:
            field.wait_answers(field.jobs, timeout_s=0.5)
        except TimeoutError:
            continue
    return field.finish("encode", promised_s=0, notes=f"{lost} times the device was lost and the process replaced")


def _faulty(field: Field) -> WorkerProcess:
    seed = str(field.chance.randrange(10**9))
    return field.worker(module="drill.device", env={"DRILL_SEED": seed})


def _main() -> None:
    """`python -m drill.device`: a worker with a faulty encoder."""
    import os  # noqa: PLC0415 in the worker's process only

    import numpy as np  # noqa: PLC0415
    import torch  # noqa: PLC0415

    from shiwu_worker import __main__ as worker  # noqa: PLC0415
    from shiwu_worker.health.canary import Canary  # noqa: PLC0415
    from shiwu_worker.stages.encode import encoder as stage  # noqa: PLC0415

    chance = random.Random(os.environ["DRILL_SEED"])
    real, real_warm, real_sing = stage.Encoder.collect, stage.Encoder.warm, Canary.check_if_due
    ready: list[bool] = []
    singing: list[bool] = []

    def warm(self: Any, **options: Any) -> None:
        real_warm(self, **options)
        ready.append(True)

    def sing(self: Any) -> None:
        singing.append(True)
        try:
            real_sing(self)
        finally:
            singing.pop()

    def faulty(self: Any, batch: Any) -> Any:
        vectors = real(self, batch)
        # A fault of the known picture ends the worker, as it should; this drill is about the pictures of others.
        if not ready or singing:
            return vectors
        kind = chance.choices([*SHARE, "none"], [*SHARE.values(), 1 - sum(SHARE.values())])[0]
        if kind == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory (a drill)")
        if kind == "kernel" and len(vectors) > 1:
            raise RuntimeError("a kernel failed (a drill)")
        # Who was alone on a device that is lost time and again counts as guilty.
        if kind == "lost" and len(vectors) > 1:
            raise RuntimeError("CUDA error: an illegal memory access was encountered (a drill)")
        if kind == "count":
            return vectors[:-1]
        if kind == "nan":
            row = chance.randrange(len(vectors))
            vectors = np.array(vectors)
            vectors[row] = np.nan
            return stage._finite(vectors)
        return vectors

    Canary.check_if_due = sing  # type: ignore[method-assign]  # as below
    stage.Encoder.collect = faulty  # type: ignore[method-assign]  # the fault is injected here
    stage.Encoder.warm = warm  # type: ignore[method-assign]  # the same
    sys.argv = ["shiwu-worker"]
    worker.main()


if __name__ == "__main__":
    _main()
