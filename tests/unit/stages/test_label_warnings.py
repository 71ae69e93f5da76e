"""Warnings of an answer that follow from its label set and its model."""

from __future__ import annotations

from pathlib import Path

import pytest

from shiwu.contract import ModelInfo
from shiwu_worker.commands.check import check_calibrations
from shiwu_worker.errors import FatalError
from shiwu_worker.jobs.label_checks import LabelFindings
from shiwu_worker.jobs.label_set import LabelSet
from shiwu_worker.stages.score.label_files import load_label_sets
from shiwu_worker.stages.score.label_warnings import label_warnings
from tests.support.label_banks import make_bank
from tests.support.scored_jobs import make_job

MODEL = ModelInfo(id="m", revision="a", dtype="float32", device="cpu")
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


@pytest.mark.parametrize(("calibrated_for", "calibrated"), [("a", True), ("b", False), (None, None)])
def test_answer_says_whether_limits_are_of_its_model(calibrated_for: str | None, calibrated: bool | None) -> None:
    """Also with another head; limits that were written by hand say nothing."""
    bank = make_bank(
        LabelSet("x", ("cat", "dog"), min_cosines=(-1.0, -1.0), calibrated_for=calibrated_for), revision="a"
    )
    for head in ("softmax", None):
        job = make_job(0, bank.encoded(bank.resolve("x", head)))
        labels = job.answer(worker="w", until_s=1.0).labels
        assert labels is not None
        assert (labels.calibrated, b'"calibrated"' in labels.to_json()) == (calibrated, calibrated is not None)
        assert labels.digest == bank.sets["x"].info.digest


def test_check_fails_on_limits_of_another_model() -> None:
    """With a code that does not change, and the names of the sets."""
    sets = {name: LabelSet(name, ("cat",), calibrated_for=name) for name in ("a", "b", "c")}
    check_calibrations({"a": sets["a"], "by hand": LabelSet("by hand", ("cat",))}, MODEL)
    with pytest.raises(
        FatalError, match=r"^calibration_stale: expected .* revision a of the model, got b for b, c for c;"
    ):
        check_calibrations(sets, MODEL)


def test_calibration_of_a_file_is_read(tmp_path: Path) -> None:
    """It changes no answer, so it is no part of the digest."""
    (tmp_path / "animals.yaml").write_text(FILE, encoding="utf-8")
    label_set = load_label_sets([tmp_path])["animals"]
    assert (label_set.calibrated_for, label_set.min_cosines) == ("aaaa", (0.1, 0.2))
    by_hand = LabelSet(name="animals", words=("猫", "狗"), min_cosines=(0.1, 0.2))
    assert label_set.info.digest == by_hand.info.digest


def test_incomplete_calibration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "animals.yaml").write_text(FILE.replace("revision: aaaa, ", ""), encoding="utf-8")
    with pytest.raises(ValueError, match=r"animals\.yaml: calibration revision: expected a value, there is none"):
        load_label_sets([tmp_path])
