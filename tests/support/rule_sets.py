"""Label sets of version 2 for tests: files, vectors of their texts, and a calibration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import yaml
from numpy.typing import NDArray

from shiwu.contract import ModelInfo, Request, Tag
from shiwu_worker.jobs.label_set import LabelSet
from shiwu_worker.jobs.label_vectors import EncodedLabels, TextVectors
from shiwu_worker.stages.score.calibration_files import texts_digest
from shiwu_worker.stages.score.label_files import load_label_set
from shiwu_worker.stages.score.scorer import Scorer

SCORER: Final = Scorer(scale=20.0, bias=None, model=ModelInfo(id="m", revision="r", dtype="float32", device="cpu"))


def write_set(folder: Path, fields: Mapping[str, Any]) -> Path:
    """Write a file of version 2; `name` and `version` are given where the fields have none."""
    path = folder / f"{fields.get('name', 'mine')}.yaml"
    path.write_text(yaml.safe_dump({"version": 2, "name": "mine", **fields}, allow_unicode=True), encoding="utf-8")
    return path


def read_set(folder: Path, **fields: Any) -> LabelSet:
    """Write a file of version 2 and read it."""
    return load_label_set(write_set(folder, fields))


def write_calibration(folder: Path, fields: Mapping[str, Any], *, z: float = 3.0, **labels: Mapping[str, Any]) -> str:
    """Write a calibration file for a set with these fields, and return its name.

    Args:
        labels: figures of single labels; the others have a mean of 0 and a deviation of 1/10.
    """
    plain = load_label_set(write_set(folder, {**fields, "calibration": "c.json"}), has_calibration=False)
    assert plain.rules is not None
    content = {
        "version": 1,
        "set": "mine",
        "model": "m",
        "revision": "r",
        "z": z,
        "false_rate": 0.01,
        "false_rate_aside": {"low": 0.0, "share": 0.01, "high": 0.02},
        "images": 2000,
        "images_aside": 1000,
        "by_source": True,
        "seed": 0,
        "labels": {
            word: {"texts": texts_digest(each), "mean": 0.0, "deviation": 0.1, **labels.get(word, {})}
            for word, each in zip(plain.words, plain.rules.phrases, strict=True)
        },
    }
    (folder / "c.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return "c.json"


def random_units(count: int, *, seed: int, width: int = 6) -> NDArray[np.float32]:
    """Unit vectors (count, width)."""
    raw = np.random.default_rng(seed).normal(size=(count, width))
    return np.asarray(raw / np.linalg.norm(raw, axis=1, keepdims=True), np.float32)


def text_vector(text: str) -> NDArray[np.float32]:
    """A unit vector that depends on the text only."""
    seed = sum(ord(letter) * 31**place for place, letter in enumerate(text)) % 2**32
    vector: NDArray[np.float32] = random_units(1, seed=seed)[0]
    return vector


def with_vectors(label_set: LabelSet) -> EncodedLabels:
    """The set with vectors that depend on the texts only."""
    return EncodedLabels(label_set, TextVectors(np.stack([text_vector(text) for _, text in label_set.phrases])))


def tags_of(label_set: LabelSet, images: NDArray[np.float32], **fields: Any) -> list[tuple[Tag, ...]]:
    """The tags of these images for a request with these fields; by default as many as there are labels."""
    request = Request(image="s3://b/k", top_k=fields.pop("top_k", len(label_set.words)), **fields)
    labels = with_vectors(label_set)
    cosines = images @ labels.vectors.T
    return SCORER._tags(cosines, labels, [request] * len(images))
