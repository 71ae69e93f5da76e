"""Writes the report of `shiwu-worker labels eval`: one HTML page that loads nothing, and its curves as a PNG."""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import jinja2
import numpy as np
from markupsafe import Markup

from shiwu.contract import Answer, printable, without_query
from shiwu.gallery.page import csp_hash
from shiwu.gallery.thumbnails import Thumbnails, make_thumbnails
from shiwu_worker.calibration.report import Report, Scores, make_report, precision_recall
from shiwu_worker.errors import ExitCode, FatalError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shiwu_worker.calibration import Interval
    from shiwu_worker.jobs.label_set import LabelSet

MAX_MISTAKES: Final = 60
"""Images on the page."""
MAX_CURVES: Final = 10
MAX_TEXT_CHARS: Final = 500
MAX_TAGS: Final = 5
"""Labels that are shown of one image."""
THUMBNAILS_S: Final = 300.0
DPI: Final = 110


def write_report(
    folder: Path,
    *,
    label_set: LabelSet,
    model: str,
    answers: Sequence[Answer],
    cosines: NDArray[np.float32],
    shown: Sequence[Collection[str]],
) -> Path:
    """Write report.html and curves.png, and return the path of the page. Images are fetched once more.

    Args:
        cosines: of each answer and label, (n, m).
        shown: the labels that the image of each answer shows.

    Raises:
        FatalError: with ExitCode.CONFIG, when the folder cannot be written.
    """
    limits = None if label_set.min_cosines is None else np.array(label_set.min_cosines)
    report = make_report(cosines, label_set.words, shown, min_cosines=limits)
    worst = report.mistakes[:MAX_MISTAKES]
    references = list(dict.fromkeys(_reference(answers[mistake.image]) for mistake in worst))
    made = make_thumbnails([each for each in references if each], timeout_s=THUMBNAILS_S)
    curves = draw_curves(report)
    page = render_report(report, label_set, answers, made, cosines=cosines, model=model, curves=curves)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.html").write_text(page, encoding="utf-8")
        if curves is not None:
            (folder / "curves.png").write_bytes(curves)
    except OSError as error:
        raise FatalError(ExitCode.CONFIG, f"{folder}: cannot be written ({error.strerror or error})") from error
    return folder / "report.html"


def render_report(
    report: Report,
    label_set: LabelSet,
    answers: Sequence[Answer],
    made: Thumbnails,
    *,
    cosines: NDArray[np.float32],
    model: str,
    curves: bytes | None,
) -> str:
    """The page as HTML. Labels, references and names are escaped, and its policy (CSP) lets it load nothing."""
    style = _asset("report.css")
    order = sorted(range(len(report.labels)), key=lambda row: -report.labels[row].images)
    return _template().render(
        title=f"{_text(label_set.name or 'labels')}: {len(report.is_true)} images",
        model=_text(model),
        has_limits=label_set.min_cosines is not None,
        style=Markup(style),  # noqa: S704 a file of this package
        style_hash=csp_hash(style),
        curves=None if curves is None else base64.b64encode(curves).decode(),
        totals=[("micro: all pairs", _cells(report.micro)), ("macro: mean of labels", _cells(report.macro))],
        labels=[
            (number, _text(row.label), row.images, row.given, _cells(row.scores))
            for number, row in enumerate((report.labels[index] for index in order), 1)
            if row.images or row.given
        ],
        unknown=_percent(report.unknown),
        false_tags=None if report.false_tags is None else _percent(report.false_tags),
        confusions=[(_text(true), _text(given), count) for true, given, count in report.confusions],
        mistakes=_cards(report, label_set, answers, made, cosines),
        count=len(report.mistakes),
        problem=_text(made.problem) if made.problem else None,
    )


def draw_curves(report: Report) -> bytes | None:
    """Precision over recall of all labels and of the most frequent ones, as PNG; None without matplotlib.

    Labels have the numbers of the table: matplotlib's own font has no Chinese.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 an extra
    except ImportError:
        return None
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.02))
    order = sorted(range(len(report.labels)), key=lambda row: -report.labels[row].images)
    for number, column in enumerate(order[:MAX_CURVES], 1):
        if report.labels[column].images:
            curve = precision_recall(report.ranking[:, column], report.is_true[:, column])
            axes.plot(curve[:, 0], curve[:, 1], linewidth=1, label=str(number))
    pooled = precision_recall(report.ranking.ravel(), report.is_true.ravel())
    axes.plot(pooled[:, 0], pooled[:, 1], color="black", linewidth=2, label="all")
    axes.grid(alpha=0.3)
    axes.legend(title="label", loc="center left", bbox_to_anchor=(1, 0.5))
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()


def _cards(
    report: Report,
    label_set: LabelSet,
    answers: Sequence[Answer],
    made: Thumbnails,
    cosines: NDArray[np.float32],
) -> list[dict[str, Any]]:
    cards = []
    for mistake in report.mistakes[:MAX_MISTAKES]:
        row = mistake.image
        reference = _reference(answers[row])
        thumbnail = made.by_reference.get(reference)
        cards.append(
            {
                "reference": _text(without_query(reference)),
                "webp": thumbnail.webp if thumbnail else None,
                "unseen": _text((thumbnail.code if thumbnail else None) or "no thumbnail"),
                "kind": "is given wrongly" if mistake.kind == "false" else "is missed",
                "label": _text(mistake.label),
                "by": f"{mistake.by:.3f}",
                "shows": _labels(label_set, cosines[row], report.is_true[row]),
                "gets": _labels(label_set, cosines[row], report.is_given[row]),
            }
        )
    return cards


def _labels(label_set: LabelSet, cosines: NDArray[np.float32], flags: NDArray[np.bool_]) -> str:
    chosen = sorted(np.flatnonzero(flags).tolist(), key=lambda column: -cosines[column])
    texts = [f"{_text(label_set.words[column])} {cosines[column]:.3f}" for column in chosen[:MAX_TAGS]]
    return ", ".join(texts) + (f" and {len(chosen) - MAX_TAGS} more" if len(chosen) > MAX_TAGS else "") or "none"


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(_asset("report.html.j2"))


@cache
def _asset(name: str) -> str:
    return files("shiwu_worker").joinpath("data", "label_report", name).read_text(encoding="utf-8")


def _text(text: str) -> str:
    """With control and direction characters spelled out; the template escapes it."""
    return printable(text)[:MAX_TEXT_CHARS]


def _reference(answer: Answer) -> str:
    return answer.image.reference if answer.image is not None else ""


def _cells(scores: Scores) -> list[str]:
    values = (scores.precision, scores.recall, scores.f1, scores.average_precision)
    return ["–" if value is None else f"{value:.3f}" for value in values]


def _percent(interval: Interval) -> str:
    return f"{interval.share:.1%} ({interval.low:.1%} to {interval.high:.1%})"
