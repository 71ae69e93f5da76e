"""`shiwu-worker labels`: chooses the limits of label sets, and measures them."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import click
import numpy as np
from rich.table import Table

from shiwu_worker.calibration import (
    Calibration,
    CalibrationOptions,
    Evaluation,
    Interval,
    calibrate,
    evaluate,
)
from shiwu_worker.commands.answer_vectors import AnswerVectors, read_truth
from shiwu_worker.commands.console import make_console
from shiwu_worker.commands.folder_images import ImageSource, load_images
from shiwu_worker.commands.label_templates import (
    file_with_templates,
    measure_templates,
    not_better,
    print_templates,
)
from shiwu_worker.commands.loaded_labels import NOT_KEPT, Loaded, as_yaml, first_version, run_command, write_file
from shiwu_worker.commands.rule_tables import (
    RuleCalibration,
    given,
    label_cosines,
    shown_labels,
    tags_of,
    with_names,
)
from shiwu_worker.errors import ExitCode, FatalError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shiwu.contract import ModelInfo
    from shiwu_worker.jobs.label_set import LabelSet

SHOWN_CONFUSIONS: Final = 3
NO_LIMIT: Final = -1.0


@dataclass(frozen=True, slots=True)
class _Asked:
    """What `calibrate` was asked for."""

    options: CalibrationOptions
    output: Path
    new_name: str
    labelled: BinaryIO | None
    precision: float | None


def run_calibrate(
    name: str,
    source: ImageSource,
    *,
    false_rate: float,
    output: Path,
    new_name: str | None,
    seed: int,
    is_forced: bool,
    labelled: BinaryIO | None = None,
    precision: float | None = None,
) -> int:
    """Choose the limits of a label set, write the new set or its calibration file, and return the exit code."""
    options = CalibrationOptions(false_rate=false_rate, seed=seed, is_forced=is_forced)
    asked = _Asked(options, output, new_name or f"{name}-calibrated", labelled, precision)
    return run_command(lambda: _calibrate(name, source, asked))


def run_eval(
    name: str, source: ImageSource, *, truth: BinaryIO | None, as_json: bool, report_folder: Path | None
) -> int:
    """Measure a label set, print the figures, write the report that was asked for, and return the exit code."""
    return run_command(lambda: _evaluate(name, source, truth=truth, as_json=as_json, report_folder=report_folder))


def run_tune_templates(
    name: str,
    source: ImageSource,
    *,
    truth: BinaryIO | None,
    more: Sequence[str],
    output: Path | None,
    new_name: str | None,
    seed: int,
    is_forced: bool,
) -> int:
    """Choose templates of a label set, print what they do, write the new set, and return the exit code."""

    def tune() -> int:
        loaded, read = load_images([name], source)
        label_set = first_version(loaded.sets[name])
        read, shown = read.with_truth(_truth(truth, source))
        found = measure_templates(label_set, loaded.encode, read, shown, more=more, seed=seed)
        print_templates(found, label_set)
        if not found.is_better:
            click.echo(not_better(label_set))
        if output is None:
            return 0 if found.is_better else NOT_KEPT
        if not found.is_better and not is_forced:
            click.echo(f"{output} is not written; --accept writes it")
            return NOT_KEPT
        fields = file_with_templates(label_set, found.chosen.templates, name=new_name or f"{name}-tuned")
        write_file(output, as_yaml(fields))
        click.echo(f"written to {output}, without limits: they hold for one set of templates")
        return 0

    return run_command(tune)


def _truth(lines: BinaryIO | None, source: ImageSource) -> Mapping[str, Collection[str]] | None:
    return None if lines is None else read_truth(lines, folder=source.folder)


# ------------------------------------------------------------------------------------ calibrate
def _calibrate(name: str, source: ImageSource, asked: _Asked) -> int:
    loaded, read = load_images([name], source, has_calibrations=False)
    options = asked.options
    label_set = loaded.sets[name]
    if label_set.rules is not None:
        return _calibrate_rules(loaded, label_set, read, asked, truth=_truth(asked.labelled, source))
    if asked.labelled is not None or asked.precision is not None:
        text = f"expected a label set of version 2 with --labelled, got {name} of version 1"
        raise FatalError(ExitCode.CONFIG, text)
    found = calibrate(read.pool(), loaded.encode(label_set).vectors, options)
    fields = _label_file(label_set, found, options, name=asked.new_name, model=loaded.model)
    write_file(asked.output, as_yaml(fields))
    _print_calibration(found, options, read, label_set, asked.output)
    return 0


def _calibrate_rules(
    loaded: Loaded,
    label_set: LabelSet,
    read: AnswerVectors,
    asked: _Asked,
    *,
    truth: Mapping[str, Collection[str]] | None,
) -> int:
    """Write the calibration file of a set of version 2."""
    encoded = loaded.encode(label_set)
    cosines, shows = None, None
    background = read
    if truth is not None:
        labelled, shown = read.with_truth(truth)
        cosines, shows = label_cosines(labelled.vectors, encoded), shown_labels(shown, label_set)
        has_label: list[bool] = np.asarray(shows.any(axis=1)).tolist()
        with_label = {answer.id for answer, has in zip(labelled.answers, has_label, strict=True) if has}
        background = read.without(with_label)
    chosen = RuleCalibration(
        encoded, scale=loaded.scale, bias=loaded.bias, labelled=cosines, shows=shows, precision=asked.precision
    )
    found = calibrate(background.pool(), encoded.vectors, asked.options, decision=chosen.decision)
    write_file(asked.output, chosen.file(found, asked.options, loaded.model).decode())
    _print_calibration(found, asked.options, background, label_set, asked.output)
    if truth is not None:
        for word, curve in zip(label_set.words, chosen.curves, strict=True):
            limit = "z decides" if curve.threshold is None else f"threshold {curve.threshold:.3f}"
            reason = f" ({curve.reason})" if curve.reason else ""
            click.echo(f"  {word}: {curve.positives} images, {limit}{reason}")
    return 0


def _label_file(
    label_set: LabelSet, found: Calibration, options: CalibrationOptions, *, name: str, model: ModelInfo
) -> dict[str, Any]:
    """The new label set as the content of its file."""
    fields: dict[str, Any] = {
        "name": name,
        "description": f"{label_set.name} with limits for {options.false_rate:.1%} of images without its labels",
        "head": label_set.head,
        "templates": list(label_set.templates),
        "calibration": {
            "model": model.id,
            "revision": model.revision,
            "false_rate": options.false_rate,
            "false_rate_aside": round(found.aside.share, 4),
            "false_rate_aside_low": round(found.aside.low, 4),
            "false_rate_aside_high": round(found.aside.high, 4),
            "images": found.images,
            "images_aside": found.images_aside,
            "by_source": found.is_by_source,
            "z": round(found.z, 4),
            "seed": options.seed,
        },
        "labels": [
            {"label": word, "min_cosine": float(least)}
            for word, least in zip(label_set.words, found.min_cosines, strict=True)
        ],
    }
    optional = {"scale": label_set.scale, "bias": label_set.bias}
    return fields | {key: value for key, value in optional.items() if value is not None}


def _print_calibration(
    found: Calibration, options: CalibrationOptions, read: AnswerVectors, label_set: LabelSet, output: Path
) -> None:
    aside = "other sources" if found.is_by_source else "the same source"
    click.echo(
        f"{label_set.name}: {len(label_set.words)} labels, limits {found.z:.2f} deviations above their background"
    )
    click.echo(f"images with a tag, asked for:   {options.false_rate:.1%}")
    click.echo(f"  {found.images} that limits were chosen on: {_percent(found.fitted)}")
    click.echo(f"  {found.images_aside} kept aside, of {aside}: {_percent(found.aside)}")
    if read.skipped:
        click.echo(f"left out: {read.skipped} answers without a vector of this model")
    for warning in found.warnings:
        click.echo(f"accepted: {warning}")
    click.echo(f"written to {output}; copy it into SHIWU_LABELS_DIR of the workers")


# ------------------------------------------------------------------------------------ eval
def _evaluate(
    name: str, source: ImageSource, *, truth: BinaryIO | None, as_json: bool, report_folder: Path | None
) -> int:
    write_report = None if report_folder is None else _report_writer()
    loaded, read = load_images([name], source)
    label_set = loaded.sets[name] if report_folder is None else first_version(loaded.sets[name])
    read, shown = read.with_truth(_truth(truth, source))
    encoded = loaded.encode(label_set)
    cosines = label_cosines(read.vectors, encoded)
    if label_set.rules is None:
        found = evaluate(cosines, label_set.words, shown, min_cosines=_limits(label_set))
    else:
        is_given = given(tags_of(cosines, encoded, scale=loaded.scale, bias=loaded.bias), label_set)
        found = evaluate(cosines, label_set.words, with_names(shown, label_set), is_given=is_given)
    if write_report is not None and report_folder is not None:
        model = f"{loaded.model.id}@{loaded.model.revision}"
        page = write_report(
            report_folder, label_set=label_set, model=model, answers=read.answers, cosines=cosines, shown=shown
        )
        click.echo(f"written to {page}", err=True)
    if as_json:
        click.echo(json.dumps(_as_json(found, read), ensure_ascii=False, indent=2))
    else:
        _print_evaluation(found, read, label_set)
    return 0


def _report_writer() -> Callable[..., Path]:
    """The function that writes reports; it needs an extra.

    Raises:
        FatalError: with ExitCode.CONFIG, when jinja2 is not installed.
    """
    try:
        from shiwu_worker.commands.label_report import write_report  # noqa: PLC0415 an extra
    except ModuleNotFoundError as error:
        text = f"--report needs {error.name}: pip install '.[worker,report]' in a clone of shiwu"
        raise FatalError(ExitCode.CONFIG, text) from error
    return write_report


def _limits(label_set: LabelSet) -> NDArray[np.float64]:
    """The least cosine of each label; without limits every label is given."""
    return np.array(label_set.min_cosines or [NO_LIMIT] * len(label_set.words), np.float64)


def _as_json(found: Evaluation, read: AnswerVectors) -> dict[str, Any]:
    labels = [
        {
            "label": score.label,
            "images": score.images,
            "precision": _rounded(score.precision),
            "recall": _rounded(score.recall),
            "average_precision": None if score.average_precision is None else round(score.average_precision, 4),
            "taken_for": dict(score.taken_for),
        }
        for score in found.labels
    ]
    return {
        "images": len(read.vectors),
        "false_tags": _rounded(found.false_tags),
        "kept": _rounded(found.kept),
        "labels": labels,
    }


def _print_evaluation(found: Evaluation, read: AnswerVectors, label_set: LabelSet) -> None:
    table = Table("label", "images", "precision", "recall", "AP", "taken for", box=None)
    for score in found.labels:
        taken = ", ".join(f"{word} {count}" for word, count in score.taken_for[:SHOWN_CONFUSIONS])
        average = "" if score.average_precision is None else f"{score.average_precision:.2f}"
        row = (score.label, str(score.images), _percent(score.precision), _percent(score.recall), average, taken)
        table.add_row(*row)
    make_console().print(table)
    click.echo(f"{len(read.vectors)} images, {label_set.name}; the intervals hold 95 % of what chance does")
    click.echo(f"true labels that are given:                 {_percent(found.kept)}")
    click.echo(f"images without any label that get a tag:    {_percent(found.false_tags)}")
    if label_set.min_cosines is None and label_set.rules is None:
        click.echo(
            f"{label_set.name} has no limits, so every label counts as given; see `shiwu-worker labels calibrate`"
        )


def _percent(interval: Interval | None) -> str:
    if interval is None:
        return "none"
    return f"{interval.share:.1%} ({interval.low:.1%} to {interval.high:.1%})"


def _rounded(interval: Interval | None) -> list[float] | None:
    """The low end, the share and the high end."""
    return None if interval is None else [round(value, 4) for value in interval]
