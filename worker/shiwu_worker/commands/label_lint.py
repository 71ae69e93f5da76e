"""`shiwu-worker labels lint`: finds labels that the model cannot use, and calibrations that no longer hold."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

import click
import numpy as np

from shiwu.contract import AnswerWarning, WarningCode
from shiwu_worker.commands.loaded_labels import NOT_KEPT, Loaded, load, run_command
from shiwu_worker.config.errors import load_settings_or_exit
from shiwu_worker.jobs.label_checks import LabelFindings
from shiwu_worker.stages.score.label_files import StaleCalibration, read_calibrations
from shiwu_worker.stages.score.label_warnings import label_warnings

if TYPE_CHECKING:
    from shiwu_worker.jobs.label_set import LabelSet
    from shiwu_worker.jobs.label_vectors import EncodedLabels

MAX_COMPARED: Final = 5000
"""Labels of one set that are compared with each other."""
NEAR: Final = 0.95
"""Cosine of two labels' vectors from which they are shown as near. A hint only: models differ in their cosines."""
SHOWN_PAIRS: Final = 5
MAX_PAIRS: Final = 100
"""Pairs of one set in JSON."""
CALIBRATION_MISSING: Final = "calibration_missing"
"""Code of a set whose calibration file is not there or cannot be read."""


def run_lint(names: Sequence[str], *, as_json: bool) -> int:
    """Check label sets, print what was found, and return the exit code."""
    return run_command(lambda: _lint(names, as_json=as_json))


def _lint(names: Sequence[str], *, as_json: bool) -> int:
    loaded = load(names, has_calibrations=False)
    encoded = {name: loaded.encode(loaded.sets[name]) for name in names or sorted(loaded.sets)}
    stale = _calibration_warnings(loaded)
    warnings = {name: [*each.warnings, *stale.get(name, ())] for name, each in encoded.items()}
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


def _calibration_warnings(loaded: Loaded) -> dict[str, Sequence[AnswerWarning]]:
    """By label set of version 2, why its calibration file does not hold."""
    folder = load_settings_or_exit().labels_dir
    found = {} if folder is None else read_calibrations(folder)
    return {name: tuple(_warnings(each, loaded.model.revision)) for name, each in found.items()}


def _warnings(label_set: LabelSet | ValueError, revision: str) -> Iterator[AnswerWarning]:
    if isinstance(label_set, StaleCalibration):
        text = str(label_set).replace(f"{WarningCode.CALIBRATION_STALE}: ", "")
        yield AnswerWarning(code=WarningCode.CALIBRATION_STALE, message=text)
    elif isinstance(label_set, ValueError):
        yield AnswerWarning(code=CALIBRATION_MISSING, message=str(label_set))
    else:
        found = label_warnings(label_set, LabelFindings(), revision=revision)
        yield from (each for each in found if each.code == WarningCode.CALIBRATION_STALE)


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
