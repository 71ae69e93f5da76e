"""`shiwu-worker labels`: checks label sets, chooses their limits, and measures them."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import click
import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from shiwu_worker.calibration import (
    Calibration,
    CalibrationError,
    CalibrationOptions,
    Evaluation,
    Interval,
    calibrate,
    evaluate,
)
from shiwu_worker.checkpoints.model_files import model_folder
from shiwu_worker.commands.answer_vectors import AnswerVectors, WrongAnswers, read_truth, read_vectors
from shiwu_worker.commands.label_templates import (
    file_with_templates,
    measure_templates,
    not_better,
    print_templates,
)
from shiwu_worker.config.errors import load_settings_or_exit
from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.service.labels import load_label_bank, read_label_sets
from shiwu_worker.service.model import load_encoder
from shiwu_worker.stages.decode.image_spec import read_image_spec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shiwu.contract import ModelInfo
    from shiwu_worker.jobs.label_set import LabelSet
    from shiwu_worker.jobs.label_vectors import EncodedLabels

NOT_KEPT: Final = 1
"""Exit code of findings, and of limits that do not hold."""
MAX_COMPARED: Final = 5000
"""Labels of one set that are compared with each other."""
NEAR: Final = 0.95
"""Cosine of two labels' vectors from which they are shown as near. A hint only: models differ in their cosines."""
SHOWN_PAIRS: Final = 5
MAX_PAIRS: Final = 100
"""Pairs of one set in JSON."""
SHOWN_CONFUSIONS: Final = 3
NO_LIMIT: Final = -1.0


@dataclass(frozen=True, slots=True)
class _Loaded:
    """The label sets of this worker with their vectors."""

    sets: Mapping[str, LabelSet]
    encode: Callable[[LabelSet], EncodedLabels]
    model: ModelInfo


def run_lint(names: Sequence[str], *, as_json: bool) -> int:
    """Check label sets, print what was found, and return the exit code."""
    return _run(lambda: _lint(names, as_json=as_json))


def run_calibrate(
    name: str,
    answers: BinaryIO,
    *,
    false_rate: float,
    output: Path,
    new_name: str | None,
    seed: int,
    is_forced: bool,
) -> int:
    """Choose the limits of a label set, write the new set, and return the exit code."""
    options = CalibrationOptions(false_rate=false_rate, seed=seed, is_forced=is_forced)
    return _run(lambda: _calibrate(name, answers, options, output=output, new_name=new_name or f"{name}-calibrated"))


def run_eval(name: str, answers: BinaryIO, *, truth: BinaryIO | None, as_json: bool, report_folder: Path | None) -> int:
    """Measure a label set, print the figures, write the report that was asked for, and return the exit code."""
    return _run(lambda: _evaluate(name, answers, truth=truth, as_json=as_json, report_folder=report_folder))


def run_tune_templates(
    name: str,
    answers: BinaryIO,
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
        loaded = _load([name])
        label_set = loaded.sets[name]
        read, shown = read_vectors(answers, model=loaded.model).with_truth(None if truth is None else read_truth(truth))
        found = measure_templates(label_set, loaded.encode, read, shown, more=more, seed=seed)
        print_templates(found, label_set)
        if not found.is_better:
            click.echo(not_better(label_set))
        if output is None:
            return 0 if found.is_better else NOT_KEPT
        if not found.is_better and not is_forced:
            click.echo(f"{output} is not written; --accept writes it")
            return NOT_KEPT
        _write(output, file_with_templates(label_set, found.chosen.templates, name=new_name or f"{name}-tuned"))
        click.echo(f"written to {output}, without limits: they hold for one set of templates")
        return 0

    return _run(tune)


def _run(command: Callable[[], int]) -> int:
    try:
        return command()
    except FatalError as error:
        click.echo(f"{error.exit_code.name}: {error}", err=True)
        return int(error.exit_code)
    except WrongAnswers as error:
        click.echo(f"CONFIG: {error}", err=True)
        return int(ExitCode.CONFIG)
    except CalibrationError as error:
        click.echo(f"not calibrated: {error}", err=True)
        return NOT_KEPT


def _load(names: Sequence[str]) -> _Loaded:
    """Load the model, and check that these sets exist.

    Raises:
        FatalError: a set is unknown, or the worker could not start with this model and these label files.
    """
    settings = load_settings_or_exit()
    sets = read_label_sets(settings)
    for name in names:
        if name not in sets:
            text = f"expected the name of a label set, one of {', '.join(sorted(sets))}, got {name!r}"
            raise FatalError(ExitCode.CONFIG, text)
    with redirect_stdout(sys.stderr):
        folder = model_folder(settings.model)
        encoder = load_encoder(settings, folder, read_image_spec(folder))
    bank = load_label_bank(settings, encoder, sets)
    return _Loaded(sets, bank.encoded, encoder.info)


def _first_version(label_set: LabelSet) -> LabelSet:
    if label_set.rules is not None:
        raise FatalError(ExitCode.CONFIG, f"expected a label set of version 1, got {label_set.name} of version 2")
    return label_set


# ------------------------------------------------------------------------------------ lint
def _lint(names: Sequence[str], *, as_json: bool) -> int:
    loaded = _load(names)
    encoded = {name: loaded.encode(loaded.sets[name]) for name in names or sorted(loaded.sets)}
    warnings = {name: list(each.warnings) for name, each in encoded.items()}
    near = {name: _near_pairs(each) for name, each in encoded.items()}
    if as_json:
        found = {
            name: {
                "labels": len(encoded[name].label_set.words),
                "warnings": [{"code": str(each.code), "message": each.message} for each in warnings[name]],
                "near": [[*pair[:2], round(pair[2], 4)] for pair in near[name][:MAX_PAIRS]],
                "near_pairs": len(near[name]),
            }
            for name in encoded
        }
        click.echo(json.dumps(found, ensure_ascii=False, indent=2))
    else:
        for name, each in encoded.items():
            click.echo(f"{name}: {len(each.label_set.words)} labels, {len(warnings[name])} warnings")
            for warning in warnings[name]:
                click.echo(f"  {warning.code}: {warning.message}")
            for one, other, cosine in near[name][:SHOWN_PAIRS]:
                click.echo(f"  near: {one}, {other} ({cosine:.3f}); few images will tell them apart")
            if len(near[name]) > SHOWN_PAIRS:
                click.echo(f"  near: {len(near[name]) - SHOWN_PAIRS} pairs more")
    return NOT_KEPT if any(warnings.values()) else 0


def _near_pairs(encoded: EncodedLabels) -> list[tuple[str, str, float]]:
    """Pairs of labels that nearly have the same vector, but not the same one; with their cosines, the nearest first."""
    words, alike = encoded.row_words[:MAX_COMPARED], encoded.texts.findings.alike
    same = {frozenset((one, other)) for group in alike for one in group for other in group}
    same |= {frozenset((word,)) for word in words}  # texts of one label
    cosines = encoded.vectors[:MAX_COMPARED] @ encoded.vectors[:MAX_COMPARED].T
    rows, columns = np.nonzero(np.triu(cosines >= NEAR, k=1))
    pairs = [
        (words[row], words[column], float(cosines[row, column])) for row, column in zip(rows, columns, strict=True)
    ]
    return sorted((pair for pair in pairs if frozenset(pair[:2]) not in same), key=lambda pair: -pair[2])


# ------------------------------------------------------------------------------------ calibrate
def _calibrate(name: str, answers: BinaryIO, options: CalibrationOptions, *, output: Path, new_name: str) -> int:
    loaded = _load([name])
    read = read_vectors(answers, model=loaded.model)
    label_set = _first_version(loaded.sets[name])
    found = calibrate(read.pool(), loaded.encode(label_set).vectors, options)
    _write(output, _label_file(label_set, found, options, name=new_name, model=loaded.model))
    _print_calibration(found, options, read, label_set, output)
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


def _write(output: Path, fields: Mapping[str, Any]) -> None:
    """Write the file whole or not at all.

    Raises:
        FatalError: with ExitCode.CONFIG, when it cannot be written.
    """
    text = yaml.safe_dump(dict(fields), allow_unicode=True, sort_keys=False, width=120)
    try:
        with tempfile.NamedTemporaryFile("w", dir=output.parent, encoding="utf-8", delete=False) as part:
            part.write(text)
        os.chmod(part.name, 0o644)
        os.replace(part.name, output)
    except OSError as error:
        raise FatalError(ExitCode.CONFIG, f"{output}: cannot be written ({error.strerror or error})") from error


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
    name: str, answers: BinaryIO, *, truth: BinaryIO | None, as_json: bool, report_folder: Path | None
) -> int:
    write_report = None if report_folder is None else _report_writer()
    loaded = _load([name])
    label_set = _first_version(loaded.sets[name])
    read = read_vectors(answers, model=loaded.model)
    read, shown = read.with_truth(None if truth is None else read_truth(truth))
    encoded = loaded.encode(label_set)
    cosines = read.vectors @ encoded.vectors.T
    found = evaluate(cosines, label_set.words, shown, min_cosines=_limits(label_set))
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
    Console(markup=False, emoji=False, highlight=False).print(table)
    click.echo(f"{len(read.vectors)} images, {label_set.name}; the intervals hold 95 % of what chance does")
    click.echo(f"true labels that are given:                 {_percent(found.kept)}")
    click.echo(f"images without any label that get a tag:    {_percent(found.false_tags)}")
    if label_set.min_cosines is None:
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
