"""Reports on label sets: their figures, and a page that loads nothing whatever names say."""

from __future__ import annotations

import base64
import re
import sys

import numpy as np
import pytest

from shiwu.contract import Answer, ImageInfo, Status
from shiwu.gallery.thumbnails import Thumbnail, Thumbnails
from shiwu_worker.calibration.evaluate import evaluate
from shiwu_worker.calibration.report import make_report, precision_recall
from shiwu_worker.commands.label_report import draw_curves, render_report
from shiwu_worker.jobs.label_set import LabelSet

WORDS = ("猫", "狗", "鸟")
COSINES = np.array([[0.9, 0.1, 0.2], [0.8, 0.3, 0.1], [0.2, 0.6, 0.1], [0.1, 0.2, 0.3]], np.float32)
TRUTH = (["猫"], ["狗"], ["狗"], [])
LIMITS = np.array([0.5, 0.5, 0.25])
HOSTILE = "<img src=https://example.org/x onerror=alert(1)></style><script>alert(1)</script>\u202e"


def test_figures_of_a_set_with_limits() -> None:
    """One of two dogs is taken for a cat, and an image without labels gets one."""
    report = make_report(COSINES, WORDS, TRUTH, min_cosines=LIMITS)
    cat, dog, bird = report.labels
    assert (cat.scores.precision, cat.scores.recall) == (0.5, 1.0)
    assert (dog.scores.precision, dog.scores.recall, dog.scores.f1) == (1.0, 0.5, pytest.approx(2 / 3))
    assert (bird.images, bird.given, bird.scores.recall) == (0, 1, None)
    assert (report.micro.precision, report.micro.recall, report.micro.f1) == (
        0.5,
        pytest.approx(2 / 3),
        pytest.approx(4 / 7),
    )
    assert (report.macro.precision, report.macro.recall) == (0.75, 0.75)
    assert report.confusions == (("狗", "猫", 1),)
    assert report.unknown.share == 0
    assert report.false_tags is not None
    assert report.false_tags.share == 1
    assert [(each.image, each.kind, each.label) for each in report.mistakes] == [(1, "false", "猫"), (3, "false", "鸟")]


def test_without_limits_the_nearest_label_is_given() -> None:
    """And equal cosines give the first label."""
    report = make_report(COSINES, WORDS, TRUTH, min_cosines=None)
    assert report.is_given.sum(axis=1).tolist() == [1, 1, 1, 1]
    assert report.is_given.argmax(axis=1).tolist() == [0, 0, 1, 2]
    equal = make_report(np.full((1, 3), 0.5, np.float32), WORDS, [["猫"]], min_cosines=None)
    assert equal.is_given.tolist() == [[True, False, False]]


def test_average_precision_is_that_of_eval() -> None:
    report = make_report(COSINES, WORDS, TRUTH, min_cosines=LIMITS)
    expected = evaluate(COSINES, WORDS, TRUTH, min_cosines=LIMITS)
    assert [row.scores.average_precision for row in report.labels] == [row.average_precision for row in expected.labels]


def test_curve_ends_at_recall_one() -> None:
    curve = precision_recall(np.array([0.9, 0.8, 0.1, 0.7]), np.array([True, False, True, False]))
    assert curve.tolist() == [[0.5, 1.0], [1.0, 0.5]]
    assert precision_recall(np.array([0.9]), np.array([False])).shape == (0, 2)


def page(words: tuple[str, ...], reference: str, *, code: str | None = None) -> str:
    """The page of four images with this reference."""
    label_set = LabelSet(name="set", words=words, min_cosines=tuple(LIMITS))
    truth = [[words[WORDS.index(label)] for label in labels] for labels in TRUTH]
    report = make_report(COSINES, words, truth, min_cosines=LIMITS)
    answers = [Answer(id=str(i), status=Status.TAGGED, image=ImageInfo(reference=reference)) for i in range(4)]
    webp = base64.b64encode(b"RIFF0000WEBP").decode()
    made = Thumbnails({reference: Thumbnail(webp=None if code else webp, code=code)})
    return render_report(
        report, label_set, answers, made, cosines=COSINES, model=f"photo-zh{words[0]}", curves=draw_curves(report)
    )


def test_page_loads_nothing_whatever_names_say() -> None:
    """Labels, references, the model and error codes of producers stay text."""
    html = page((HOSTILE, "狗", "鸟"), f"https://example.org/{HOSTILE}?signature=secret", code=HOSTILE)
    assert "<script" not in html
    assert html.count("</style>") == 1
    assert "\u202e" not in html
    assert "secret" not in html
    sources = re.findall(r"<[^>]*\s(?:src|href)=\"([^\"]*)", html)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "default-src 'none'; img-src data:; style-src 'sha256-" in html
    assert "&lt;img src=https://example.org/x onerror=alert(1)&gt;" in html


def test_page_shows_the_worst_mistakes_with_thumbnails() -> None:
    html = page(WORDS, "s3://photos/a.jpg")
    assert html.count('<img alt="" src="data:image/webp;base64,') == 2
    assert "<b>猫</b> is given wrongly, by 0.300" in html
    assert "shows: 狗 0.300" in html
    assert "2 images have a mistake" in html


def test_page_says_that_there_are_no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without matplotlib the report has everything else."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "matplotlib is not installed" in page(WORDS, "s3://photos/a.jpg")
