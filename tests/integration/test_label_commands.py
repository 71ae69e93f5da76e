"""`shiwu-worker labels` with the embedded model: limits from answers, their file, and their measurement."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from numpy.typing import NDArray

from shiwu.contract import ModelInfo
from shiwu_worker.__main__ import main
from shiwu_worker.checkpoints.model_files import EMBEDDED, model_folder, model_revision
from shiwu_worker.stages.score.label_files import load_label_sets
from tests.support.labelled_answers import answer_line
from tests.support.processes import ROOT

PHOTOS = ROOT / "demo" / "photos"


@pytest.fixture(scope="module")
def model() -> ModelInfo:
    """The embedded model as answers name it."""
    return ModelInfo(id=EMBEDDED, revision=model_revision(model_folder(None)), dtype="float32", device="cpu")


def run(*arguments: str, text: str = "", only_stdout: bool = False) -> tuple[int, str]:
    """Exit code and output of `shiwu-worker labels`."""
    done = CliRunner().invoke(main, ["labels", *arguments], input=text)
    return done.exit_code, done.stdout if only_stdout else done.output


def vectors(seed: int, count: int, width: int) -> NDArray[np.float64]:
    """Random directions."""
    return np.random.default_rng(seed).standard_normal((count, width))


def test_calibrated_set_keeps_its_rate(
    model: ModelInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embedded_width: int
) -> None:
    """The file that `calibrate` writes is a label set of a worker; `eval` finds its rate on other images."""
    lines = [answer_line(number, vector, model) for number, vector in enumerate(vectors(1, 900, embedded_width))]
    other = ModelInfo(id="other", revision="1", dtype="float32", device="cpu")
    lines += [answer_line(9000, vectors(2, 1, embedded_width)[0], other)]
    output = tmp_path / "six.yaml"
    command = ("calibrate", "six-zh", "--answers", "-", "--false-rate", "0.05", "-o", str(output))
    code, text = run(*command, text="\n".join(lines))
    assert code == 0, text
    assert "images with a tag, asked for:   5.0%" in text
    assert "left out: 1 answers without a vector of this model" in text
    fields = yaml.safe_load(output.read_text(encoding="utf-8"))
    assert (fields["name"], fields["calibration"]["revision"]) == ("six-zh-calibrated", model.revision)
    label_set = load_label_sets([tmp_path])["six-zh-calibrated"]
    assert label_set.calibrated_for == model.revision
    assert label_set.min_cosines is not None
    assert len(label_set.min_cosines) == 6

    monkeypatch.setenv("SHIWU_LABELS_DIR", str(tmp_path))
    new = [
        answer_line(number, vector, model, labels=[]) for number, vector in enumerate(vectors(3, 600, embedded_width))
    ]
    command = ("eval", "six-zh-calibrated", "--answers", "-", "--json")
    code, text = run(*command, text="\n".join(new), only_stdout=True)
    assert code == 0, text
    low, share, high = json.loads(text)["false_tags"]
    assert low < 0.05 < high, share


def test_too_few_images_end_with_one_and_no_file(model: ModelInfo, tmp_path: Path, embedded_width: int) -> None:
    lines = [answer_line(number, vector, model) for number, vector in enumerate(vectors(1, 30, embedded_width))]
    output = tmp_path / "six.yaml"
    code, text = run(
        "calibrate", "six-zh", "--answers", "-", "--false-rate", "0.01", "-o", str(output), text="\n".join(lines)
    )
    assert code == 1
    assert "expected at least 2000 distinct images" in text
    assert not output.exists()


def test_eval_report_shows_images_by_the_access_rules(
    model: ModelInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embedded_width: int
) -> None:
    """An image of an allowed folder has a thumbnail, another one the code of the error; nothing is loaded later."""
    monkeypatch.setenv("SHIWU_ALLOW_FOLDERS", str(PHOTOS))
    photo = sorted(PHOTOS.glob("*.jpg"))[0]
    lines = []
    for number, reference in enumerate((photo.as_uri(), (tmp_path / "other.jpg").as_uri())):
        line = json.loads(answer_line(number, vectors(9, 2, embedded_width)[number], model, labels=["动物", "植物"]))
        line["image"]["reference"] = reference
        lines.append(json.dumps(line))
    code, text = run("eval", "six-zh", "--answers", "-", "--report", str(tmp_path / "report"), text="\n".join(lines))
    assert code == 0, text
    [row] = (line for line in text.splitlines() if line.startswith(" 动物"))
    assert row.count("%)") == 2, "precision and recall with their intervals, in one line"
    html = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert html.count('src="data:image/webp;base64,') == 1
    assert "source_forbidden" in html
    assert photo.name in html
    assert (tmp_path / "report" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_eval_report_without_its_extra_ends_with_64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "shiwu_worker.commands.label_report", raising=False)
    code, text = run("eval", "six-zh", "--answers", "-", "--report", str(tmp_path))
    assert code == 64
    assert "--report needs jinja2: pip install '.[worker,report]'" in text


def test_tune_templates_refuses_templates_that_do_not_help(
    model: ModelInfo, tmp_path: Path, embedded_width: int
) -> None:
    """On random vectors no template helps by more than chance, so most choices are refused; --accept writes the set."""
    words = ["动物", "人物", "交通工具"]
    lines = [
        answer_line(number, vector, model, labels=[words[number % 3]])
        for number, vector in enumerate(vectors(4, 120, embedded_width))
    ]
    output = tmp_path / "six.yaml"
    command = ("tune-templates", "six-zh", "--answers", "-", "--template", "看，{}", "-o", str(output))
    code, text = run(*command, text="\n".join(lines))
    assert code in (0, 1), text
    assert output.exists() == (code == 0)
    assert "看，{}" in text
    assert "chosen on 60 images; 60 of other sources kept aside" in text
    code, text = run(*command, "--accept", text="\n".join(lines))
    assert code == 0, text
    chosen = load_label_sets([tmp_path])["six-zh-tuned"]
    assert len(chosen.words) == 6
    assert chosen.min_cosines is None
    assert f"chosen: {' '.join(chosen.templates)}" in text


def test_template_without_a_place_for_the_label_ends_with_2() -> None:
    code, text = run("tune-templates", "six-zh", "--answers", "-", "--template", "照片")
    assert code == 2
    assert "expected one {} in the text, got '照片'" in text


@pytest.fixture(scope="module")
def embedded_width() -> int:
    """Numbers in a vector of the embedded model."""
    config = json.loads((model_folder(None) / "config.json").read_text(encoding="utf-8"))
    return int(config["projection_dim"])


@pytest.mark.parametrize(
    ("arguments", "text", "expected"),
    [
        (("eval", "no-such-set", "--answers", "-"), "", "expected the name of a label set, one of everyday-zh, "),
        (("eval", "six-zh", "--answers", "-"), "{}", "line 1: expected an answer as JSON"),
        (("eval", "six-zh", "--answers", "-"), "", "got 0 answers without one; enqueue with --want vector"),
    ],
    ids=["name", "line", "empty"],
)
def test_wrong_input_ends_with_64(arguments: tuple[str, ...], text: str, expected: str) -> None:
    code, output = run(*arguments, text=text)
    assert code == 64
    assert expected in output


def test_lint_warns_of_labels_that_the_model_cannot_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "odd.yaml").write_text("name: odd\nlabels: [猫, 𓀀]\n", encoding="utf-8")
    monkeypatch.setenv("SHIWU_LABELS_DIR", str(tmp_path))
    code, text = run("lint", "odd", "six-zh")
    assert code == 1
    assert "odd: 2 labels, 1 warnings\n  labels_unreadable: the model cannot read 1 of 2 labels: 𓀀" in text
    assert "six-zh: 6 labels, 0 warnings" in text
