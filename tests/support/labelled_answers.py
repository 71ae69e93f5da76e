"""Answers with vectors, as `shiwu-worker labels` reads them."""

from __future__ import annotations

import base64

import numpy as np
from numpy.typing import NDArray

from shiwu.contract import Answer, ImageInfo, ModelInfo, Status


def answer_line(number: int, vector: NDArray[np.float64], model: ModelInfo, *, labels: list[str] | None = None) -> str:
    """An answer with a vector; one source has ten images."""
    half = (vector / np.linalg.norm(vector)).astype("<f2")
    answer = Answer(
        id=f"k{number}",
        status=Status.TAGGED,
        image=ImageInfo(reference=f"s3://photos/day-{number // 10}/{number}.jpg"),
        model=model,
        vector=base64.b64encode(half.tobytes()).decode(),
        metadata=None if labels is None else {"labels": labels},
    )
    return answer.to_json().decode()
