"""Answers with vectors in the results stream, as workers put them there, and the rows of parts."""

from __future__ import annotations

import base64
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import redis
from numpy.typing import NDArray

from shiwu.contract import RESULT_STREAM, Answer, ImageInfo, ModelInfo, Status
from tests.support.processes import Process, clean_environment
from tests.support.vector_parts import made_vectors

WIDTH = 8
GROUP = "vectors"


def vector_of(number: int, width: int = WIDTH) -> NDArray[np.float16]:
    """The vector of the answer with this number."""
    vector: NDArray[np.float16] = made_vectors(1, width, seed=number)[0]
    return vector


def answer_of(number: int, *, width: int = WIDTH, vector: str | None = None) -> Answer:
    """An answer with a vector; every fifth one has none, because its image was not tagged."""
    is_tagged = bool(number % 5)
    text = base64.b64encode(vector_of(number, width).tobytes()).decode()
    return Answer(
        f"id-{number}",
        Status.TAGGED if is_tagged else Status.REJECTED,
        image=ImageInfo(reference=f"s3://pictures/{number}.jpg", sha256=f"{number:064x}"),
        model=ModelInfo(id="m", revision="r", dtype="float32", device="cpu"),
        vector=(text if vector is None else vector) if is_tagged else None,
    )


def add_answers(client: redis.Redis, *answers: Answer) -> None:
    """Append answers to the results stream."""
    with client.pipeline(transaction=False) as pipe:
        for answer in answers:
            pipe.xadd(RESULT_STREAM, {"id": answer.id, "answer": answer.to_json()})
        pipe.execute()


def expected_ids(numbers: range) -> Counter[str]:
    """The ids of those answers that have a vector, each once."""
    return Counter(f"id-{number}" for number in numbers if number % 5)


def stored_ids(folder: Path) -> Counter[str]:
    """The ids of all parts, with how often each is there. The vectors must be those of the answers."""
    found: Counter[str] = Counter()
    for path in sorted(folder.glob("*.parquet")):
        table = pq.read_table(path)
        for name, numbers in zip(table.column("id").to_pylist(), table.column("vector").to_pylist(), strict=True):
            expected = vector_of(int(name.removeprefix("id-")), len(numbers))
            np.testing.assert_array_equal(np.array(numbers, np.float16), expected)
            found[name] += 1
    return found


def sink_process(url: str, folder: Path, out: Path, *args: str) -> Process:
    """The command `shiwu vectors sink` as a process of its own; its log is in `folder`."""
    command = [sys.executable, "-m", "shiwu.cli", "--redis-url", url, "vectors", "sink"]
    command += ["--group", GROUP, "--out", str(out), *args]
    return Process(command, folder=folder, name="sink", env=clean_environment({}))
