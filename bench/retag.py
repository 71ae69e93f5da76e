"""Time and memory of `shiwu-worker retag` over made vectors: `python -m bench.retag --vectors 1000000 --labels 1000`.

Vectors and labels are random, of the width of the embedded model; time and memory do not depend on what they are of.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Final

import yaml
from tests.support.vector_parts import Spent, measure, write_parts

from bench import machine
from shiwu_worker.checkpoints.model_files import EMBEDDED, model_folder, model_revision
from shiwu_worker.service.labels import OWN_LABEL_SETS
from shiwu_worker.stages.score.label_files import load_label_set

WIDTH: Final = 320
"""Of the embedded model's vectors."""
TIMEOUT_S: Final = 3600.0


def write_labels(path: Path, count: int) -> Path:
    """A label set of so many words that the embedded model can tell apart."""
    words = load_label_set(OWN_LABEL_SETS / "photo-zh.yaml").words
    labels = [word if n < len(words) else f"{word}{n // len(words)}" for n, word in zip(range(count), cycle(words))]
    path.write_text(yaml.safe_dump({"name": path.stem, "labels": labels}, allow_unicode=True), encoding="utf-8")
    return path


def run(folder: Path, *, vectors: int, labels: int, options: Sequence[str] = ()) -> Spent:
    """Make the vectors and the labels in this folder, and tag the vectors."""
    parts = write_parts(folder / "vectors", vectors, WIDTH, model=EMBEDDED, revision=model_revision(model_folder(None)))
    command = [sys.executable, "-m", "shiwu_worker", "retag", "--vectors", str(parts)]
    command += ["--labels", str(write_labels(folder / "new.yaml", labels)), "--out", str(folder / "answers.jsonl")]
    env = {name: value for name, value in os.environ.items() if not name.startswith("SHIWU_")}
    return measure([*command, *options], env=env, timeout_s=TIMEOUT_S)


def main() -> int:
    """Print what one run took."""
    parser = argparse.ArgumentParser(prog="bench.retag", description=__doc__)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--labels", type=int, default=1000)
    parser.add_argument("--folder", type=Path, help="where the vectors are made; default: a temporary folder")
    asked = parser.parse_args()
    print(machine.describe())
    with tempfile.TemporaryDirectory(prefix="shiwu-retag-", dir=asked.folder) as name:
        spent = run(Path(name), vectors=asked.vectors, labels=asked.labels)
        size_mb = (Path(name) / "answers.jsonl").stat().st_size / 1e6 if not spent.code else 0.0
    print(spent.errors.strip())
    print(
        f"{spent.seconds:.1f} s, {spent.cpu_s:.1f} s of CPU, at most {spent.peak_mb:.0f} MB, and "
        f"{spent.all_peak_mb:.0f} MB with the process that encodes labels; {size_mb:.0f} MB of answers"
    )
    return spent.code


if __name__ == "__main__":
    sys.exit(main())
