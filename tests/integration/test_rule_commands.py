"""`shiwu-worker labels` for sets of version 2, with the embedded model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from shiwu.contract import ModelInfo
from shiwu_worker.__main__ import main
from shiwu_worker.checkpoints.model_files import EMBEDDED, model_folder, model_revision
from shiwu_worker.config.settings import Settings
from shiwu_worker.service.labels import load_label_bank, read_label_sets
from shiwu_worker.service.model import load_encoder
from shiwu_worker.stages.decode.image_spec import read_image_spec
from shiwu_worker.stages.score.label_files import load_label_sets
from tests.support.labelled_answers import answer_line
from tests.support.rule_sets import write_calibration, write_set

SET: Final = """version: 2
name: pets
head: z
unknown: 其他
calibration: pets.json
labels: [{label: 狗, aliases: [dog]}, 猫, 鸟]
groups: {animals: {exclusive: true, labels: [狗, 猫, 鸟]}}
"""
OLD: Final = "name: old\nlabels: [狗, 猫]\nmin_cosine: 0.99\n"
SHOWN: Final = 60


def run(*arguments: str, text: str = "") -> tuple[int, str]:
    """Exit code and standard output of `shiwu-worker labels`; the whole output after an error."""
    done = CliRunner().invoke(main, ["labels", *arguments], input=text)
    return done.exit_code, done.stdout if done.exit_code == 0 else done.output


@pytest.fixture(scope="module")
def dog() -> NDArray[np.float64]:
    """The embedded model's vector of 狗."""
    folder, settings = model_folder(None), Settings(model=None, device="cpu")
    bank = load_label_bank(settings, load_encoder(settings, folder, read_image_spec(folder)), read_label_sets(settings))
    encoded = bank.encoded(bank.resolve(("狗",)))
    return np.asarray(encoded.vectors[0], np.float64)


def sample(dog: NDArray[np.float64], folder: Path, *, noise: int, seed: int, unlisted: int = 0) -> tuple[str, ...]:
    """Write answers of noise and of dogs, and the truth of all but the first; the options that name both files."""
    model = ModelInfo(id=EMBEDDED, revision=model_revision(model_folder(None)), dtype="float32", device="cpu")
    chance, width = np.random.default_rng(seed), len(dog)
    others = chance.standard_normal((noise, width)) / np.sqrt(width)
    dogs = dog + 0.5 * chance.standard_normal((SHOWN, width)) / np.sqrt(width)
    lines = [answer_line(number, vector, model) for number, vector in enumerate([*others, *dogs])]
    truth = [
        json.dumps({"image": f"s3://photos/day-{number // 10}/{number}.jpg", "labels": ["dog"] * (number >= noise)})
        for number in range(unlisted, noise + SHOWN)
    ]
    (folder / f"answers-{seed}.jsonl").write_text("\n".join(lines))
    (folder / f"truth-{seed}.jsonl").write_text("\n".join(truth))
    return str(folder / f"answers-{seed}.jsonl"), str(folder / f"truth-{seed}.jsonl")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of label sets, one of which has no calibration file yet."""
    (tmp_path / "pets.yaml").write_text(SET, encoding="utf-8")
    (tmp_path / "old.yaml").write_text(OLD, encoding="utf-8")
    monkeypatch.setenv("SHIWU_LABELS_DIR", str(tmp_path))
    return tmp_path


def test_calibrated_set_keeps_its_rate_and_finds_labels(dog: NDArray[np.float64], folder: Path) -> None:
    """Background and dogs in one file: the rate on new images is as asked, and dogs have a probability."""
    answers, truth = sample(dog, folder, noise=900, seed=1, unlisted=800)
    output = folder / "pets.json"
    command = ("calibrate", "pets", "--answers", answers, "--false-rate", "0.05", "-o", str(output))
    code, text = run(*command, "--labelled", truth, "--precision", "0.8")
    assert code == 0, text
    assert f"狗: {SHOWN} images, threshold" in text
    assert "鸟: 0 images, z decides (expected at least 20 of both" in text
    aside = json.loads(output.read_text(encoding="utf-8"))["false_rate_aside"]
    assert aside["low"] <= 0.05 * 2
    label_set = load_label_sets([folder])["pets"]
    assert label_set.info.calibration is not None

    answers, truth = sample(dog, folder, noise=600, seed=2)
    code, text = run("eval", "pets", "--answers", answers, "--truth", truth, "--json")
    assert code == 0, text
    found = json.loads(text)
    assert found["false_tags"][0] < 0.05 * 2
    assert found["kept"][1] > 0.9

    code, text = run("diff", "old", str(folder / "pets.yaml"), "--answers", answers, "--json")
    assert code == 0, text
    changes = json.loads(text)
    assert (changes["images"], changes["tags_removed"]) == (600 + SHOWN, 0)
    assert changes["top1_changed"] == 600 + SHOWN
    assert next(each for each in changes["labels"] if each["label"] == "狗")["added"] >= 0.9 * SHOWN
    code, text = run("diff", "pets", "pets", "--answers", answers)
    assert f"{600 + SHOWN} images: {600 + SHOWN} with the same tags, 0 with another first tag" in text


def test_lint_finds_calibrations_that_do_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another model, of other texts, and a file that is missing; each with a code."""
    fields = {"name": "model", "head": "z", "labels": ["猫", "狗"]}
    write_set(tmp_path, {**fields, "calibration": write_calibration(tmp_path, fields)})
    write_set(tmp_path, {**fields, "name": "texts", "labels": ["猫", "鸟"], "calibration": "c.json"})
    write_set(tmp_path, {**fields, "name": "missing", "calibration": "none.json"})
    monkeypatch.setenv("SHIWU_LABELS_DIR", str(tmp_path))
    monkeypatch.setenv("SHIWU_MAX_BATCH", "1")
    done = CliRunner().invoke(main, ["labels", "lint", "model", "texts", "missing", "six-zh", "--json"])
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    codes = {name: [each["code"] for each in of_set["warnings"]] for name, of_set in found.items()}
    assert codes == {
        "model": ["calibration_stale"],
        "texts": ["calibration_stale"],
        "missing": ["calibration_missing"],
        "six-zh": [],
    }
    assert "got none of '鸟'; calibrate the label set again" in found["texts"]["warnings"][0]["message"]


def test_calibration_of_version_2_needs_its_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A softmax decides by its scores, so a z would decide nothing."""
    model = ModelInfo(id=EMBEDDED, revision=model_revision(model_folder(None)), dtype="float32", device="cpu")
    (tmp_path / "soft.yaml").write_text("version: 2\nname: soft\nlabels: [猫, 狗]\n", encoding="utf-8")
    monkeypatch.setenv("SHIWU_LABELS_DIR", str(tmp_path))
    config = json.loads((model_folder(None) / "config.json").read_text(encoding="utf-8"))
    line = answer_line(0, np.ones(int(config["projection_dim"])), model)
    code, text = run(
        "calibrate", "soft", "--answers", "-", "--false-rate", "0.05", "-o", str(tmp_path / "x.json"), text=line
    )
    assert code == 64
    assert "expected a label set with head: z, got soft with softmax" in text
