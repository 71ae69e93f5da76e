"""Parts of kept vectors: made ones, and what a command that reads them needs of time and memory."""

from __future__ import annotations

import os
import resource
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from shiwu.vectors import part_schema

PART_ROWS: Final = 50_000
POLL_S: Final = 0.02
PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


def made_vectors(count: int, width: int, *, seed: int = 0) -> NDArray[np.float16]:
    """Random unit vectors, float16 (count, width)."""
    raw = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    vectors: NDArray[np.float16] = (raw / np.linalg.norm(raw, axis=1, keepdims=True)).astype(np.float16)
    return vectors


def write_part(path: Path, vectors: NDArray[np.float16], *, model: str, revision: str, first: int = 0) -> Path:
    """One part; ids and references are numbers from `first` on."""
    count, width = vectors.shape
    numbers = range(first, first + count)
    columns = {
        "id": [f"id-{n}" for n in numbers],
        "reference": [f"s3://pictures/{n}.jpg" for n in numbers],
        "sha256": [f"{n:064x}" for n in numbers],
        "model": [model] * count,
        "revision": [revision] * count,
        "dtype": ["float32"] * count,
        "device": ["cpu"] * count,
    }
    arrays = [pa.array(values) for values in columns.values()]
    arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), width))
    table = pa.Table.from_arrays(arrays, schema=part_schema(width))
    pq.write_table(table, path, use_dictionary=["model", "revision", "dtype", "device"], row_group_size=8192)
    return path


def write_parts(folder: Path, count: int, width: int, *, model: str, revision: str) -> Path:
    """Random unit vectors in as many parts as a sink would write."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, first in enumerate(range(0, count, PART_ROWS)):
        vectors = made_vectors(min(PART_ROWS, count - first), width, seed=number)
        write_part(folder / f"part-{number:05}.parquet", vectors, model=model, revision=revision, first=first)
    return folder


@dataclass(frozen=True, slots=True)
class Spent:
    """What a command used."""

    seconds: float
    cpu_s: float
    """Of all its processes."""
    peak_mb: float
    """Most resident memory of the command's own process, in MB of 10^6 bytes."""
    all_peak_mb: float
    """The same of all its processes together. Memory that they share is counted for each."""
    code: int
    errors: str


def measure(command: Sequence[str], *, env: Mapping[str, str], timeout_s: float) -> Spent:
    """Run a command to its end.

    Raises:
        subprocess.TimeoutExpired: it was killed after `timeout_s`.
    """
    began_s, cpu_from_s = time.monotonic(), _children_cpu_s()
    peaks = [0, 0]
    with subprocess.Popen(
        command, env=dict(env), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(POLL_S):
                resident = _resident_bytes(process.pid)
                peaks[:] = max(peaks[0], resident.get(process.pid, 0)), max(peaks[1], sum(resident.values()))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            _, errors = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        finally:
            ended.set()
            watcher.join()
    return Spent(
        seconds=time.monotonic() - began_s,
        cpu_s=_children_cpu_s() - cpu_from_s,
        peak_mb=peaks[0] / 1e6,
        all_peak_mb=peaks[1] / 1e6,
        code=process.returncode,
        errors=errors,
    )


def _children_cpu_s() -> float:
    """CPU time of processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _resident_bytes(session: int) -> dict[int, int]:
    """Resident memory of each process of a session."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
            if int(fields[3]) == session:
                found[int(folder.name)] = int((folder / "statm").read_text().split()[1]) * PAGE_BYTES
        except (OSError, IndexError):
            continue  # it has ended
    return found
