"""Warnings of an answer that follow from its label set and its model."""

from __future__ import annotations

from pathlib import Path

import pytest

from shiwu_worker.jobs.label_checks import LabelFindings
from shiwu_worker.jobs.label_set import LabelSet
from shiwu_worker.stages.score.label_files import load_label_sets
from shiwu_worker.stages.score.label_warnings import label_warnings

FILE = """
name: animals
labels: [{label: 猫, min_cosine: 0.1}, {label: 狗, min_cosine: 0.2}]
calibration:
  {model: photo-zh, revision: aaaa, false_rate: 0.02, false_rate_aside: 0.03, false_rate_aside_low: 0.01,
   false_rate_aside_high: 0.05, images: 1000, images_aside: 500, by_source: true, z: 3.1, seed: 0}
"""


@pytest.mark.parametrize(
    ("calibrated_for", "revision", "codes"),
    [("a", "a", []), ("a", "b", ["calibration_stale"]), (None, "b", []), ("a", None, [])],
    ids=["same", "other", "by-hand", "unknown"],
)
def test_limits_of_another_model_are_warned_of(
    calibrated_for: str | None, revision: str | None, codes: list[str]
) -> None:
    label_set = LabelSet(name="x", words=("猫", "狗"), min_cosines=(0.1, 0.2), calibrated_for=calibrated_for)
    warnings = label_warnings(label_set, LabelFindings(), revision=revision)
    assert [str(warning.code) for warning in warnings] == codes


def test_calibration_of_a_file_is_read(tmp_path: Path) -> None:
    """It changes no answer, so it is no part of the digest."""
    (tmp_path / "animals.yaml").write_text(FILE, encoding="utf-8")
    label_set = load_label_sets([tmp_path])["animals"]
    assert (label_set.calibrated_for, label_set.min_cosines) == ("aaaa", (0.1, 0.2))
    by_hand = LabelSet(name="animals", words=("猫", "狗"), min_cosines=(0.1, 0.2))
    assert label_set.info.digest == by_hand.info.digest


def test_incomplete_calibration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "animals.yaml").write_text(FILE.replace("revision: aaaa, ", ""), encoding="utf-8")
    with pytest.raises(ValueError, match=r"animals\.yaml: calibration revision: Field required"):
        load_label_sets([tmp_path])
