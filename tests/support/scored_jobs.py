"""Jobs that are ready for their tags, with random vectors, and a scorer for them."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shiwu.contract import Lane, ModelInfo, parse_request
from shiwu_worker.jobs.job import Job
from shiwu_worker.jobs.label_set import LabelSet
from shiwu_worker.jobs.label_vectors import EncodedLabels, TextVectors
from shiwu_worker.jobs.timestamps import StageTimestamps
from shiwu_worker.stages.score.scorer import Scorer

MODEL: Final = ModelInfo(id="m", revision="r", dtype="float32", device="cpu")
SCORER: Final = Scorer(scale=20.0, bias=None, model=MODEL)


def units(count: int, width: int = 8, seed: int = 0) -> NDArray[np.float32]:
    """Random unit vectors."""
    raw = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    unit: NDArray[np.float32] = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    return unit


def encoded(label_set: LabelSet, *, seed: int, width: int = 8) -> EncodedLabels:
    """The label set with random vectors."""
    return EncodedLabels(label_set, TextVectors(units(len(label_set.words), width, seed=seed)))


def make_job(number: int, labels: EncodedLabels, **fields: Any) -> Job:
    """A job that is ready for its tags, with the vectors of its words."""
    return Job(
        id=f"j{number}",
        key=Lane.BULK.queue,
        attempt=1,
        raw=b"",
        moments=StageTimestamps(claimed_s=0.0),
        request=parse_request({"image": "s3://b/k.jpg", **fields}),
        label_set=labels.label_set,
        labels=labels,
    )
